"""The same record, asked otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rome.data.records import Record

FORMS = {"plain": "{}", "qa": "Please answer the question:\n\nQ: {}\nA:"}
"""How WILD asks (arXiv 2502.11177, Section 4): a prompt alone, or as a question."""


def worded(record: Record, word: Callable[[str], str], separator: str | None = None) -> Record:
    """The record with `word` of each prompt that a target follows, `{}` in it or not, and perhaps
    another separator. Generation prompts stay, since texts begin with them."""
    separator = record.separator if separator is None else separator

    def all_of(prompts: Sequence[str]) -> tuple[str, ...]:
        return tuple(map(word, prompts))

    return replace(
        record,
        prompt=word(record.prompt),
        further=tuple(
            replace(one, prompt=word(one.prompt), separator=separator) for one in record.further
        ),
        paraphrase_prompts=all_of(record.paraphrase_prompts),
        neighborhood_prompts=all_of(record.neighborhood_prompts),
        attribute_prompts=all_of(record.attribute_prompts),
        probes=tuple(replace(one, prompt=word(one.prompt)) for one in record.probes),
        separator=separator,
    )


def in_form(record: Record, form: str) -> Record:
    """The record with each prompt in one of FORMS."""
    return worded(record, lambda prompt: FORMS[form].replace("{}", prompt))
