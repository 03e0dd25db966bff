"""The change that an edit makes to a weight, and passes of a model with it.

Legend: B rows, E edits, T tokens, K input size, D output size, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rome.data.records import RecordError, Request
from rome.models import EditableModel


@dataclass(frozen=True)
class LowRankDelta:
    """W' = W + left right^T for a map x_K -> y_D: multiplied out only to be written."""

    left_DR: Tensor
    right_KR: Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        gram = (self.left_DR.T @ self.left_DR) * (self.right_KR.T @ self.right_KR)
        return float(gram.sum().clamp(min=0).sqrt())


@dataclass(frozen=True)
class DenseDelta:
    """W' = W + change for a map x_K -> y_D: [D, K] whatever the layout of the weight.

    A bias is a map from K = 1, whose input is one.
    """

    change_DK: Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return float(self.change_DK.norm())


Delta = LowRankDelta | DenseDelta


def total_norm(deltas: Mapping[str, Delta]) -> float:
    """Frobenius norm of all changes together."""
    return math.hypot(*(delta.norm for delta in deltas.values()))


def refuse_if_not_finite(norm: float) -> None:
    """Raises RecordError where the norm of an edit is none: it holds NaN or infinities."""
    if not math.isfinite(norm):
        raise RecordError("the edit is not finite: it holds NaN or infinities")


@dataclass(frozen=True)
class Edit:
    """A request and the change that an editor made for it.

    `deltas` maps weight names (as in the state dict) to changes; an edit with none leaves the model
    as it is. `health` holds the numbers named `edit_*` in the result row, without that prefix.
    """

    request: Request
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    health: Mapping[str, float] = field(default_factory=dict)


@contextmanager
def applied(model: EditableModel, edits: Sequence[Edit]) -> Iterator[None]:
    """Run every forward pass of the block with row b edited by `edits[b]`.

    Each forward pass must have exactly `len(edits)` rows. No weight is written: a row runs as
    y = W x + left (right^T x) or y = W x + change x, so leaving the block leaves nothing behind.
    """
    with ExitStack() as stack:
        for name in sorted({name for edit in edits for name in edit.deltas}):
            owner, _, kind = name.rpartition(".")
            device = model.hf.get_parameter(name).device
            deltas = _cheapest([edit.deltas.get(name) for edit in edits])
            low_rank = [delta if isinstance(delta, LowRankDelta) else None for delta in deltas]
            dense = [delta if isinstance(delta, DenseDelta) else None for delta in deltas]
            hooks = []
            if any(low_rank):
                hooks.append(_low_rank_hook(low_rank, device))
            if any(dense):
                hooks.append(_dense_hook(dense, device, bias=kind == "bias"))
            for hook in hooks:
                module = model.hf.get_submodule(owner)
                stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def written(model: EditableModel, edit: Edit) -> Iterator[None]:
    """Run the block with an edit's deltas added to the weights in place.

    Computes what `applied` does for one row, at any number of rows; blocks may nest. On leaving,
    the weights hold the very bits that they held before.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for name, delta in edit.deltas.items():
            weight = model.hf.get_parameter(name).detach()
            saved.append((weight, weight.clone()))
            change = dense(delta).T if model.family.transposed else dense(delta)
            wide = torch.promote_types(weight.dtype, change.dtype)
            weight.copy_(weight.to(wide) + change.reshape(weight.shape).to(weight.device, wide))
        yield
    finally:
        for weight, before in reversed(saved):
            weight.copy_(before)


def dense(delta: Delta) -> Tensor:
    """The change of the weight [D, K], multiplied out, in float32 or wider."""
    if isinstance(delta, DenseDelta):
        return delta.change_DK.to(_wide(delta.change_DK))
    dtype = _wide(delta.left_DR)
    return delta.left_DR.to(dtype) @ delta.right_KR.to(dtype).T


def cheapest(delta: Delta) -> Delta:
    """The change as it takes the least memory, and the fewest products a token: as two factors
    below the rank D K / (D + K), which is K / 5 where K is 4 D, and multiplied out above."""
    if isinstance(delta, DenseDelta):
        return delta
    D, (K, R) = len(delta.left_DR), delta.right_KR.shape
    return delta if R * (D + K) < D * K else DenseDelta(dense(delta))


def _cheapest(deltas: Sequence[Delta | None]) -> list[Delta | None]:
    """The same of the deltas of rows; those that are one stay one."""
    distinct = {id(delta): cheapest(delta) for delta in deltas if delta is not None}
    return [None if delta is None else distinct[id(delta)] for delta in deltas]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


_Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


_COPIED = 1024
"""Ranks of all rows together up to which each row has a copy of its factors, which takes the fewest
operators a pass: 84 MB at GPT-J's size."""


def _low_rank_hook(deltas: Sequence[LowRankDelta | None], device: torch.device) -> _Hook:
    rank = max(delta.left_DR.shape[1] for delta in deltas if delta is not None)
    if rank * len(deltas) <= _COPIED:
        return _copied_hook(deltas, device)
    # Else memory is that of the distinct deltas, and of the rows once more.
    blocks = [
        (torch.tensor(rows_EM).flatten().to(device), *_stacked(alike, device))
        for rows_EM, alike in _blocks(deltas)
    ]

    def hook(module: nn.Module, args: tuple[Tensor, ...], y_BTD: Tensor) -> Tensor:
        x_BTK = args[0]
        _check_rows(x_BTK, deltas)
        edited_BTD = y_BTD.clone()
        for rows_B, left_EDR, right_EKR in blocks:
            x_ENK = x_BTK[rows_B].to(right_EKR.dtype).reshape(len(left_EDR), -1, x_BTK.shape[-1])
            change_END = torch.bmm(torch.bmm(x_ENK, right_EKR), left_EDR.mT)
            y_bTD = y_BTD[rows_B]
            edited_BTD[rows_B] = (y_bTD + change_END.view(y_bTD.shape)).to(y_BTD.dtype)
        return edited_BTD

    return hook


def _copied_hook(deltas: Sequence[LowRankDelta | None], device: torch.device) -> _Hook:
    unique = {id(delta): delta for delta in deltas}
    place = {key: e for e, key in enumerate(unique)}
    edit_B = torch.tensor([place[id(delta)] for delta in deltas]).to(device)
    left_BDR, right_BKR = (x[edit_B] for x in _stacked(list(unique.values()), device))

    def hook(module: nn.Module, args: tuple[Tensor, ...], y_BTD: Tensor) -> Tensor:
        x_BTK = args[0]
        _check_rows(x_BTK, deltas)
        change_BTD = torch.bmm(torch.bmm(x_BTK.to(right_BKR.dtype), right_BKR), left_BDR.mT)
        return (y_BTD + change_BTD).to(y_BTD.dtype)

    return hook


def _blocks(
    deltas: Sequence[LowRankDelta | None],
) -> Iterator[tuple[list[list[int]], list[LowRankDelta]]]:
    """The rows of distinct deltas, and these, in blocks of about as many rows and ranks.

    A delta with fewer rows than others of its block has its last one several times.
    """
    rows: dict[int, list[int]] = {}
    for b, delta in enumerate(deltas):
        rows.setdefault(id(delta), []).append(b)
    blocks: dict[tuple[int, int], list[LowRankDelta]] = {}
    for delta in {id(delta): delta for delta in deltas}.values():
        if delta is not None:
            size = len(rows[id(delta)]).bit_length(), delta.left_DR.shape[1].bit_length()
            blocks.setdefault(size, []).append(delta)
    for alike in blocks.values():
        rows_of = [rows[id(delta)] for delta in alike]
        most = max(map(len, rows_of))
        yield [some + some[-1:] * (most - len(some)) for some in rows_of], alike


def _stacked(deltas: Sequence[LowRankDelta | None], device: torch.device) -> tuple[Tensor, Tensor]:
    """Factors [E, D, R] and [E, K, R] of several ranks; None, and what a rank lacks, is zero."""
    some = next(delta for delta in deltas if delta is not None)
    rank = max(delta.left_DR.shape[1] for delta in deltas if delta is not None)
    dtype = _wide(some.left_DR)

    def stack(factors: list[Tensor]) -> Tensor:
        lacks = [rank - factor.shape[1] for factor in factors]
        return torch.stack(
            [nn.functional.pad(f, (0, n)) if n else f for f, n in zip(factors, lacks, strict=True)]
        ).to(device, dtype)

    nothing = LowRankDelta(
        *(factor.new_zeros(len(factor), 0) for factor in (some.left_DR, some.right_KR))
    )
    filled = [nothing if delta is None else delta for delta in deltas]
    return stack([d.left_DR for d in filled]), stack([d.right_KR for d in filled])


def _dense_hook(deltas: Sequence[DenseDelta | None], device: torch.device, bias: bool) -> _Hook:
    rows: dict[int, list[int]] = {}
    for b, delta in enumerate(deltas):
        rows.setdefault(id(delta), []).append(b)
    unique = {id(delta): delta for delta in deltas if delta is not None}
    groups = [
        (torch.tensor(rows[key], device=device), dense(delta).to(device))
        for key, delta in unique.items()
    ]

    def hook(module: nn.Module, args: tuple[Tensor, ...], y_BTD: Tensor) -> Tensor:
        _check_rows(y_BTD, deltas)
        x_BTK = y_BTD.new_ones(*y_BTD.shape[:2], 1) if bias else args[0]
        edited_BTD = y_BTD.clone()
        # One matmul per distinct edit, over its rows alone.
        for rows_b, change_DK in groups:
            change_bTD = x_BTK[rows_b].to(change_DK.dtype) @ change_DK.T
            edited_BTD[rows_b] = (y_BTD[rows_b] + change_bTD).to(y_BTD.dtype)
        return edited_BTD

    return hook


def _check_rows(x_BTK: Tensor, deltas: Sequence[object]) -> None:
    if len(x_BTK) != len(deltas):
        raise ValueError(
            f"a forward pass under `applied` must have one row per edit: "
            f"{len(deltas)} edits, {len(x_BTK)} rows"
        )
