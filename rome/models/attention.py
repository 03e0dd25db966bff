"""Attention by plain matmuls, for few queries against a short cache on a CPU.

There the fused kernel's backward pass costs half of all time of an edit, and heads that share keys
and values (grouped-query attention) are first copied. Registered with transformers as `grouped`.

Legend: B rows, H query heads, G key and value heads, Q queries, T tokens, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "grouped"


def grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T / sqrt(d) + mask) v: [B, Q, H, d] from query [B, H, Q, d], key and value
    [B, G, T, d] and an additive mask [B, 1, Q, T]; the softmax in float32 or wider."""
    B, H, Q, d = query.shape
    G, T = key.shape[1:3]
    scale = d**-0.5 if scaling is None else scaling
    # The heads of a group become more queries of its one key head.
    query_BGQd = (query * scale).reshape(B, G, H // G * Q, d)
    scores_BGHQT = torch.matmul(query_BGQd, key.mT).view(B, G, H // G, Q, T)
    if attention_mask is not None:
        scores_BGHQT = scores_BGHQT + attention_mask[:, :, None]
    wide = torch.promote_types(query.dtype, torch.float32)
    weights_BGHQT = scores_BGHQT.softmax(-1, dtype=wide).to(value.dtype)
    mixed_BGQd = torch.matmul(weights_BGHQT.view(B, G, -1, T), value)
    return mixed_BGQd.view(B, H, Q, d).transpose(1, 2), None


AttentionInterface.register(NAME, grouped)
AttentionMaskInterface.register(NAME, eager_mask)
