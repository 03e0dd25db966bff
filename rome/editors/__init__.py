"""Editors: a batch of requests in, one edit per request out.

The registry maps the name that configs use to settings and to a function that builds the editor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch

from rome.data.records import Request
from rome.editors.alphaedit import AlphaEdit, AlphaEditSettings
from rome.editors.fine_tuning import (
    AttentionSettings,
    ConstrainedSettings,
    FineTuning,
    FineTuningSettings,
)
from rome.editors.hypernetwork import HypernetworkEditor, HypernetworkSettings, load
from rome.editors.knowledge_neurons import KnowledgeNeurons, KnowledgeNeuronsSettings
from rome.editors.lora import Lora, LoraSettings
from rome.editors.memit import Memit, MemitSettings, MemitWithHistory
from rome.editors.rome import Rome, RomeSettings
from rome.editors.ultraedit import UltraEdit, UltraEditSettings
from rome.editors.values import Value
from rome.edits.deltas import Edit
from rome.models import EditableModel
from rome.settings import configurable
from rome.solver import Solver


class Editor(Protocol):
    """Computes each edit from the unedited model, exactly as if it were the only one."""

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        """One edit per request, in order."""
        ...


@runtime_checkable
class JointEditor(Editor, Protocol):
    """An editor that can also write many facts into one model."""

    def edit_together(self, requests: Sequence[Request]) -> Edit:
        """One edit for all requests, computed from the unedited model; it carries the last one."""
        ...


State = Mapping[str, torch.Tensor]
"""The tensors that an editor carries from batch to batch of a chain, under names that one file can
hold (`layer.5.keys`); in their dtypes, on any device."""


@runtime_checkable
class ChainEditor(Protocol):
    """An editor that carries a state through a chain of batches."""

    def begin(self) -> State:
        """The state before the first batch, of the unedited model."""
        ...

    def edit_batch(self, requests: Sequence[Request], state: State) -> tuple[Edit, State]:
        """One edit of all requests, and the state for the next batch.

        The model has the edits of earlier batches written in its weights, and the deltas are
        relative to these.
        """
        ...


@runtime_checkable
class ValueEditor(Protocol):
    """An editor whose edit of many requests begins with a value for each, which is found alone."""

    def values(self, requests: Sequence[Request]) -> list[Value]:
        """The value of each request, in order."""
        ...

    def with_values(self, target_ED: torch.Tensor, skipped: int) -> Self:
        """Give the same editor for one batch whose values are known; `skipped` by NAS."""
        ...


@dataclass(frozen=True)
class Resources:
    """The resources that editors share, made once per run."""

    model: EditableModel
    templates: Sequence[str]
    solver: Callable[[int], Solver]
    """The solver of C = E[k k^T] at a layer."""
    token_budget: int
    """Tokens of a forward pass at most; a matter of memory and speed alone."""
    weights: Callable[[str], Path] = Path
    """The file of the trained weights that an editor's settings name."""


class Unedited:
    """The unedited model as an editor: `none`."""

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        return [Edit(request) for request in requests]


@configurable()
class NoSettings:
    """The unedited model has nothing to set."""


@dataclass(frozen=True)
class Kind:
    """A registered editor: the type of its settings and how it is built from them."""

    settings: type
    build: Callable[[Resources, Any], Editor]
    second_moments: Callable[[Any], list[int]] = lambda settings: []
    """The layers whose C = E[k k^T] it needs under these settings."""
    trained: Callable[[Any], str | None] = lambda settings: None
    """The name of the trained weights that it needs under these settings."""
    values: bool = False
    """It is a ValueEditor."""


def _rome(resources: Resources, settings: RomeSettings) -> Rome:
    solver = resources.solver(settings.layer) if settings.second_moment else None
    return Rome(resources.model, settings, resources.templates, solver, resources.token_budget)


def _fine_tuning(resources: Resources, settings: FineTuningSettings) -> FineTuning:
    return FineTuning(resources.model, settings, resources.token_budget)


def _hypernetwork(kind: str) -> Kind:
    def built(resources: Resources, settings: HypernetworkSettings) -> HypernetworkEditor:
        network = load(resources.weights(settings.weights), resources.model, kind)
        return HypernetworkEditor(resources.model, network, resources.token_budget)

    return Kind(HypernetworkSettings, built, trained=lambda settings: settings.weights)


def _kn(resources: Resources, settings: KnowledgeNeuronsSettings) -> KnowledgeNeurons:
    return KnowledgeNeurons(resources.model, settings, resources.token_budget)


def _memit(resources: Resources, settings: MemitSettings) -> Memit:
    solvers = {layer: resources.solver(layer) for layer in settings.layers}
    kind = MemitWithHistory if settings.history else Memit
    return kind(resources.model, settings, resources.templates, solvers, resources.token_budget)


def _alphaedit(resources: Resources, settings: AlphaEditSettings) -> AlphaEdit:
    solvers = {layer: resources.solver(layer) for layer in settings.layers}
    budget = resources.token_budget
    return AlphaEdit(resources.model, settings, resources.templates, solvers, budget)


def _lora(resources: Resources, settings: LoraSettings) -> Lora:
    return Lora(resources.model, settings, resources.token_budget)


def _ultraedit(resources: Resources, settings: UltraEditSettings) -> UltraEdit:
    return UltraEdit(resources.model, settings, resources.token_budget)


EDITORS: dict[str, Kind] = {
    "none": Kind(NoSettings, lambda resources, settings: Unedited()),
    "ft": Kind(FineTuningSettings, _fine_tuning),
    "ft+l": Kind(ConstrainedSettings, _fine_tuning),
    "attnedit": Kind(AttentionSettings, _fine_tuning),
    "ke": _hypernetwork("ke"),
    "mend": _hypernetwork("mend"),
    "kn": Kind(KnowledgeNeuronsSettings, _kn),
    "lora": Kind(LoraSettings, _lora),
    "memit": Kind(MemitSettings, _memit, lambda s: list(s.layers), values=True),
    "alphaedit": Kind(AlphaEditSettings, _alphaedit, lambda s: list(s.layers), values=True),
    "rome": Kind(RomeSettings, _rome, lambda s: [s.layer] if s.second_moment else []),
    "ultraedit": Kind(UltraEditSettings, _ultraedit),
}
