"""Free text from many prompts under many edits, in one batch with one attention cache.

Legend: B rows, T tokens, D hidden size, V vocabulary, k candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from rome import prompts
from rome.deltas import Edit, applied
from rome.models import EditableModel
from rome.records import Request


@dataclass(frozen=True)
class GenerationSettings:
    """How texts are sampled (reference code: `generate_fast`)."""

    top_k: int = 5
    max_tokens: int = 100
    """Length of a text in tokens, prompt included; no stop at EOS."""
    seed: int = 0


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


def generate(
    model: EditableModel,
    rows: Sequence[Start],
    edits: Sequence[Edit],
    settings: GenerationSettings,
    token_budget: int,
) -> list[list[int]]:
    """Token ids of each text, prompt included.

    What is drawn for a row depends on its tokens, edit, key and the seed only, not on the batch.
    A batch holds at most `token_budget` tokens when all its texts are complete.
    """
    result: list[list[int]] = [[] for _ in rows]
    for batch in _batches(rows, max(1, token_budget // settings.max_tokens)):
        for i, ids in zip(
            batch, _generate([rows[i] for i in batch], model, edits, settings), strict=True
        ):
            result[i] = ids
    return result


def _batches(rows: Sequence[Start], size: int) -> Iterator[list[int]]:
    """Indices of rows of similar length, `size` at a time."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    return (order[i : i + size] for i in range(0, len(order), size))


@torch.inference_mode()
def _generate(
    rows: Sequence[Start], model: EditableModel, edits: Sequence[Edit], settings: GenerationSettings
) -> list[list[int]]:
    longest = max(len(row.ids) for row in rows)
    # Prompts end in one column, so each step appends one column to one cache.
    batch = prompts.pad([row.ids for row in rows], model.device, [len(row.ids) for row in rows])
    last_position = max(longest, settings.max_tokens) - 1
    steps = max(settings.max_tokens - min(len(row.ids) for row in rows), 0)
    draws_BT = torch.stack([_draws(settings, row.key) for row in rows]).to(model.device)
    ids_BT, mask_BT = batch.ids_BT, batch.mask_BT
    new_BT, positions_BT = ids_BT, batch.positions_BT
    cache = DynamicCache()
    with applied(model, [edits[row.edit] for row in rows]):
        for _ in range(steps):
            hidden_BTD = model.base(
                input_ids=new_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            # Each row takes the draw of its own position, however many prompts are longer.
            # A text that is complete goes on unread, and must not leave the model's positions.
            positions_BT = (positions_BT[:, -1:] + 1).clamp(max=last_position)
            draw_B1 = draws_BT.gather(1, positions_BT.clamp(max=settings.max_tokens - 1))
            new_BT = _sample(model.logits(hidden_BTD[:, -1]), settings.top_k, draw_B1)
            ids_BT = torch.cat([ids_BT, new_BT], dim=1)
            mask_BT = torch.cat([mask_BT, torch.ones_like(new_BT)], dim=1)
    return [
        ids_BT[b, longest - len(row.ids) :][: max(settings.max_tokens, len(row.ids))].tolist()
        for b, row in enumerate(rows)
    ]


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
    """Token ids to raw text, special tokens included (reference code: `generate_fast`)."""
    return list(
        model.tokenizer.batch_decode(
            [list(ids) for ids in texts_ids], clean_up_tokenization_spaces=False
        )
    )


def sample_context_texts(
    model: EditableModel, lengths: Sequence[tuple[int, int]], seed: int
) -> list[str]:
    """Texts sampled from the start token, `count` of each `length` in tokens (start included).

    The reference samples ten of 5 and ten of 10 with top-k 5; the start token is not in the text.
    """
    texts = []
    for length, count in lengths:
        settings = GenerationSettings(max_tokens=length, seed=seed)
        rows = [Start(model.start_ids, 0, (length, i)) for i in range(count)]
        ids = generate(model, rows, [_UNEDITED], settings, token_budget=length * count)
        texts += decode(model, [row[1:] for row in ids])
    return texts


_UNEDITED = Edit(Request("{}", "", ""))
