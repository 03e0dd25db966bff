"""Greedy answers: decode until a natural stop, for many edits at once.

Legend: B rows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rome.data.records import Record
from rome.edits.deltas import Edit, applied
from rome.models import EditableModel, caches, memory, prompts
from rome.scoring import generation

MORE_TOKENS = 3
"""Beyond the target's length: enough to see that the text stops, or goes on, after it."""

_STOP = re.compile(r"\n|[.!?](?=\s|$)")


@dataclass(frozen=True)
class Question:
    """Ask for the continuation of `prompt` under the edit with index `edit`; `target` is right."""

    edit: int
    prompt: str
    target: str


@dataclass
class _Row:
    edit: int
    ids: list[int]
    steps: int


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
    questions = [Question(r, text, target) for r, _, texts, target in columns for text in texts]
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
    before a line break or after the end of a sentence: `.`, `!` or `?` at the end or before white
    space, except within the target itself ("St. Louis"). White space around it goes. A batch holds
    at most `token_budget` tokens, padding included.
    """
    rows = _rows(model, questions)
    # Rows that have about as much to say, and then of about the same length.
    order = [(row.steps, len(row.ids)) for row in rows]
    lengths = [len(row.ids) + row.steps for row in rows]
    batches = memory.by_length(lengths, token_budget, order=order)
    ids = memory.in_batches(rows, batches, lambda part: _continue(model, part, edits))
    texts = generation.decode(model, ids)
    return [until_stop(text, one.target) for text, one in zip(texts, questions, strict=True)]


def _rows(model: EditableModel, questions: Sequence[Question]) -> list[_Row]:
    alone = model.encode([question.prompt.rstrip(" ") for question in questions])
    answered = model.encode([prompts.with_target(one.prompt, one.target) for one in questions])
    rows = []
    for question, prompt, whole in zip(questions, alone, answered, strict=True):
        steps = len(whole.ids) - prompts.target_start(whole, question.prompt) + MORE_TOKENS
        # The last token that is said needs no place.
        room = model.hf.config.max_position_embeddings - len(prompt.ids) + 1
        rows.append(_Row(question.edit, prompt.ids, min(steps, room)))
    return rows


def until_stop(text: str, target: str) -> str:
    """The part of a text that `say` keeps."""
    text = text.strip()
    stop = _STOP.search(text, len(target) if text.startswith(target) else 0)
    return text[: stop.end()].rstrip() if stop else text


@torch.inference_mode()
def _continue(model: EditableModel, rows: Sequence[_Row], edits: Sequence[Edit]) -> list[list[int]]:
    """The tokens that follow each row, up to a special one; what is done leaves the batch."""
    # Prompts end in one column, so each step fills one column of one cache.
    batch = prompts.pad([row.ids for row in rows], model.device, [len(row.ids) for row in rows])
    next_BT, mask_BT, position_BT = batch.ids_BT, batch.mask_BT, batch.positions_BT
    special = set(model.tokenizer.all_special_ids)
    cache = caches.recording()
    said: list[list[int]] = [[] for _ in rows]
    left = list(range(len(rows)))
    while left:
        staying = left
        with applied(model, [edits[rows[b].edit] for b in left]):
            while staying == left:
                hidden_BTD = model.run(next_BT, mask_BT, position_BT, cache)
                next_BT = model.logits(hidden_BTD[:, -1]).argmax(1, keepdim=True)
                mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
                position_BT = position_BT[:, -1:] + 1
                tokens = next_BT[:, 0].tolist()
                for b, token in zip(left, tokens, strict=True):
                    said[b].append(token)
                staying = [
                    b
                    for b, token in zip(left, tokens, strict=True)
                    if token not in special and len(said[b]) < rows[b].steps
                ]
        kept = torch.tensor([i for i, b in enumerate(left) if b in staying])
        if left := staying:
            cache.batch_select_indices(kept)
            next_BT, mask_BT, position_BT = next_BT[kept], mask_BT[kept], position_BT[kept]
    return [ids[:-1] if ids[-1] in special else ids for ids in said]
