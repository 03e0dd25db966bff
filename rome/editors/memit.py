"""MEMIT: many facts, one change of several MLP weights (Meng et al. 2023, Section 4).

Legend: E edits (requests), C contexts, R = C + 1 rows of a request (the last one is the KL prompt),
G groups that are written together, N requests of a group, B rows, T tokens, K key size, D hidden
size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import field, replace

import torch
from torch import Tensor

from rome.data.records import Request
from rome.editors import contexts, values
from rome.editors.contexts import Contexts
from rome.editors.values import Value, ValueSettings
from rome.edits.deltas import Delta, Edit, LowRankDelta, applied, cheapest, total_norm, written
from rome.models import EditableModel, memory, prompts
from rome.models.families import UnsupportedModelError
from rome.models.hooks import hooked
from rome.settings import configurable
from rome.solver import Solver


@configurable(second_moment_weight=(1e-12, 1e12), sampled_contexts=0)
class MemitSettings:
    """Hyperparameters of MEMIT; the defaults are the published ones for GPT-2 XL."""

    layers: tuple[int, ...] = (13, 14, 15, 16, 17)
    """Counted from 0, ascending: each takes its share of what is still missing at the last."""
    second_moment_weight: float = 20_000
    """Lambda: how many tokens the second moment stands for. [mom2_update_weight]"""
    value: ValueSettings = field(default_factory=lambda: ValueSettings(clamp=0.75))
    sampled_contexts: int = 5
    """Number of the run's sampled context templates beside the bare prompt: the last,
    which are the longest. The release has five of length 10."""

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be one or more in ascending order, got {self.layers}")


class Memit:
    """Edits many requests at once, each alone (`edit`) or all of them in one model
    (`edit_together`).

    `templates`: the context templates, the bare `{}` first. `solvers`: of C = E[k k^T] at each of
    the layers. `token_budget`: tokens of a forward pass at most.
    Raises UnsupportedModelError where the MLP's output does not enter the residual stream as it is.
    """

    def __init__(
        self,
        model: EditableModel,
        settings: MemitSettings,
        templates: Sequence[str],
        solvers: Mapping[int, Solver],
        token_budget: int,
    ) -> None:
        if not templates or templates[0] != "{}":
            raise ValueError(f"the first context template must be '{{}}', got {templates[:1]}")
        # There a residual of the stream is none of the weight's output, which is normalised first.
        if hasattr(model.layers[0], "post_feedforward_layernorm"):
            raise UnsupportedModelError(
                f"MEMIT needs MLPs whose output is added as it is, and {model.name} normalises it "
                "first; choose another model or ROME"
            )
        self.model, self.settings, self.solvers = model, settings, solvers
        sampled = templates[1:]
        self.templates = ["{}", *sampled[max(0, len(sampled) - settings.sampled_contexts) :]]
        self.token_budget = token_budget

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        """One edit per request, of rank one in each layer, all computed from the unedited model."""
        if not requests:
            return []
        chosen = [contexts.contexts(self.model, r, self.templates) for r in requests]
        found = self._values(requests, chosen)
        groups = self._insert(requests, chosen, found, together=False)
        edits = []
        for request, value, deltas in zip(requests, found, groups, strict=True):
            health = {
                "steps": len(value.losses),
                "loss": value.losses[-1],
                "norm": total_norm(deltas),
                "init_norm": float(value.initial_D.norm()),
                "delta_norm": float(value.delta_D.norm()),
                "clamp_hits": value.clamp_hits,
            }
            edits.append(Edit(request, deltas, health))
        return edits

    def edit_together(self, requests: Sequence[Request]) -> Edit:
        """One edit for all requests, of rank len(requests) in each layer.

        It carries the last of the requests, and of health the norm alone.
        """
        chosen = [contexts.contexts(self.model, r, self.templates) for r in requests]
        found = self._values(requests, chosen)
        (deltas,) = self._insert(requests, chosen, found, together=True)
        return Edit(requests[-1], deltas, {"norm": total_norm(deltas)})

    def _values(self, requests: Sequence[Request], chosen: Sequence[Contexts]) -> list[Value]:
        """z of each request: the hidden state after the last layer that says the target
        (Equation 16; reference code: `compute_z`).

        The delta is one of the residual stream. Added to the MLP's output it is the same, so this
        is ROME's v* but for the vector that weight decay and clamp are measured by.
        """
        last = self.settings.layers[-1]
        current_ED = self._observe(last, chosen, [Edit(r) for r in requests])[1]

        def optimise(part: Sequence[tuple[Contexts, Tensor]]) -> list[Value]:
            observed = contexts.observe(self.model, last, [one for one, _ in part])
            current_E1D = torch.stack([current_D for _, current_D in part])[:, None]
            stream = replace(observed, output_ERD=current_E1D)
            return values.optimise(self.model, last, stream, self.settings.value)

        items = list(zip(chosen, current_ED, strict=True))
        batches = contexts.batches(chosen, self.token_budget, self.model.device)
        return memory.in_batches(items, batches, optimise)

    def _insert(
        self,
        requests: Sequence[Request],
        chosen: Sequence[Contexts],
        found: Sequence[Value],
        together: bool,
    ) -> list[dict[str, Delta]]:
        """Write the values into one model, or each into its own (Algorithm 1).

        Layer by layer, Delta = R K^T (lambda C + K K^T)^-1, with the keys K and the residuals R of
        the model that has the deltas of the layers before.
        """
        settings, model = self.settings, self.model
        wide = torch.promote_types(model.dtype, torch.float32)
        target_ED = torch.stack([value.initial_D + value.delta_D for value in found])
        size = len(requests) if together else 1
        groups: list[dict[str, Delta]] = [{} for _ in requests[::size]]
        for i, layer in enumerate(settings.layers):
            edits = [Edit(requests[0], groups[e // size]) for e in range(len(requests))]
            keys_EK, current_ED = self._observe(layer, chosen, edits, together)
            residual_ED = (target_ED - current_ED).double() / (len(settings.layers) - i)
            keys_GNK, residual_GND = (
                x.unflatten(0, (-1, size)) for x in (keys_EK.double(), residual_ED)
            )
            adjusted_GNK = self.solvers[layer].solve_with(keys_GNK, settings.second_moment_weight)
            for deltas, left_ND, right_NK in zip(groups, residual_GND, adjusted_GNK, strict=True):
                # Ten thousand facts have a rank beyond the weight's own.
                deltas[model.weight_name(layer)] = cheapest(
                    LowRankDelta(left_ND.T.to(wide, copy=True), right_NK.T.to(wide, copy=True))
                )
        return groups

    @torch.no_grad()
    def _observe(
        self, layer: int, chosen: Sequence[Contexts], edits: Sequence[Edit], together: bool = False
    ) -> tuple[Tensor, Tensor]:
        """At the subject's last token, with `edits[e]`: the key of each request at `layer` [E, K],
        and its hidden state after the last of the layers, in the bare prompt [E, D].

        A key is the mean of the bare prompt's and of the mean over sampled contexts (reference
        code: `compute_ks`, which averages over types of templates first). One edit of all is
        written, because its rank is that of them all.
        """
        model, last, C = self.model, self.settings.layers[-1], len(self.templates)
        rows = [_until_subject(request) for request in chosen]
        lengths = [C * max(map(len, of_request)) for of_request in rows]

        def run(part: Sequence[tuple[list[list[int]], Edit]]) -> list[tuple[Tensor, Tensor]]:
            seen: list[Tensor] = []
            texts = [row for of_request, _ in part for row in of_request]
            padded = prompts.pad(texts, model.device, [len(row) - 1 for row in texts])
            per_row = [] if together else [edit for _, edit in part for _ in range(C)]
            down = model.down_projection(layer)
            with (
                hooked(
                    down.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1])),
                    model.on_leaving(last, lambda hidden_BTD: seen.append(hidden_BTD[::C, -1])),
                ),
                applied(model, per_row),
            ):
                batch = padded.ids_BT, padded.mask_BT, padded.positions_BT
                model.run(*batch, base=model.up_to(last))
            keys_BK, states_ED = seen
            return list(zip(keys_BK.unflatten(0, (-1, C)), states_ED, strict=True))

        with written(model, edits[0]) if together else nullcontext():
            found = memory.in_batches(
                list(zip(rows, edits, strict=True)),
                memory.by_length(lengths, self.token_budget),
                run,
            )
        wide = torch.promote_types(model.dtype, torch.float32)
        keys_ECK, states_ED = (
            torch.stack(x).to(model.device, wide) for x in zip(*found, strict=True)
        )
        bare_EK, sampled_EK = keys_ECK[:, 0], keys_ECK[:, min(1, C - 1) :].mean(1)
        return (bare_EK + sampled_EK) / 2, states_ED


def _until_subject(request: Contexts) -> list[list[int]]:
    """The rows of the contexts, without the KL prompt's, up to the subject's last token: what
    follows changes nothing there."""
    return [row[: p + 1] for row, p in zip(request.rows, request.pivots, strict=True)][:-1]
