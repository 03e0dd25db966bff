"""Hyperparameters as the released code of ROME and MEMIT names them, as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rome.editors.values import ValueSettings


def value_settings(theirs: Mapping[str, Any]) -> ValueSettings:
    """The settings of v*."""
    return ValueSettings(
        steps=theirs["v_num_grad_steps"],
        learning_rate=theirs["v_lr"],
        weight_decay=theirs["v_weight_decay"],
        kl_factor=theirs["kl_factor"],
        clamp=theirs["clamp_norm_factor"],
    )
