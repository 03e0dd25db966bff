"""Attention by plain matmuls, where queries are few: an optimisation's, a decoded token's.

A fused kernel works in tiles of 64 or 128 queries, and its backward pass takes a cached prefix for
something to differentiate. On a CPU it loses at any length. Registered with transformers.

Legend: B rows, H query heads, G key and value heads, Q queries, T tokens, d head size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.models.gptj.modeling_gptj import GPTJAttention

from rome.models import costs

NAME = "rome"

_log = logging.getLogger(__name__)


class Pieces(NamedTuple):
    """The keys or values of a pass in two parts, each [B, G, T, d]: nothing is copied together."""

    prefix: Tensor
    """Of tokens before the pass; no gradient is asked of them."""
    own: Tensor


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Pieces,
    value: Tensor | Pieces,
    attention_mask: Tensor | None,
    scaling: float,
    wide_scores: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(q k^T * scaling + mask) v: [B, Q, H, d] from query [B, H, Q, d], key and value
    [B, G, T, d] and an additive mask [B, 1, Q, T]; the softmax in float32 or wider.

    `wide_scores`: so are the products of queries and keys.
    """
    if isinstance(key, Pieces):
        assert isinstance(value, Pieces)
        if query.is_cuda and (kernel := short_attention()) and kernel.suits(query, key.prefix):
            assert attention_mask is not None
            return kernel.attend(query, key, value, attention_mask, scaling), None
        return _by_matmuls(query, key, value, attention_mask, scaling, wide_scores), None
    assert not isinstance(value, Pieces)
    few = costs.of(query.device).few_queries
    # The fused kernel keeps its scores wide, matmuls would need wide copies of all keys.
    copies = wide_scores and query.dtype == torch.bfloat16 and not torch.is_grad_enabled()
    if query.shape[2] > few or (copies and few < math.inf):
        mixed, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return mixed, None
    return _by_matmuls(query, (key,), (value,), attention_mask, scaling, wide_scores), None


@cache
def short_attention() -> ModuleType | None:
    """The kernel for pieces, or None, with a warning, where this machine cannot build it."""
    try:
        from rome.models import short_attention as kernel

        with torch.inference_mode(False), torch.enable_grad():
            query, own, prefix = (
                torch.randn(2, 2, n, 16, device="cuda", requires_grad=True) for n in (3, 3, 5)
            )
            mask = torch.zeros(1, 1, 3, 8, device="cuda")
            keys, values = Pieces(prefix.detach(), own), Pieces(prefix.detach() + 1, own)
            found = kernel.attend(query, keys, values, mask, 0.25)
            expected = _by_matmuls(query, keys, values, mask, 0.25, wide_scores=False)
            given = torch.randn_like(expected)
            for one, other in zip(
                (found, *torch.autograd.grad(found, (query, own), given)),
                (expected, *torch.autograd.grad(expected, (query, own), given)),
                strict=True,
            ):
                torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    except Exception as error:  # Triton has as many ways to fail as there are machines.
        _log.warning("attention runs slower, its kernel cannot be used: %s", error, exc_info=True)
        return None
    return kernel


def _by_matmuls(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    attention_mask: Tensor | None,
    scaling: float,
    wide_scores: bool,
) -> Tensor:
    B, H, Q, d = query.shape
    G = keys[0].shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    dtype = wide if wide_scores else query.dtype
    # The heads of a group become more queries of its one key head.
    query_BGQd = (query.to(dtype) * scaling).reshape(B, G, H // G * Q, d)
    found = [torch.matmul(query_BGQd, part.to(dtype).mT) for part in keys]
    scores_BGQT = found[0] if len(found) == 1 else torch.cat(found, -1)
    T = scores_BGQT.shape[-1]
    if attention_mask is not None:
        scores_BGHQT = scores_BGQT.view(B, G, H // G, Q, T) + attention_mask[:, :, None]
        scores_BGQT = scores_BGHQT.view(B, G, -1, T)
    weights_BGQT = scores_BGQT.softmax(-1, dtype=wide).to(values[0].dtype)
    if len(values) == 1:
        mixed_BGQd = torch.matmul(weights_BGQT, values[0])
    else:
        sizes = [part.shape[2] for part in values]
        shares = weights_BGQT.split(sizes, -1)
        first, second = (torch.matmul(w, v) for w, v in zip(shares, values, strict=True))
        mixed_BGQd = first + second
    return mixed_BGQd.view(B, H, Q, d).transpose(1, 2)


def install(hf: PreTrainedModel) -> None:
    """Let a model attend by `attend`."""
    if hf._supports_attention_backend:
        hf.set_attn_implementation(NAME)
        return
    modules: Iterable[Any] = hf.modules()
    for module in modules:
        if isinstance(module, GPTJAttention):
            module.__dict__["_attn"] = partial(_gptj, module)


def _gptj(
    module: GPTJAttention,
    query: Tensor,
    key: Tensor | Pieces,
    value: Tensor | Pieces,
    attention_mask: Tensor | None,
) -> tuple[Tensor, None]:
    """GPT-J's own way in this place, which has no name to register another under."""
    mixed, _ = attend(
        module, query, key, value, attention_mask, 1 / module.scale_attn, wide_scores=True
    )
    return mixed.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, eager_mask)
