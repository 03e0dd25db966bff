"""Editors: a batch of requests in, one edit per request out.

The registry maps the name that configs use to settings and to a function that builds the editor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from rome.deltas import Edit
from rome.editors.rome import Rome, RomeSettings
from rome.models import EditableModel
from rome.records import Request
from rome.second_moment import Solver


class Editor(Protocol):
    """Computes each edit from the unedited model, exactly as if it were the only one."""

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        """One edit per request, in order."""
        ...


@dataclass(frozen=True)
class Resources:
    """What editors may need beside the model, made once per run."""

    model: EditableModel
    templates: Sequence[str]
    solver: Callable[[int], Solver]
    """The solver of C = E[k k^T] at a layer."""
    token_budget: int
    """Tokens of a forward pass at most; a matter of memory and speed alone."""


class Unedited:
    """The unedited model as an editor: `none`."""

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        return [Edit(request) for request in requests]


@dataclass(frozen=True)
class NoSettings:
    """The unedited model has nothing to set."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}


@dataclass(frozen=True)
class Kind:
    """A registered editor: the type of its settings and how it is built from them."""

    settings: type
    build: Callable[[Resources, Any], Editor]
    second_moments: Callable[[Any], list[int]] = lambda settings: []
    """The layers whose C = E[k k^T] it needs under these settings."""


def _rome(resources: Resources, settings: RomeSettings) -> Rome:
    solver = resources.solver(settings.layer) if settings.second_moment else None
    return Rome(resources.model, settings, resources.templates, solver, resources.token_budget)


EDITORS: dict[str, Kind] = {
    "none": Kind(NoSettings, lambda resources, settings: Unedited()),
    "rome": Kind(RomeSettings, _rome, lambda s: [s.layer] if s.second_moment else []),
}
