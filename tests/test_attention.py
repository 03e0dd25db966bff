"""Attention in pieces, by matmuls and by the kernel for CUDA, equals attention over all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rome.models import attention
from rome.models.attention import Pieces
from tests.support.tiny import close

ROOT = Path(__file__).parents[1]


def made(
    sizes: tuple[int, int, int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values of a pass as one tensor [B, Q, H + 2 G, d], the prefix's keys and
    values [B, G, P, d], and a causal mask that hides some of the prefix."""
    B, H, G, Q, P, d = sizes
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    mask = torch.zeros(B, 1, Q, P + Q, dtype=dtype)
    for b in range(B):
        mask[b, :, :, : min(b, P - 1)] = torch.finfo(dtype).min
    later = torch.arange(Q) > torch.arange(Q)[:, None]
    mask[..., P:].masked_fill_(later, torch.finfo(dtype).min)
    return random(B, Q, H + 2 * G, d), random(B, G, P, d), random(B, G, P, d), mask


SIZES = [(3, 4, 4, 6, 21, 16), (2, 4, 2, 3, 5, 32), (2, 2, 2, 1, 1, 64), (2, 2, 1, 4, 9, 80)]

Way = Callable[[Tensor, Pieces, Pieces, Tensor, float], Tensor]


def outcome(
    sizes: tuple[int, int, int, int, int, int], dtype: torch.dtype, way: Way
) -> tuple[Tensor, Tensor]:
    """The attention of a way, and the gradient of queries, own keys and own values."""
    _, H, G, _, _, d = sizes
    all_BQNd, keys, values, mask = made(sizes, dtype)
    leaf = all_BQNd.requires_grad_()
    query, key, value = (x.transpose(1, 2) for x in leaf.split([H, G, G], dim=2))
    mixed = way(query, Pieces(keys, key), Pieces(values, value), mask, d**-0.5)
    given = torch.linspace(-1, 1, mixed.numel(), dtype=dtype).view(mixed.shape)
    (gradient,) = torch.autograd.grad(mixed, leaf, given)
    return mixed.detach(), gradient


def by_matmuls(query: Tensor, keys: Pieces, values: Pieces, mask: Tensor, scaling: float) -> Tensor:
    return attention._by_matmuls(query, keys, values, mask, scaling, False)


def as_one(query: Tensor, keys: Pieces, values: Pieces, mask: Tensor, scaling: float) -> Tensor:
    repeats = query.shape[1] // keys.own.shape[1]
    key, value = (torch.cat(x, 2).repeat_interleave(repeats, 1) for x in (keys, values))
    scores = query @ key.mT * scaling + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("sizes", SIZES)
def test_pieces_are_attended_to_as_one(sizes: tuple[int, int, int, int, int, int]) -> None:
    found, expected = (outcome(sizes, torch.float64, way) for way in (by_matmuls, as_one))
    assert all(close(a, b, 1e-12) for a, b in zip(found, expected, strict=True))


KERNEL = """
import torch
from tests.test_attention import SIZES, by_matmuls, made, outcome
from tests.support.tiny import close
from rome.models import short_attention

for sizes in SIZES:
    all_BQNd, keys, _, _ = made(sizes, torch.float32)
    assert short_attention.suits(all_BQNd[:, :, : sizes[1]].transpose(1, 2), keys)
    ways = short_attention.attend, by_matmuls
    found, expected = (outcome(sizes, torch.float32, way) for way in ways)
    assert all(close(a, b) for a, b in zip(found, expected, strict=True)), sizes
print("equal")
"""


@pytest.mark.slow
def test_the_kernel_computes_what_matmuls_compute() -> None:
    """Triton's interpreter runs on a CPU; it knows no bfloat16."""
    pytest.importorskip("triton")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "equal\n", done.stderr
