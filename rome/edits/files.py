"""Edits as files: safetensors of their changes, and in the metadata what they are.

A low-rank change of a weight is two tensors, `WEIGHT/NUMBER/left` [D, R] and `WEIGHT/NUMBER/right`
[K, R]; a dense one is `WEIGHT/NUMBER/change` [D, K]. The metadata hold, as JSON, the origin and for
each edit its request, its health and the number of its change of each weight: a change that several
edits share is there once.

The state of a chain is a file of the same kind with one edit, the change of all, beside which
`carried/NAME` are the tensors that its editor carries on.

Legend: K input size, D output size, R rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from rome import files, headers
from rome.data.records import Request
from rome.edits.deltas import Delta, DenseDelta, Edit, LowRankDelta
from rome.edits.sequences import ChainState
from rome.json_text import JsonError, parsed
from rome.models import EditableModel


@dataclass(frozen=True, kw_only=True)
class EditOrigin:
    """Who made the edits of a file, and for which weights."""

    editor: str
    model: str
    model_fingerprint: str


@dataclass(frozen=True)
class _Described:
    """An edit in a file: the tensors of each weight by their number."""

    request: Request
    health: dict[str, int | float]
    deltas: dict[str, int]


def save(path: str | os.PathLike[str], edit: Edit, model: EditableModel, editor: str) -> None:
    """Write one edit of a model, whole or not at all. `editor`: the name of who made it."""
    origin = EditOrigin(editor=editor, model=model.name, model_fingerprint=model.fingerprint())
    with files.replacing(path) as temporary:
        temporary.write_bytes(dumps([edit], origin))


def load(path: str | os.PathLike[str], model: EditableModel) -> tuple[Edit, EditOrigin]:
    """The edit that `save` wrote. Raises ValueError as `loads` does."""
    edits, origin = loads(Path(path).read_bytes(), model, model.fingerprint(), os.fspath(path))
    if len(edits) != 1:
        raise ValueError(f"{os.fspath(path)} must hold one edit, got {len(edits)}; use `loads`")
    return edits[0], origin


def dumps(edits: Sequence[Edit], origin: EditOrigin) -> bytes:
    """Edits of one model as the content of a file."""
    return _dumps(edits, origin, {})


_CARRIED = "carried/"
OF_A_CHAIN = Request("{}", "the model", "the chain's edits")
"""The request of an edit that is all edits of a chain."""


def dumps_chain(state: ChainState, origin: EditOrigin) -> bytes:
    """A chain after some of its batches as the content of a file."""
    edit = Edit(OF_A_CHAIN, state.total, {"edits": state.edits})
    carried = {f"{_CARRIED}{name}": tensor for name, tensor in state.carried.items()}
    return _dumps([edit], origin, carried)


def loads_chain(
    data: bytes, model: EditableModel, fingerprint: str, where: str
) -> tuple[ChainState, EditOrigin]:
    """The chain that `dumps_chain` wrote, see `loads`."""
    (edit,), origin = loads(data, model, fingerprint, where)
    carried = {
        name.removeprefix(_CARRIED): tensor
        for name, tensor in safetensors.torch.load(data).items()
        if name.startswith(_CARRIED)
    }
    return ChainState(int(edit.health["edits"]), edit.deltas, carried), origin


def _dumps(edits: Sequence[Edit], origin: EditOrigin, more: Mapping[str, Tensor]) -> bytes:
    numbers: dict[tuple[str, int], int] = {}
    tensors = {name: _owned(tensor) for name, tensor in more.items()}
    described = []
    for edit in edits:
        chosen = {}
        for name, delta in edit.deltas.items():
            chosen[name] = numbers.setdefault((name, id(delta)), len(numbers))
            for part, tensor in _parts(delta).items():
                tensors[f"{name}/{chosen[name]}/{part}"] = _owned(tensor)
        request, health = asdict(edit.request), dict(edit.health)
        described.append({"request": request, "health": health, "deltas": chosen})
    metadata = {"origin": json.dumps(asdict(origin)), "edits": json.dumps(described)}
    return headers.in_order(safetensors.torch.save(tensors, metadata))


def _owned(tensor: Tensor) -> Tensor:
    """A copy, since safetensors takes no views of one memory."""
    return tensor.detach().cpu().clone().contiguous()


def loads(
    data: bytes, model: EditableModel, fingerprint: str, where: str
) -> tuple[list[Edit], EditOrigin]:
    """The edits that `dumps` wrote, for the model with this `fingerprint`, and who made them.

    `where`: what errors call the file. Raises ValueError where it is damaged or holds no edits,
    and where they were made for other weights, or for weights of other names or shapes.
    """
    from rome import options  # Needs pydantic, and is needed for files alone.

    try:
        tensors = safetensors.torch.load(data)
        metadata = headers.header(data)["__metadata__"]
        origin = EditOrigin(**parsed(metadata["origin"]))
        described = options.validate(list[_Described], parsed(metadata["edits"]), "edits: ")
        deltas = {
            (name, number): _delta(tensors, f"{name}/{number}")
            for one in described
            for name, number in one.deltas.items()
        }
    except (SafetensorError, KeyError, TypeError, JsonError, options.ConfigError) as error:
        raise ValueError(
            f"{where} is damaged or no file of edits ({error!r}); make the edit again"
        ) from error
    if origin.model_fingerprint != fingerprint:
        raise ValueError(
            f"{where} is of {origin.model} with the weights {origin.model_fingerprint[:16]}, but "
            f"{model.name} has the weights {fingerprint[:16]}; load the model that was edited, in "
            "the dtype that it had, or make the edit again"
        )
    for (name, _), delta in deltas.items():
        _check_shape(name, delta, model, where)
    edits = [
        Edit(
            one.request,
            {name: deltas[name, number] for name, number in one.deltas.items()},
            one.health,
        )
        for one in described
    ]
    return edits, origin


def _parts(delta: Delta) -> dict[str, Tensor]:
    if isinstance(delta, LowRankDelta):
        return {"left": delta.left_DR, "right": delta.right_KR}
    return {"change": delta.change_DK}


def _delta(tensors: Mapping[str, Tensor], prefix: str) -> Delta:
    if f"{prefix}/change" in tensors:
        return DenseDelta(tensors[f"{prefix}/change"])
    return LowRankDelta(tensors[f"{prefix}/left"], tensors[f"{prefix}/right"])


def _check_shape(name: str, delta: Delta, model: EditableModel, where: str) -> None:
    try:
        expected = [*model.sizes(name)]
    except AttributeError:
        raise ValueError(
            f"{where} changes the weight '{name}', which {model.name} has not"
        ) from None
    if isinstance(delta, LowRankDelta):
        changed = [len(delta.left_DR), len(delta.right_KR)]
    else:
        changed = [*delta.change_DK.shape]
    if changed != expected:
        raise ValueError(
            f"{where} changes '{name}' by [D, K] = {changed}, but in {model.name} it is {expected}"
        )
