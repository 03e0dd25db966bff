"""Changes of a weight, kept small beside it: RECT of each edit, PRUNE of all edits of a chain.

Legend: D output size, K input size of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rome.edits.deltas import Delta, DenseDelta, dense
from rome.models import EditableModel

KEPT = 0.4
"""The share of a change's elements that RECT keeps, as published."""


def rect(weight_DK: Tensor, change_DK: Tensor, kept: float = KEPT) -> Tensor:
    """The change [D, K] with nothing but the share `kept` of its elements that are largest in
    |change / (W + 1e-8)|, W being the weight before the change (Gu et al. 2024, RECT).

    Elements that tie with the last one kept are kept as well.
    """
    ratio_DK = (change_DK / (weight_DK.to(change_DK) + 1e-8)).abs()
    dropped = round((1 - kept) * ratio_DK.numel())
    if dropped == 0:
        return change_DK
    least = ratio_DK.flatten().kthvalue(min(dropped + 1, ratio_DK.numel())).values
    return torch.where(ratio_DK >= least, change_DK, 0)


def rect_all(model: EditableModel, deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """RECT of each of an edit's changes, beside the weights as they are in the model now."""
    found: dict[str, Delta] = {}
    for name, delta in deltas.items():
        change_DK = dense(delta)
        found[name] = DenseDelta(rect(model.weight(name).to(change_DK), change_DK))
    return found


def pruned(weight_DK: Tensor, change_DK: Tensor) -> Tensor:
    """The total change [D, K] of a chain with its large singular values damped (Ma et al. 2025,
    PRUNE): s > s_max, the largest of the unedited weight, becomes log s - log s_max + s_max.

    The unedited weight plus this is the edited one. The published code adds the damped change to
    weights that are edited already, so that it counts twice; this is what the paper says. Where
    s_max < 1 the formula may exceed s, which is then kept: a restraint never enlarges.
    """
    wide = torch.promote_types(change_DK.dtype, torch.float32)
    largest = torch.linalg.matrix_norm(weight_DK.to(change_DK.device, wide), 2)
    left_DR, values_R, right_RK = torch.linalg.svd(change_DK.to(wide), full_matrices=False)
    if values_R[0] <= largest:
        return change_DK
    damped_R = (values_R.log() - largest.log() + largest).minimum(values_R)
    damped_R = torch.where(values_R > largest, damped_R, values_R)
    return (left_DR * damped_R) @ right_RK
