"""Attention of a few queries against a prefix and themselves, as one kernel each way on CUDA.

Plain matmuls read and write every score and gradient many times, and a fused kernel of torch
copies prefix and own keys together and differentiates both. Here a program of the GPU holds all
that a row's head attends to. Written in Triton, which comes with torch for CUDA.

Legend: B rows, H query heads, G key and value heads, Q queries, P tokens of the prefix, d head
size.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rome.models.attention import Pieces

_MOST_QUERIES = 16
_MOST_NUMBERS = 1 << 14
"""Of the prefix's keys of a row's head."""


def suits(query_BHQd: Tensor, prefix_BGPd: Tensor) -> bool:
    """True if a row's head fits into a program."""
    P, d = prefix_BGPd.shape[2:]
    return (
        query_BHQd.shape[2] <= _MOST_QUERIES
        and P >= 1
        and _tile_size(P) * _tile_size(d) <= _MOST_NUMBERS
        and query_BHQd.dtype in (torch.float32, torch.bfloat16)
    )


def _tile_size(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


# No program of its own for each number of tokens.
_VARIED = ["mask_b", "mask_q", "Q", "P"]


@triton.jit
def _tile(pointer, rows, stride, n, d: tl.constexpr, D: tl.constexpr):
    columns = tl.arange(0, D)
    inside = (rows[:, None] < n) & (columns[None, :] < d)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _shares(q, k, pk, mask, mask_q, rows, before, Q, P, scale, EXACT: tl.constexpr):
    """exp(scores) of both parts over their sum: [rows, rows] and [rows, before] in float32."""
    nothing: tl.constexpr = float("-inf")
    real = rows[:, None] < Q
    s = tl.dot(q, tl.trans(k), input_precision=EXACT) * scale
    at = mask + rows[:, None] * mask_q + P + rows[None, :]
    visible = real & (rows[None, :] < Q)
    s = tl.where(visible, s + tl.load(at, mask=visible, other=0.0).to(tl.float32), nothing)
    ps = tl.dot(q, tl.trans(pk), input_precision=EXACT) * scale
    at = mask + rows[:, None] * mask_q + before[None, :]
    visible = real & (before[None, :] < P)
    ps = tl.where(visible, ps + tl.load(at, mask=visible, other=0.0).to(tl.float32), nothing)
    top = tl.maximum(tl.max(s, 1), tl.max(ps, 1))
    top = tl.where(rows < Q, top, 0.0)
    s, ps = tl.exp(s - top[:, None]), tl.exp(ps - top[:, None])
    total = tl.sum(s, 1) + tl.sum(ps, 1)
    total = tl.where(rows < Q, total, 1.0)
    return s / total[:, None], ps / total[:, None]


@triton.jit(do_not_specialize=_VARIED)
def _forward(
    q, k, v, pk, pv, mask, out,
    q_b, q_h, q_q, k_b, k_h, k_q, v_b, v_h, v_q,
    pk_b, pk_h, pk_p, pv_b, pv_h, pv_p, mask_b, mask_q, o_b, o_h, o_q,
    Q, P, scale, G,
    REPEATS: tl.constexpr, d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BEFORE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    b, g = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    rows, before, columns = tl.arange(0, ROWS), tl.arange(0, BEFORE), tl.arange(0, D)
    inside = (rows[:, None] < Q) & (columns[None, :] < d)
    own_k = _tile(k + b * k_b + g * k_h, rows, k_q, Q, d, D)
    own_v = _tile(v + b * v_b + g * v_h, rows, v_q, Q, d, D)
    prefix_k = _tile(pk + b * pk_b + g * pk_h, before, pk_p, P, d, D)
    prefix_v = _tile(pv + b * pv_b + g * pv_h, before, pv_p, P, d, D)
    for i in tl.static_range(REPEATS):
        h = g * REPEATS + i
        own_q = _tile(q + b * q_b + h * q_h, rows, q_q, Q, d, D)
        share, before_share = _shares(
            own_q, own_k, prefix_k, mask + b * mask_b, mask_q, rows, before, Q, P, scale, EXACT
        )  # fmt: skip
        mixed = tl.dot(share.to(own_v.dtype), own_v, input_precision=EXACT)
        mixed += tl.dot(before_share.to(own_v.dtype), prefix_v, input_precision=EXACT)
        at = out + b * o_b + h * o_h + rows[:, None] * o_q + columns[None, :]
        tl.store(at, mixed.to(own_v.dtype), mask=inside)


@triton.jit(do_not_specialize=_VARIED)
def _backward(
    q, k, v, pk, pv, mask, g_out, gq, gk, gv,
    q_b, q_h, q_q, k_b, k_h, k_q, v_b, v_h, v_q,
    pk_b, pk_h, pk_p, pv_b, pv_h, pv_p, mask_b, mask_q, o_b, o_h, o_q,
    gq_b, gq_h, gq_q, gk_b, gk_h, gk_q,
    Q, P, scale, G,
    REPEATS: tl.constexpr, d: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    BEFORE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    b, g = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
    rows, before, columns = tl.arange(0, ROWS), tl.arange(0, BEFORE), tl.arange(0, D)
    inside = (rows[:, None] < Q) & (columns[None, :] < d)
    own_k = _tile(k + b * k_b + g * k_h, rows, k_q, Q, d, D)
    own_v = _tile(v + b * v_b + g * v_h, rows, v_q, Q, d, D)
    prefix_k = _tile(pk + b * pk_b + g * pk_h, before, pk_p, P, d, D)
    prefix_v = _tile(pv + b * pv_b + g * pv_h, before, pv_p, P, d, D)
    all_k = tl.zeros([ROWS, D], tl.float32)
    all_v = tl.zeros([ROWS, D], tl.float32)
    for i in tl.static_range(REPEATS):
        h = g * REPEATS + i
        own_q = _tile(q + b * q_b + h * q_h, rows, q_q, Q, d, D)
        share, before_share = _shares(
            own_q, own_k, prefix_k, mask + b * mask_b, mask_q, rows, before, Q, P, scale, EXACT
        )  # fmt: skip
        g_mixed = _tile(g_out + b * o_b + h * o_h, rows, o_q, Q, d, D)
        all_v += tl.dot(tl.trans(share.to(own_v.dtype)), g_mixed, input_precision=EXACT)
        g_share = tl.dot(g_mixed, tl.trans(own_v), input_precision=EXACT)
        g_before = tl.dot(g_mixed, tl.trans(prefix_v), input_precision=EXACT)
        mean = tl.sum(g_share * share, 1) + tl.sum(g_before * before_share, 1)
        g_s = (share * (g_share - mean[:, None]) * scale).to(own_k.dtype)
        g_ps = (before_share * (g_before - mean[:, None]) * scale).to(own_k.dtype)
        of_q = tl.dot(g_s, own_k, input_precision=EXACT)
        of_q += tl.dot(g_ps, prefix_k, input_precision=EXACT)
        all_k += tl.dot(tl.trans(g_s), own_q, input_precision=EXACT)
        at = gq + b * gq_b + h * gq_h + rows[:, None] * gq_q + columns[None, :]
        tl.store(at, of_q.to(own_k.dtype), mask=inside)
    at = b * gk_b + g * gk_h + rows[:, None] * gk_q + columns[None, :]
    tl.store(gk + at, all_k.to(own_k.dtype), mask=inside)
    tl.store(gv + at, all_v.to(own_k.dtype), mask=inside)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _strides_in(*given: Tensor) -> list[int]:
    """Of what both ways are given; all rows share a mask of one."""
    *tensors, mask = given
    return [*_strides(*tensors), mask.stride(0) if len(mask) > 1 else 0, mask.stride(2)]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        mask: Tensor,
        scale: float,
    ) -> Tensor:
        query, key, value, prefix_key, prefix_value = (
            x if x.stride(3) == 1 else x.contiguous()
            for x in (query, key, value, prefix_key, prefix_value)
        )
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, mask)
        ctx.scale = scale
        B, H, Q, d = query.shape
        out_BQHd = query.new_empty(B, Q, H, d)
        out = out_BQHd.transpose(1, 2)
        given = query, key, value, prefix_key, prefix_value, mask
        with torch.cuda.device_of(query):
            _forward[(B * key.shape[1],)](
                *given, out, *_strides_in(*given), *_strides(out),
                Q, prefix_key.shape[2], scale, key.shape[1], **_sizes(query, key, prefix_key),
            )  # fmt: skip
        return out_BQHd

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        query, key, _, prefix_key, *_ = given
        (B, H, Q, d), G = query.shape, key.shape[1]
        of_out = gradients[0].contiguous().transpose(1, 2)
        of_query = query.new_empty(B, Q, H, d).transpose(1, 2)
        of_key, of_value = (query.new_empty(B, Q, G, d).transpose(1, 2) for _ in range(2))
        with torch.cuda.device_of(query):
            _backward[(B * G,)](
                *given, of_out, of_query, of_key, of_value,
                *_strides_in(*given), *_strides(of_out, of_query, of_key),
                Q, prefix_key.shape[2], ctx.scale, G, **_sizes(query, key, prefix_key),
            )  # fmt: skip
        return of_query, of_key, of_value, None, None, None, None


def _sizes(query: Tensor, key: Tensor, prefix_key: Tensor) -> dict[str, Any]:
    exact, D = torch.get_float32_matmul_precision() == "highest", _tile_size(query.shape[3])
    return {
        "REPEATS": query.shape[1] // key.shape[1],
        "d": query.shape[3],
        "D": D,
        "ROWS": _MOST_QUERIES,
        "BEFORE": _tile_size(prefix_key.shape[2]),
        "EXACT": "ieee" if exact else "tf32",
        # Of one to four, on an H200: 0.69 ms forth and back with one, 0.90 and 0.86 with more.
        "num_warps": 1 if D <= 64 else 4,
    }


def attend(query: Tensor, keys: Pieces, values: Pieces, mask: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale + mask) v: [B, Q, H, d] from query [B, H, Q, d], keys and values of
    a prefix [B, G, P, d] and its own [B, G, Q, d], and an additive mask [B or 1, 1, Q, P + Q].

    Differentiable but for the prefix and the mask; scores in float32.
    """
    mixed: Tensor = _Attention.apply(
        query, keys.own, values.own, keys.prefix, values.prefix, mask, scale
    )
    return mixed
