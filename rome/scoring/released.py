"""zsRE's shares of right tokens as the released code computes them (`eval_utils_zsre.py`).

It decodes each token of a target and encodes it again, and the tokens before it with the prompt. A
token that is part of a character becomes U+FFFD on the way, which is another token: the code asks
for that one then, after a text that has it. What the model is to say are the true tokens; the
released way is here for numbers that compare with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from rome.data.records import Record
from rome.edits.deltas import Edit
from rome.models import EditableModel
from rome.models.prompts import Text
from rome.scoring import probabilities

_PART = "\ufffd"


def accuracies(
    model: EditableModel,
    records: Sequence[Record],
    asked: Sequence[Mapping[str, Sequence[tuple[str, str]]]],
    edits: Sequence[Edit],
    token_budget: int,
) -> dict[tuple[int, str, int], float]:
    """The share of right tokens where it is not that of the true ones: by record, column of
    `asked`, and place of the prompt in it. `asked`: column -> prompts, each with its target."""
    texts: list[tuple[int, Text]] = []
    spans: dict[tuple[int, str, int], range] = {}
    for r, (record, columns) in enumerate(zip(records, asked, strict=True)):
        if record.target_true is not None or not record.separator:
            continue  # COUNTERFACT has no such share, and the released code always has a space.
        for column, pairs in columns.items():
            for place, (prompt, target) in enumerate(pairs):
                if not _has_parts(model, target):
                    continue
                some = _steps(model, prompt, target)
                spans[r, column, place] = range(len(texts), len(texts) + len(some))
                texts += [(r, text) for text in some]
    scores = probabilities.score_texts(model, texts, edits, token_budget)
    return {where: fmean(scores[i].accuracy for i in span) for where, span in spans.items()}


def _target_ids(model: EditableModel, target: str) -> list[int]:
    return list(model.tokenizer(f" {target}", add_special_tokens=False)["input_ids"])


def _has_parts(model: EditableModel, target: str) -> bool:
    return any(_PART in model.tokenizer.decode([i]) for i in _target_ids(model, target))


def _steps(model: EditableModel, prompt: str, target: str) -> list[Text]:
    """For each token of the target: the text before it, and the one token that is asked for."""
    tokenizer, ids = model.tokenizer, _target_ids(model, target)
    before = model.encode([prompt + str(tokenizer.decode(ids[:i])) for i in range(len(ids))])
    wanted = [tokenizer(tokenizer.decode([i]), add_special_tokens=False)["input_ids"] for i in ids]
    steps = zip(ids, before, wanted, strict=True)
    # A token that is a space only may decode to nothing.
    return [Text([*row.ids, (again or [i])[0]], len(row.ids)) for i, row, again in steps]
