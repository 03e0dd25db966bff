"""When what a model says is right: the rules of the strict protocol and of WILD, over texts."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

from rome.data.texts import one_form

_STOP = re.compile(r"\n|[.!?](?=\s|$)|[。！？｡।॥؟۔։።]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def until_stop(text: str, *targets: str) -> str:
    """A text up to a line break or the end of a sentence, but not within a target itself ("St.
    Louis"): `.`, `!` or `?` at the end or before white space, or a stop of a script that has no
    space after it. White space around it goes, and it is in normal form C."""
    # In one normal form, since a tokenizer may compose what a record has decomposed.
    text = one_form(text.strip())
    known = [len(t) for target in targets if text.startswith(t := one_form(target.strip()))]
    stop = _STOP.search(text, max(known, default=0))
    return text[: stop.end()].rstrip() if stop else text


def strict(text: str, answers: Iterable[str]) -> bool:
    """A greedy answer is an answer and nothing else, but for white space and a full stop."""
    return _bare(text) in {_bare(answer) for answer in answers}


def _bare(text: str) -> str:
    return re.sub(r"[.。]$", "", " ".join(one_form(text).split())).strip()


def wild(text: str, answers: Iterable[str]) -> bool:
    """WILD (arXiv 2502.11177, Section 4): what is said until a line break or a sentence's end is an
    answer after SQuAD's normalisation."""
    return any(squad(until_stop(text, one)) == squad(one) for one in answers)


def squad(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al. 2016): lower case, no punctuation (of ASCII), no
    English articles, one space between words. A text that is nothing else stays."""
    text = one_form(text).lower().strip()
    bare = _ARTICLES.sub(" ", text.translate(_NO_PUNCTUATION))
    return " ".join(bare.split()) or text
