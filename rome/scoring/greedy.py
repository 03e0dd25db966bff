"""Greedy answers: decode until a natural stop, for many edits at once.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from rome.data.records import Record, one_form
from rome.edits.deltas import Edit
from rome.models import EditableModel, memory, prompts
from rome.scoring import decoding, generation
from rome.scoring.decoding import Row

MORE_TOKENS = 3
"""Beyond the target's length: enough to see that the text stops, or goes on, after it."""

_STOP = re.compile(r"\n|[.!?](?=\s|$)|[。！？｡।॥؟۔։።]")


@dataclass(frozen=True)
class Question:
    """Ask for the continuation of `prompt` under the edit with index `edit`; `target` is right."""

    edit: int
    prompt: str
    target: str
    separator: str = " "


def say_records(
    model: EditableModel, records: Sequence[Record], edits: Sequence[Edit], token_budget: int
) -> list[dict[str, list[str]]]:
    """The columns `*_greedy` of each record under its edit (same index), one text per prompt."""
    columns = [
        (r, f"{kind}_greedy", texts, target)
        for r, record in enumerate(records)
        for kind, texts, target in (
            ("rewrite", (record.request.text,), record.target_new),
            ("paraphrase", record.paraphrase_prompts, record.target_new),
            ("neighborhood", record.neighborhood_prompts, record.neighborhood_true),
        )
    ]
    questions = [
        Question(r, text, target, records[r].separator)
        for r, _, texts, target in columns
        for text in texts
    ]
    said = iter(say(model, questions, edits, token_budget))
    rows: list[dict[str, list[str]]] = [{} for _ in records]
    for r, column, texts, _ in columns:
        rows[r][column] = [next(said) for _ in texts]
    return rows


def say(
    model: EditableModel, questions: Sequence[Question], edits: Sequence[Edit], token_budget: int
) -> list[str]:
    """The greedy continuation of each prompt, up to its natural stop.

    The likeliest token is taken, as often as the target has tokens and MORE_TOKENS times more. The
    text ends before the first special token (such as the end of text), and, once something is said,
    before a line break or after the end of a sentence, except within the target itself ("St.
    Louis"): `.`, `!` or `?` at the end or before white space, or a stop of a script that has no
    space after it. White space around it goes, and it is in normal form C. A batch holds at most
    `token_budget` tokens, padding included.
    """
    rows = _rows(model, questions)
    # Rows that have about as much to say, and then of about the same length.
    order = [(-row.steps, len(row.ids)) for row in rows]
    lengths = [len(row.ids) + row.steps for row in rows]
    batches = memory.by_length(lengths, token_budget, order=order)
    ids = memory.in_batches(rows, batches, lambda part: _continue(model, part, edits))
    texts = generation.decode(model, ids)
    return [until_stop(text, one.target) for text, one in zip(texts, questions, strict=True)]


def _rows(model: EditableModel, questions: Sequence[Question]) -> list[Row]:
    alone = model.encode([question.prompt.rstrip(" ") for question in questions])
    answered = model.encode(
        [prompts.with_target(one.prompt, one.target, one.separator) for one in questions]
    )
    rows = []
    for question, prompt, whole in zip(questions, alone, answered, strict=True):
        steps = len(whole.ids) - prompts.target_start(whole, question.prompt) + MORE_TOKENS
        # The last token that is said needs no place.
        room = model.hf.config.max_position_embeddings - len(prompt.ids) + 1
        rows.append(Row(prompt.ids, question.edit, min(steps, room)))
    return rows


def until_stop(text: str, target: str) -> str:
    """The part of a text that `say` keeps."""
    # In one normal form, since a tokenizer may compose what a record has decomposed.
    text, target = (one_form(part.strip()) for part in (text, target))
    stop = _STOP.search(text, len(target) if text.startswith(target) else 0)
    return text[: stop.end()].rstrip() if stop else text


def _continue(model: EditableModel, rows: Sequence[Row], edits: Sequence[Edit]) -> list[list[int]]:
    """The likeliest tokens after each row, up to a special one."""

    def likeliest(logits_BV: Tensor, position_B1: Tensor) -> Tensor:
        return logits_BV.argmax(1, keepdim=True)

    special = model.special_ids
    said = decoding.continuations(model, rows, edits, likeliest)
    return [list(takewhile(lambda token: token not in special, ids)) for ids in said]
