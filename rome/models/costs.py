"""Settings for each type of device: the one place with numbers that were found by measuring.

docs/performance.md says how. None of them changes a result by more than a rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Costs:
    """Of a type of device."""

    token_budget: int
    """Tokens of a forward pass, beyond which more of them win nothing. On a CPU they leave its
    caches: scoring took 2.6 times as long with 8192 as with 1024."""
    backward: int
    """The cost of a token whose activations are kept, in tokens without. On a GPU the budget is one
    of memory, on a CPU one of the processor's caches."""
    cached: int
    """Tokens in the cache of a decoding for one of a forward pass. On a CPU each step reads all
    weights from memory whatever the rows are, and 320 of them take 1.5 times less each than 80."""
    pass_tokens: int
    """The cost of a pass beside its tokens, in tokens. On two CPU cores 66 tokens take the time of
    140. A GPU, which reads all weights in the time of a thousand tokens, would rather pad."""
    columns: int
    """In decoding, attention reads the cache up to the next multiple of so many columns. Within
    them shapes do not change, so that a step can be captured."""
    leaving: float
    """The share of a batch's edits that must be done for them to leave an optimisation: who leaves
    takes all its neighbours' keys and values through a copy."""
    few_queries: float
    """Queries up to which attention by matmuls is faster than the fused kernel: at any length on a
    CPU. One H200, bfloat16, milliseconds of either: 0.09 and 0.19 (320 rows, 1 query, 104 tokens),
    0.82 and 3.96 (352 rows, 6 queries, 27 tokens, head size 256, with the backward pass), but 0.21
    and 0.06 (128 rows of 64 tokens)."""


COSTS = {
    "cpu": Costs(1024, 1, 32, 80, 1, 0.0, math.inf),
    "cuda": Costs(32_768, 4, 4, 2048, 32, 0.1, 16),
}


def of(device: torch.device) -> Costs:
    return COSTS[device.type]
