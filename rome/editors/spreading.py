"""Facts spread over several layers: what MEMIT (Meng et al. 2023, Section 4) and AlphaEdit share.

Legend: E edits (requests), C contexts, R = C + 1 rows of a request (the last one is the KL prompt),
G groups that are written together, N requests of a group, B rows, T tokens, K key size, D hidden
size.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import field
from typing import Literal, Self

import torch
from torch import Tensor

from rome.data.records import Request
from rome.editors import contexts, values
from rome.editors.contexts import Contexts
from rome.editors.history import History
from rome.editors.values import Value, ValueSettings, WritingSettings
from rome.edits import regularised
from rome.edits.deltas import Delta, Edit, LowRankDelta, applied, cheapest, total_norm, written
from rome.models import EditableModel, memory, prompts
from rome.models.families import UnsupportedModelError
from rome.models.hooks import hooked
from rome.settings import configurable


@configurable(sampled_contexts=0)
class SpreadingSettings(WritingSettings):
    """The hyperparameters that MEMIT and AlphaEdit share; the defaults are those of GPT-2 XL."""

    layers: tuple[int, ...] = (13, 14, 15, 16, 17)
    """Counted from 0, ascending: each takes its share of what is still missing at the last."""
    value: ValueSettings = field(default_factory=lambda: ValueSettings(clamp=0.75))
    sampled_contexts: int = 5
    """Number of the run's sampled context templates beside the bare prompt: the last,
    which are the longest. The release has five of length 10."""
    keys: Literal["published", "mean"] = "published"
    """A key is a mean over contexts. `published`: the bare prompt weighs half and the sampled ones
    together the other half, as in the released code. `mean`: all weigh the same, as in the
    paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be one or more in ascending order, got {self.layers}")


class Spreading(ABC):
    """Edits many requests at once, each alone (`edit`) or all of them in one model
    (`edit_together`).

    `templates`: the context templates, the bare `{}` first. `token_budget`: tokens of a forward
    pass at most. Raises UnsupportedModelError where the MLP's output does not enter the residual
    stream as it is.
    """

    settings: SpreadingSettings

    def __init__(
        self,
        model: EditableModel,
        settings: SpreadingSettings,
        templates: Sequence[str],
        token_budget: int,
    ) -> None:
        if not templates or templates[0] != "{}":
            raise ValueError(f"the first context template must be '{{}}', got {templates[:1]}")
        # There a residual of the stream is none of the weight's output, which is normalised first.
        if hasattr(model.layers[0], "post_feedforward_layernorm"):
            raise UnsupportedModelError(
                f"{type(self).__name__} needs MLPs whose output is added as it is, and "
                f"{model.name} normalises it first; choose another model or ROME"
            )
        self.model, self.settings = model, settings
        sampled = templates[1:]
        self.templates = ["{}", *sampled[max(0, len(sampled) - settings.sampled_contexts) :]]
        self.token_budget = token_budget
        self._known: tuple[Tensor, int] | None = None

    def values(self, requests: Sequence[Request]) -> list[Value]:
        """z of each request, found alone: several workers may share those of a batch."""
        return self._values(requests, self._contexts(requests))

    def with_values(self, target_ED: Tensor, skipped: int) -> Self:
        """Give the same editor for one batch whose values z are known; `skipped` by NAS."""
        other = copy.copy(self)
        wide = torch.promote_types(self.model.dtype, torch.float32)
        other._known = target_ED.to(self.model.device, wide), skipped
        return other

    @abstractmethod
    def _adjusted(self, layer: int, keys_GNK: Tensor, past: History | None) -> Tensor:
        """The right factors [G, N, K] of a layer's change, float64: what the residuals of the keys
        are multiplied with, so that a change is sum over n of residual_n adjusted_n^T."""

    def _own_health(self) -> dict[str, float]:
        """Numbers for the health of every edit."""
        return {}

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        """One edit per request, of rank one in each layer, all computed from the unedited model."""
        if not requests:
            return []
        chosen = self._contexts(requests)
        found = self._values(requests, chosen)
        groups = self._insert(requests, chosen, _targets(found), together=False)
        return [
            self._edit(request, deltas if not value.skipped else {}, value.health)
            for request, value, deltas in zip(requests, found, groups, strict=True)
        ]

    def edit_together(self, requests: Sequence[Request]) -> Edit:
        """One edit for all requests, of rank len(requests) in each layer.

        It carries the last of the requests, and of health the norm and what was skipped alone.
        """
        return self._edit_together(requests)[0]

    def _edit_together(
        self, requests: Sequence[Request], past: Mapping[int, History] | None = None
    ) -> tuple[Edit, list[Contexts]]:
        chosen = self._contexts(requests)
        if self._known is not None:
            target_ED, skipped = self._known
        else:
            found = self._values(requests, chosen)
            target_ED, skipped = _targets(found), sum(value.skipped for value in found)
        (deltas,) = self._insert(requests, chosen, target_ED, together=True, past=past)
        return self._edit(requests[-1], deltas, {"skipped": skipped}), chosen

    def _contexts(self, requests: Sequence[Request]) -> list[Contexts]:
        return [contexts.contexts(self.model, r, self.templates) for r in requests]

    def _edit(
        self, request: Request, deltas: Mapping[str, Delta], health: Mapping[str, float]
    ) -> Edit:
        if self.settings.rect:
            deltas = regularised.rect_all(self.model, deltas)
        own = {"norm": total_norm(deltas), **self._own_health()}
        return Edit(request, deltas, {**health, **own})

    def _values(self, requests: Sequence[Request], chosen: Sequence[Contexts]) -> list[Value]:
        """z of each request: the hidden state after the last layer that says the target
        (Meng et al. 2023, Equation 16; reference code: `compute_z`).

        The delta is one of the residual stream. Added to the MLP's output it is the same, so this
        is ROME's v* but for the vector that weight decay and clamp are measured by.
        """
        settings, last = self.settings, self.settings.layers[-1]
        current_ED = self._observe(last, chosen, [Edit(r) for r in requests])[1]

        def optimise(part: Sequence[tuple[Contexts, Tensor]]) -> list[Value]:
            observed = contexts.observe(self.model, last, [one for one, _ in part])
            start_ED = torch.stack([current_D for _, current_D in part])
            return values.optimise(
                self.model, last, observed, settings.value, settings.norm, start_ED
            )

        items = list(zip(chosen, current_ED, strict=True))
        batches = contexts.batches(chosen, self.token_budget, self.model.device)
        return memory.in_batches(items, batches, optimise)

    def _insert(
        self,
        requests: Sequence[Request],
        chosen: Sequence[Contexts],
        target_ED: Tensor,
        together: bool,
        past: Mapping[int, History] | None = None,
    ) -> list[dict[str, Delta]]:
        """Write the values Z into one model, or each into its own (Meng et al. 2023, Algorithm 1).

        Layer by layer, with the keys K and the residuals R of the model that has the deltas of the
        layers before: R = (Z - the state now after the last layer) / layers left.
        """
        settings, model = self.settings, self.model
        wide = torch.promote_types(model.dtype, torch.float32)
        size = len(requests) if together else 1
        groups: list[dict[str, Delta]] = [{} for _ in requests[::size]]
        for i, layer in enumerate(settings.layers):
            edits = [Edit(requests[0], groups[e // size]) for e in range(len(requests))]
            keys_EK, current_ED = self._observe(layer, chosen, edits, together)
            residual_ED = (target_ED - current_ED).double() / (len(settings.layers) - i)
            keys_GNK, residual_GND = (
                x.unflatten(0, (-1, size)) for x in (keys_EK.double(), residual_ED)
            )
            adjusted_GNK = self._adjusted(layer, keys_GNK, None if past is None else past[layer])
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
        code: `compute_ks`, which averages over types of templates first), unless the settings ask
        for that of all. One edit of all is written, because its rank is that of them all.
        """
        model, last, C = self.model, self.settings.layers[-1], len(self.templates)
        wide = torch.promote_types(model.dtype, torch.float32)
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
            # Of ten thousand facts, the keys of all contexts are several times those that count.
            keys_ECK = keys_BK.unflatten(0, (-1, C)).to(wide)
            keys_EK = keys_ECK.mean(1)
            if self.settings.keys != "mean":
                bare_EK, sampled_EK = keys_ECK[:, 0], keys_ECK[:, min(1, C - 1) :].mean(1)
                keys_EK = (bare_EK + sampled_EK) / 2
            return list(zip(keys_EK, states_ED, strict=True))

        with written(model, edits[0]) if together else nullcontext():
            found = memory.in_batches(
                list(zip(rows, edits, strict=True)),
                memory.by_length(lengths, self.token_budget),
                run,
            )
        keys_EK, states_ED = (
            torch.stack(x).to(model.device, wide) for x in zip(*found, strict=True)
        )
        return keys_EK, states_ED


class Remembering(Spreading):
    """Adds a history: keys that earlier batches of a chain wrote are to keep their values."""

    @abstractmethod
    def _most_keys(self, layer: int) -> float:
        """The number of keys from which on their sum H is carried instead of themselves."""

    def begin(self) -> dict[str, Tensor]:
        """The state before the first batch: no keys."""
        wide = torch.promote_types(self.model.dtype, torch.float32)
        state: dict[str, Tensor] = {}
        for layer in self.settings.layers:
            _, K = self.model.sizes(self.model.weight_name(layer))
            state |= History(torch.zeros(0, K, dtype=wide)).named(layer)
        return state

    def edit_batch(
        self, requests: Sequence[Request], state: Mapping[str, Tensor]
    ) -> tuple[Edit, dict[str, Tensor]]:
        """One edit of all requests that keeps what earlier batches wrote, and the state with its
        keys, of the model with all layers edited; they are never refreshed by later batches."""
        past = {layer: History.of(state, layer) for layer in self.settings.layers}
        edit, chosen = self._edit_together(requests, past)
        after: dict[str, Tensor] = {}
        for layer, before in past.items():
            keys_NK, _ = self._observe(layer, chosen, [edit] * len(chosen), together=True)
            after |= before.followed_by(keys_NK, self._most_keys(layer)).named(layer)
        return edit, after


def _targets(found: Sequence[Value]) -> Tensor:
    return torch.stack([value.target for value in found])


def _until_subject(request: Contexts) -> list[list[int]]:
    """The rows of the contexts, without the KL prompt's, up to the subject's last token: what
    follows changes nothing there."""
    return [row[: p + 1] for row, p in zip(request.rows, request.pivots, strict=True)][:-1]
