"""What an edit does to a weight, and how a model runs with it.

Legend: B rows, E edits, T tokens, K input size, D output size, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rome.models import EditableModel
from rome.records import Request


@dataclass(frozen=True)
class LowRankDelta:
    """W' = W + left right^T for a map x_K -> y_D: never multiplied out."""

    left_DR: Tensor
    right_KR: Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        gram = (self.left_DR.T @ self.left_DR) * (self.right_KR.T @ self.right_KR)
        return float(gram.sum().clamp(min=0).sqrt())


@dataclass(frozen=True)
class Edit:
    """A request and the change that an editor made for it.

    `deltas` maps weight names (as in the state dict) to changes; an edit with none leaves the model
    as it is. `health` holds the numbers named `edit_*` in the result row, without that prefix.
    """

    request: Request
    deltas: Mapping[str, LowRankDelta] = field(default_factory=dict)
    health: Mapping[str, float] = field(default_factory=dict)


@contextmanager
def applied(model: EditableModel, edits: Sequence[Edit]) -> Iterator[None]:
    """Run every forward pass of the block with row b edited by `edits[b]`.

    Each forward pass must have exactly `len(edits)` rows. No weight is written: a row runs as
    y = W x + left (right^T x), so leaving the block leaves nothing behind.
    """
    with ExitStack() as stack:
        for name in sorted({name for edit in edits for name in edit.deltas}):
            hook = _low_rank_hook(model, [edit.deltas.get(name) for edit in edits])
            module = model.hf.get_submodule(name.removesuffix(".weight"))
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _low_rank_hook(
    model: EditableModel, deltas: Sequence[LowRankDelta | None]
) -> Callable[[torch.nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    some = next(delta for delta in deltas if delta is not None)
    rank = max(delta.left_DR.shape[1] for delta in deltas if delta is not None)
    dtype = torch.promote_types(some.left_DR.dtype, torch.float32)
    # Rows of the same edit share one copy of its factors.
    unique = {id(delta): delta for delta in deltas}
    left_EDR = some.left_DR.new_zeros(len(unique), some.left_DR.shape[0], rank, dtype=dtype)
    right_EKR = some.right_KR.new_zeros(len(unique), some.right_KR.shape[0], rank, dtype=dtype)
    for e, delta in enumerate(unique.values()):
        if delta is not None:
            left_EDR[e, :, : delta.left_DR.shape[1]] = delta.left_DR
            right_EKR[e, :, : delta.right_KR.shape[1]] = delta.right_KR
    place = {key: e for e, key in enumerate(unique)}
    edit_B = [place[id(delta)] for delta in deltas]
    left_BDR, right_BKR = left_EDR[edit_B].to(model.device), right_EKR[edit_B].to(model.device)

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...], y_BTD: Tensor) -> Tensor:
        x_BTK = args[0]
        if len(x_BTK) != len(deltas):
            raise ValueError(
                f"a forward pass under `applied` must have one row per edit: "
                f"{len(deltas)} edits, {len(x_BTK)} rows"
            )
        change_BTD = torch.bmm(torch.bmm(x_BTK.to(dtype), right_BKR), left_BDR.mT)
        return (y_BTD + change_BTD).to(y_BTD.dtype)

    return hook
