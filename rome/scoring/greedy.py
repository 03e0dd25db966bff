"""What a model says by itself: the likeliest token at each step, for many edits at once.

Strict answers end where the strict protocol has them end; WILD's are kept whole.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

from torch import Tensor

from rome.data.answers import until_stop
from rome.data.records import Record, told
from rome.edits.deltas import Edit
from rome.models import EditableModel, memory, prompts
from rome.scoring import decoding, generation
from rome.scoring.decoding import Row

MORE_TOKENS = 3
"""Beyond the target's length: enough to see that the text stops, or goes on, after it."""


@dataclass(frozen=True)
class Question:
    """Ask for the continuation of `prompt` under the edit with index `edit`; any of `targets` is
    right."""

    edit: int
    prompt: str
    targets: tuple[str, ...]
    separator: str = " "


def say_records(
    model: EditableModel, records: Sequence[Record], edits: Sequence[Edit], token_budget: int
) -> list[dict[str, Any]]:
    """The columns `*_greedy` of each record under its edit (same index), one text per prompt."""
    return _by_column(
        records, "greedy", lambda questions: say(model, questions, edits, token_budget)
    )


def say_wild_records(
    model: EditableModel,
    records: Sequence[Record],
    edits: Sequence[Edit],
    max_tokens: int,
    token_budget: int,
) -> list[dict[str, Any]]:
    """The columns `*_wild` of each record under its edit (same index), one text per prompt: all
    that is said in at most `max_tokens` tokens."""
    return _by_column(
        records, "wild", lambda asked: say_all(model, asked, edits, max_tokens, token_budget)
    )


def _by_column(
    records: Sequence[Record], suffix: str, say: Callable[[list[Question]], list[str]]
) -> list[dict[str, Any]]:
    columns = [
        (r, f"{kind}_{suffix}", pairs)
        for r, record in enumerate(records)
        for kind, pairs in told(record).items()
    ]
    said = iter(
        say(
            [
                Question(r, prompt, (target,), records[r].separator)
                for r, _, pairs in columns
                for prompt, target in pairs
            ]
        )
    )
    rows: list[dict[str, Any]] = [{} for _ in records]
    for r, column, pairs in columns:
        rows[r][column] = list(islice(said, len(pairs)))
    return rows


def say(
    model: EditableModel, questions: Sequence[Question], edits: Sequence[Edit], token_budget: int
) -> list[str]:
    """The greedy continuation of each prompt, up to its natural stop.

    The likeliest token is taken, as often as the longest target has tokens and MORE_TOKENS times
    more. The text ends before the first special token (such as the end of text), and, once
    something is said, where `until_stop` has it end. A batch holds at most `token_budget` tokens,
    padding included.
    """
    longest = iter(_target_tokens(model, questions))
    steps = [max(islice(longest, len(one.targets))) + MORE_TOKENS for one in questions]
    texts = _continuations(model, questions, steps, edits, token_budget)
    return [until_stop(text, *one.targets) for text, one in zip(texts, questions, strict=True)]


def say_all(
    model: EditableModel,
    questions: Sequence[Question],
    edits: Sequence[Edit],
    max_tokens: int,
    token_budget: int,
) -> list[str]:
    """The greedy continuation of each prompt by `max_tokens` tokens, or up to a special one."""
    return _continuations(model, questions, [max_tokens] * len(questions), edits, token_budget)


def _target_tokens(model: EditableModel, questions: Sequence[Question]) -> Iterator[int]:
    """How many tokens each target of each question has."""
    asked = [(one, target) for one in questions for target in one.targets]
    answered = model.encode(
        [prompts.with_target(one.prompt, target, one.separator) for one, target in asked]
    )
    for (one, _), whole in zip(asked, answered, strict=True):
        yield len(whole.ids) - prompts.target_start(whole, one.prompt)


def _continuations(
    model: EditableModel,
    questions: Sequence[Question],
    steps: Sequence[int],
    edits: Sequence[Edit],
    token_budget: int,
) -> list[str]:
    alone = model.encode([question.prompt.rstrip(" ") for question in questions])
    rows = [
        # The last token that is said needs no place.
        Row(
            prompt.ids,
            one.edit,
            min(n, model.hf.config.max_position_embeddings - len(prompt.ids) + 1),
        )
        for one, n, prompt in zip(questions, steps, alone, strict=True)
    ]
    # Rows that have about as much to say, and then of about the same length.
    order = [(-row.steps, len(row.ids)) for row in rows]
    lengths = [len(row.ids) + row.steps for row in rows]
    batches = memory.by_length(lengths, token_budget, order=order)
    ids = memory.in_batches(rows, batches, lambda part: _continue(model, part, edits))
    return generation.decode(model, ids)


def _continue(model: EditableModel, rows: Sequence[Row], edits: Sequence[Edit]) -> list[list[int]]:
    """The likeliest tokens after each row, up to a special one."""

    def likeliest(logits_BV: Tensor, position_B1: Tensor) -> Tensor:
        return logits_BV.argmax(1, keepdim=True)

    special = model.special_ids
    said = decoding.continuations(model, rows, edits, likeliest)
    return [list(takewhile(lambda token: token not in special, ids)) for ids in said]
