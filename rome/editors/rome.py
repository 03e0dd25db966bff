"""ROME: one fact, one rank-one change of one MLP weight (Meng et al. 2022, Section 3.1).

Legend: E edits, C contexts, K key size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Literal

import torch
from torch import Tensor

from rome.data.records import Request
from rome.editors import contexts, values
from rome.editors.contexts import Contexts, Position
from rome.editors.values import ValueSettings, WritingSettings
from rome.edits import regularised
from rome.edits.deltas import Delta, Edit, LowRankDelta, total_norm
from rome.models import EditableModel, memory
from rome.settings import configurable
from rome.solver import Solver


@configurable(layer=0)
class RomeSettings(WritingSettings):
    """Hyperparameters of ROME; the defaults are the published ones for GPT-2 XL."""

    layer: int = 17
    """Counted from 0."""
    value: ValueSettings = field(default_factory=ValueSettings)
    keys: Literal["mixed", "mean", "prompt"] = "mixed"
    """The key k*: `mixed`, the reference's, takes the mean over contexts for the direction
    C^-1 k* but the bare prompt's for the divisor; `mean` (r-ROME, Gupta et al. 2024) and `prompt`
    take one of the two for both."""
    second_moment: bool = True
    """False replaces C by the identity. [mom2_adjustment]"""
    position: Position = "subject_last"
    """The token of the prompt whose MLP is edited. [fact_token]"""


class Rome:
    """Edits many requests in one batch, each exactly as it would be alone.

    `templates`: the context templates, the bare `{}` first. `solver`: of C = E[k k^T] at the
    layer, or None with `second_moment: false`. `token_budget`: tokens of a forward pass at most.
    """

    def __init__(
        self,
        model: EditableModel,
        settings: RomeSettings,
        templates: Sequence[str],
        solver: Solver | None,
        token_budget: int,
    ) -> None:
        if not templates or templates[0] != "{}":
            raise ValueError(f"the first context template must be '{{}}', got {templates[:1]}")
        if settings.second_moment != (solver is not None):
            raise ValueError(
                f"second_moment is {settings.second_moment}, but {'no' if solver is None else 'a'} "
                f"second moment of layer {settings.layer} was given"
            )
        self.model, self.settings = model, settings
        self.templates, self.solver = list(templates), solver
        self.token_budget = token_budget

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        """One edit per request, all computed from the unedited model."""
        position = self.settings.position
        chosen = [contexts.contexts(self.model, r, self.templates, position) for r in requests]
        batches = contexts.batches(chosen, self.token_budget, self.model.device)
        items = list(zip(requests, chosen, strict=True))
        return memory.in_batches(items, batches, lambda part: self._edit(*zip(*part, strict=True)))

    def _edit(self, requests: Sequence[Request], chosen: Sequence[Contexts]) -> list[Edit]:
        model, settings = self.model, self.settings
        observed = contexts.observe(model, settings.layer, chosen)
        C = len(self.templates)
        wide = torch.promote_types(model.dtype, torch.float32)
        keys_ECK = observed.key_ERK[:, :C].to(wide)
        outputs_ECD = observed.output_ERD[:, :C].to(wide)
        bare_EK, mean_EK = keys_ECK[:, 0], keys_ECK.mean(1)

        # C^-1 k*, of unit norm (the left vector of Equation 2).
        u_EK = self._direction(bare_EK if settings.keys == "prompt" else mean_EK)
        # The key whose output becomes v*, and its output now.
        current_EK, current_ED = bare_EK, outputs_ECD[:, 0]
        if settings.keys == "mean":
            current_EK, current_ED = mean_EK, outputs_ECD.mean(1)

        found = values.optimise(model, settings.layer, observed, settings.value, settings.norm)
        # v* = W' k*: Equation 2 with Lambda = (v* - W k*) / (C^-1 k*)^T k*.
        initial_ED = torch.stack([value.initial_D for value in found])
        delta_ED = torch.stack([value.delta_D for value in found])
        divisor_E = (current_EK * u_EK).sum(1)
        lambda_ED = (initial_ED + delta_ED - current_ED) / divisor_E[:, None]

        norms = torch.stack([x.norm(dim=1) for x in (lambda_ED, u_EK, mean_EK)] + [divisor_E])
        name = model.weight_name(settings.layer)
        edits = []
        for e, (change, u, key, divisor) in enumerate(norms.T.tolist()):
            health = {**found[e].health, "divisor": divisor, "norm": change * u, "key_norm": key}
            deltas: dict[str, Delta] = {
                name: LowRankDelta(lambda_ED[e, :, None].clone(), u_EK[e, :, None].clone())
            }
            if found[e].skipped:
                deltas, health["norm"] = {}, 0.0
            elif settings.rect:
                deltas = regularised.rect_all(model, deltas)
                health["norm"] = total_norm(deltas)
            edits.append(Edit(requests[e], deltas, health))
        return edits

    def _direction(self, keys_EK: Tensor) -> Tensor:
        solved_EK = keys_EK if self.solver is None else self.solver.solve(keys_EK)
        unit_EK: Tensor = solved_EK / solved_EK.norm(dim=1, keepdim=True)
        return unit_EK.to(keys_EK.dtype)
