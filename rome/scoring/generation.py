"""Free text from many prompts under many edits.

Legend: B rows, T tokens, D hidden size, V vocabulary, k candidates.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rome.data.records import Record, Request
from rome.edits.deltas import Edit
from rome.models import EditableModel, costs, memory
from rome.scoring import decoding, text_metrics
from rome.scoring.decoding import Row
from rome.scoring.settings import GenerationSettings


@dataclass(frozen=True)
class Start:
    """A text to continue: its tokens, the edit it runs under, and what seeds its draws."""

    ids: list[int]
    edit: int
    key: tuple[int, ...]


def starts(model: EditableModel, texts: Sequence[str], edit: int, case_id: int) -> list[Start]:
    """Prompts of one record; the i-th is seeded by (case_id, i) alone."""
    encoded = model.encode(texts)
    return [Start(row.ids, edit, (case_id, i)) for i, row in enumerate(encoded)]


def record_starts(model: EditableModel, records: Sequence[Record]) -> list[Start]:
    """The generation prompts of all records, each under the edit with its record's index."""
    return [
        start
        for r, record in enumerate(records)
        for start in starts(model, record.generation_prompts, r, record.case_id)
    ]


def generate(
    model: EditableModel,
    rows: Sequence[Start],
    edits: Sequence[Edit],
    settings: GenerationSettings,
    token_budget: int,
) -> list[list[int]]:
    """Token ids of each text, prompt included.

    What is drawn for a row depends on its tokens, edit, key and the seed only, not on the batch.
    A batch holds at most `Costs.cached` times `token_budget` tokens when its texts are complete.
    """
    most = max(1, costs.of(model.device).cached * token_budget // settings.max_tokens)
    batches = memory.by_length([len(row.ids) for row in rows], math.inf, most)
    return memory.in_batches(rows, batches, lambda part: _generate(part, model, edits, settings))


@torch.inference_mode()
def _generate(
    rows: Sequence[Start], model: EditableModel, edits: Sequence[Edit], settings: GenerationSettings
) -> list[list[int]]:
    """`rows` come with the shortest first, which have the most to say."""
    draws_BT = torch.stack([_draws(settings, row.key) for row in rows]).to(model.device)

    def choose(logits_BV: Tensor, position_B1: Tensor) -> Tensor:
        position_B1 = position_B1.clamp(max=settings.max_tokens - 1)
        draw_B1 = draws_BT[: len(logits_BV)].gather(1, position_B1)
        return _sample(logits_BV, settings.top_k, draw_B1)

    prompts = [Row(r.ids, r.edit, max(settings.max_tokens - len(r.ids), 0)) for r in rows]
    said = decoding.continuations(model, prompts, edits, choose)
    return [[*row.ids, *ids] for row, ids in zip(rows, said, strict=True)]


def _draws(settings: GenerationSettings, key: tuple[int, ...]) -> Tensor:
    """Uniform numbers in [0, 1), one per position of the text, from the seed and key alone."""
    digest = hashlib.sha256(repr((settings.seed, *key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.rand(settings.max_tokens, generator=generator, dtype=torch.float64)


def _sample(logits_BV: Tensor, top_k: int, draw_B1: Tensor) -> Tensor:
    """The softmax's `top_k` largest, renormalised and sampled by inversion: ids [B, 1]."""
    values_Bk, ids_Bk = logits_BV.topk(top_k, dim=1)
    edges_Bk = values_Bk.double().softmax(1).cumsum(1)
    choice_B1 = (draw_B1 >= edges_Bk[:, :-1]).sum(1, keepdim=True)
    return ids_Bk.gather(1, choice_B1)


def decode(model: EditableModel, texts_ids: Sequence[Sequence[int]]) -> list[str]:
    """Token ids to text, without special tokens (reference code: `generate_fast`, where they are
    `<|endoftext|>` alone)."""
    if not texts_ids:
        return []  # `batch_decode` takes no texts for one text without tokens.
    return list(
        model.tokenizer.batch_decode(
            [model.without_special(ids) for ids in texts_ids], clean_up_tokenization_spaces=False
        )
    )


def sample_context_texts(
    model: EditableModel, lengths: Sequence[tuple[int, int]], seed: int
) -> list[str]:
    """Texts sampled from the start token, `count` of each `length` in tokens (start included).

    The reference samples ten of 5 and ten of 10 with top-k 5, cleaned as all texts; the start token
    is not in the text.
    """
    texts: list[str] = []
    for length, count in lengths:
        settings = GenerationSettings(max_tokens=length, seed=seed)
        rows = [Start(model.start_ids, 0, (length, i)) for i in range(count)]
        ids = generate(model, rows, [UNEDITED], settings, token_budget=length * count)
        texts += map(text_metrics.clean, decode(model, [row[1:] for row in ids]))
    return texts


UNEDITED = Edit(Request("{}", "", ""))
"""The edit of rows that run as the model is."""
