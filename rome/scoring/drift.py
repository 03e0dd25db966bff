"""How far edits moved a model on text that none of them is about.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rome.models import EditableModel, memory, prompts

_TOKENS = 1024
"""Tokens of a forward pass at most: their logits are all wanted at once."""


@dataclass(frozen=True)
class Reading:
    """A model's reading of texts: the mean negative log-likelihood (natural log) of their tokens
    but the first of each, and the token that is the likeliest in the place of each of these."""

    nll: float
    likeliest: tuple[int, ...]


def read(model: EditableModel, texts: Sequence[Sequence[int]], token_budget: int) -> Reading:
    """Read texts, which are token ids, at least two each.

    Raises ValueError where one is shorter.
    """
    if short := [list(ids) for ids in texts if len(ids) < 2]:
        raise ValueError(f"a text that is read must have at least two tokens, got {short[0]}")
    batches = memory.by_length([len(ids) for ids in texts], min(token_budget, _TOKENS))
    found = memory.in_batches(texts, batches, lambda some: _read(model, some))
    nlls = [nll for row, _ in found for nll in row]
    return Reading(math.fsum(nlls) / len(nlls), tuple(token for _, said in found for token in said))


@torch.inference_mode()
def _read(
    model: EditableModel, texts: Sequence[Sequence[int]]
) -> list[tuple[list[float], list[int]]]:
    batch = prompts.pad(texts, model.device)
    hidden_BTD = model.run(batch.ids_BT, batch.mask_BT, batch.positions_BT)
    log_p_BTV = model.logits(hidden_BTD[:, :-1]).log_softmax(-1)
    nll_BT = -log_p_BTV.gather(-1, batch.ids_BT[:, 1:, None])[..., 0]
    rows = zip(texts, nll_BT.tolist(), log_p_BTV.argmax(-1).tolist(), strict=True)
    return [(nll[: len(ids) - 1], said[: len(ids) - 1]) for ids, nll, said in rows]


def drift(unedited: Reading, edited: Reading) -> dict[str, float]:
    """`perplexity` and `perplexity_unedited`, exp of the mean negative log-likelihood, and
    `agreement`: the share of places where both models say the same token is the likeliest."""
    pairs = zip(unedited.likeliest, edited.likeliest, strict=True)
    return {
        "perplexity": _perplexity(edited.nll),
        "perplexity_unedited": _perplexity(unedited.nll),
        "agreement": sum(a == b for a, b in pairs) / len(unedited.likeliest),
    }


def _perplexity(nll: float) -> float:
    return math.exp(nll) if nll < math.log(1e300) else math.inf
