"""MEND: gradients, token by token, through a network that learnt what a good edit is.

Mitchell et al. 2022, Section 3.2, as in the published code (eric-mitchell/mend, `GradientTransform`
and `IDMLP`), which adds the transformed gradient to a weight, each with a learnt rate of its own.

Legend: E edits, T tokens, N tokens of all edits, D output size of a weight, K input size of it,
S either of them, R rank of a layer, M weights of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rome.editors.gradients import Factors, Gradient
from rome.edits.deltas import LowRankDelta
from rome.models import EditableModel
from rome.settings import configurable


@configurable(rank=(1, 100_000), hidden_layers=(0, 100))
class MendSettings:
    """The network's shape; the defaults are the published ones for GPT-2 XL."""

    rank: int = 1920
    """Of each layer's matrix; at most its size is used."""
    hidden_layers: int = 1
    edit_rate: float = 1e-4
    """Initial value of the learnt rate of each weight. [edit_lr]"""


class MendNetwork(nn.Module):
    """One transform per weight shape; weights of one shape differ by a scale and a shift."""

    def __init__(self, model: EditableModel, weights: list[str], settings: MendSettings) -> None:
        super().__init__()
        self.weights = weights
        self.places: dict[str, tuple[str, int]] = {}
        self.rates = nn.Parameter(torch.full((len(weights),), settings.edit_rate))
        by_shape: dict[tuple[int, int], list[str]] = {}
        for name in weights:
            by_shape.setdefault(model.sizes(name), []).append(name)
        self.transforms = nn.ModuleDict()
        for (D, K), names in by_shape.items():
            self.transforms[f"{D}x{K}"] = _Transform(D, K, len(names), settings)
            self.places |= {name: (f"{D}x{K}", m) for m, name in enumerate(names)}

    def rate_parameters(self) -> list[nn.Parameter]:
        """Those that have a learning rate of their own in training. [lr_lr]"""
        return [self.rates]

    def normalised(self, gradients: Sequence[Gradient]) -> list[Gradient]:
        """The gradients as `forward` takes them.

        In training, the statistics that normalise them take in those given: all edits of a step.
        """
        normal: list[dict[str, Factors]] = [{} for _ in gradients]
        for name in self.weights:
            transform = self.transforms[self.places[name][0]]
            assert isinstance(transform, _Transform)
            x_NK, delta_ND, counts = _joined(gradients, name)
            x_NK, delta_ND = transform.x_statistics(x_NK), transform.delta_statistics(delta_ND)
            parts = zip(x_NK.split(counts), delta_ND.split(counts), strict=True)
            for factors, part in zip(normal, parts, strict=True):
                factors[name] = Factors(*part)
        return [
            replace(gradient, factors=factors)
            for gradient, factors in zip(gradients, normal, strict=True)
        ]

    def forward(self, gradients: Sequence[Gradient]) -> list[dict[str, LowRankDelta]]:
        """Each edit's change of each weight, of a rank for every token that has a gradient.

        `gradients`: as `normalised` gives them.
        """
        changes: list[dict[str, LowRankDelta]] = [{} for _ in gradients]
        for name, rate in zip(self.weights, self.rates, strict=True):
            shape, m = self.places[name]
            x_NK, delta_ND, counts = _joined(gradients, name)
            x_NK, delta_ND = self.transforms[shape](x_NK, delta_ND, m)
            for change, left_RD, right_RK in zip(
                changes, (rate * delta_ND).split(counts), x_NK.split(counts), strict=True
            ):
                change[name] = LowRankDelta(left_RD.T, right_RK.T)
        return changes


def _joined(gradients: Sequence[Gradient], name: str) -> tuple[Tensor, Tensor, list[int]]:
    """One weight's factors of all edits, and how many tokens are of each."""
    factors = [gradient.factors[name] for gradient in gradients]
    x_NK, delta_ND = (torch.cat([getattr(f, key) for f in factors]) for key in ("x_NK", "delta_ND"))
    return x_NK, delta_ND, [len(f.x_NK) for f in factors]


class _Transform(nn.Module):
    """(x, delta), normalised, to (x', delta'): each through its own network."""

    def __init__(self, D: int, K: int, M: int, settings: MendSettings) -> None:
        super().__init__()
        self.x_statistics, self.delta_statistics = _Statistics(K), _Statistics(D)
        count = settings.hidden_layers + 1
        self.x_layers = nn.ModuleList([_Layer(K, settings.rank, M) for _ in range(count)])
        self.delta_layers = nn.ModuleList([_Layer(D, settings.rank, M) for _ in range(count)])

    def forward(self, x_NK: Tensor, delta_ND: Tensor, m: int) -> tuple[Tensor, Tensor]:
        for layer in self.x_layers:
            x_NK = layer(x_NK, m)
        for layer in self.delta_layers:
            delta_ND = layer(delta_ND, m)
        return x_NK, delta_ND


class _Statistics(nn.Module):
    """Normalises by mean and deviation of all that was seen in training."""

    count: Tensor
    mean_S: Tensor
    squares_S: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean_S", torch.zeros(size))
        self.register_buffer("squares_S", torch.zeros(size))

    def forward(self, values_NS: Tensor) -> Tensor:
        if self.training and len(values_NS):
            self._add(values_NS.detach())
        deviation_S = (self.squares_S / (self.count - 1)).sqrt()
        return (values_NS - self.mean_S) / (deviation_S + 1e-7)

    def _add(self, values_NS: Tensor) -> None:
        N, mean_S = len(values_NS), values_NS.mean(0)
        step_S, total = mean_S - self.mean_S, self.count + N
        self.squares_S += ((values_NS - mean_S) ** 2).sum(0) + step_S**2 * self.count * N / total
        self.mean_S += step_S * N / total
        self.count.copy_(total)


class _Layer(nn.Module):
    """x + max(0, scale * (left right^T x + bias) + shift): the identity until it is trained."""

    def __init__(self, size: int, rank: int, M: int) -> None:
        super().__init__()
        rank = min(rank, size)
        self.left_SR = nn.Parameter(torch.zeros(size, rank))
        self.right_RS = nn.Parameter(torch.randn(rank, size))
        self.bias_S = nn.Parameter(torch.zeros(size))
        self.scale_MS = nn.Parameter(torch.ones(M, size))
        self.shift_MS = nn.Parameter(torch.zeros(M, size))

    def forward(self, x_NS: Tensor, m: int) -> Tensor:
        inner_NS = x_NS @ self.right_RS.T @ self.left_SR.T + self.bias_S
        # Not relu, whose gradient at 0, where all of this starts, is 0.
        return x_NS + (inner_NS * self.scale_MS[m] + self.shift_MS[m]).clamp(min=0)
