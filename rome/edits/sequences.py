"""Many edits of one model: a chain of batches, each made on the model that has those before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rome.data.records import Request
from rome.editors import ChainEditor, Editor, JointEditor, State, ValueEditor
from rome.editors.values import Value
from rome.edits.deltas import Delta, DenseDelta, Edit, LowRankDelta, cheapest, dense, written
from rome.edits.grouping import Grouping
from rome.edits.regularised import pruned
from rome.models import EditableModel


@dataclass(frozen=True)
class ChainState:
    """A chain after `edits` edits: the change of all of them, and what its editor carries on."""

    edits: int = 0
    total: Mapping[str, Delta] = field(default_factory=dict)
    carried: State = field(default_factory=dict)


class Chain:
    """The edits of a group, batch by batch.

    It keeps the change of all edits so far, which takes no more memory than the edited weights, and
    the editor's state. Raises ValueError where the editor is to edit requests together and cannot.
    """

    def __init__(self, model: EditableModel, editor: Editor, grouping: Grouping) -> None:
        if grouping.edits_per_model > 1 and not isinstance(editor, JointEditor | ChainEditor):
            raise ValueError(
                f"edits_per_model must be 1 for {type(editor).__name__}, which has no "
                "edit_together; `sequence` makes edits one after another with any editor"
            )
        self.model, self._editor, self.grouping = model, editor, grouping

    def begin(self) -> ChainState:
        """The chain before its first batch."""
        if isinstance(self._editor, ChainEditor):
            return ChainState(carried=self._editor.begin())
        return ChainState()

    def values(self, state: ChainState, requests: Sequence[Request]) -> list[Value]:
        """The values of some requests of the next batch, of a ValueEditor."""
        assert isinstance(self._editor, ValueEditor)
        with written(self.model, Edit(requests[0], state.total)):
            return self._editor.values(requests)

    def go_on(
        self,
        state: ChainState,
        requests: Sequence[Request],
        known: tuple[Tensor, int] | None = None,
    ) -> tuple[list[Mapping[str, float]], ChainState]:
        """Edit the requests of whole batches: the health of each one's edit, and the chain after.

        `known`: of one batch, the values [E, D] and how many of them NAS skips. Raises RecordError
        where a request cannot be edited.
        """
        assert known is None or len(known[0]) == len(requests) == self.grouping.edits_per_model
        health: list[Mapping[str, float]] = []
        for start in range(0, len(requests), self.grouping.edits_per_model):
            batch = requests[start : start + self.grouping.edits_per_model]
            edit, carried = self._edit(state, batch, known)
            total = _added(state.total, edit.deltas)
            state = _as_kept(ChainState(state.edits + len(batch), total, carried))
            health += [edit.health] * len(batch)
        return health, state

    def _edit(
        self, state: ChainState, batch: Sequence[Request], known: tuple[Tensor, int] | None
    ) -> tuple[Edit, State]:
        editor = self._editor
        if known is not None:
            assert isinstance(editor, ValueEditor)
            editor = editor.with_values(*known)
        # One write of all edits before, so that a weight is rounded to its dtype only once.
        with written(self.model, Edit(batch[0], state.total)):
            if isinstance(editor, ChainEditor):
                return editor.edit_batch(batch, state.carried)
            if self.grouping.edits_per_model == 1:
                (edit,) = editor.edit(batch)
                return edit, {}
            assert isinstance(editor, JointEditor)
            return editor.edit_together(batch), {}


def scored(model: EditableModel, grouping: Grouping, state: ChainState) -> Mapping[str, Delta]:
    """The change of the model on which the facts of a chain are scored."""
    if not grouping.prune:
        return state.total
    return {
        name: DenseDelta(pruned(model.weight(name), dense(delta)))
        for name, delta in state.total.items()
    }


_SCORED_TOGETHER = 8
"""Records of a sequence that are scored after their own edit, each on a model of its own: so many
changes of all edits so far are held at a time."""


def turns(editor: Editor, requests: int) -> Iterator[tuple[Editor, range]]:
    """The editor of one group, and which of its requests it takes at a time."""
    at_a_time = requests
    if isinstance(editor, _Grouped):
        editor = editor.begun()
        at_a_time = editor.at_a_time or requests
    for start in range(0, requests, at_a_time):
        yield editor, range(start, min(start + at_a_time, requests))


def grouped(model: EditableModel, editor: Editor, grouping: Grouping) -> Editor:
    """An editor whose `edit` takes the requests of one group.

    For each it gives the changes of the model that the record is scored on, and its own health.
    Raises ValueError as Chain does.
    """
    return editor if grouping.size == 1 else _Grouped(Chain(model, editor, grouping))


def shares_a_model(editor: Editor) -> bool:
    """True if all requests that an editor takes at a time edit one model."""
    return isinstance(editor, _Grouped)


class _Grouped:
    """One group: each call of `edit` goes on where the last one ended."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._state = chain.begin()
        self._batch = chain.grouping.edits_per_model

    def begun(self) -> _Grouped:
        """The same from its first edit."""
        return _Grouped(self._chain)

    @property
    def at_a_time(self) -> int | None:
        """Requests of whole batches that are scored together; None for all."""
        after = self._chain.grouping.scored == "after"
        return max(_SCORED_TOGETHER // self._batch, 1) * self._batch if after else None

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        step = self._batch if self._chain.grouping.scored == "after" else len(requests)
        edits: list[Edit] = []
        for start in range(0, len(requests), step):
            some = requests[start : start + step]
            health, self._state = self._chain.go_on(self._state, some)
            deltas = scored(self._chain.model, self._chain.grouping, self._state)
            edits += [Edit(request, deltas, h) for request, h in zip(some, health, strict=True)]
        return edits


def _as_kept(state: ChainState) -> ChainState:
    """The same with its tensors laid out as a file has them: products of others round otherwise,
    and a chain that was gone on with elsewhere would differ in its last bits."""
    total = {
        name: replace(delta, **{part: x.contiguous() for part, x in vars(delta).items()})
        for name, delta in state.total.items()
    }
    return replace(
        state, total=total, carried={name: x.contiguous() for name, x in state.carried.items()}
    )


def _added(total: Mapping[str, Delta], more: Mapping[str, Delta]) -> dict[str, Delta]:
    """Both changes: low-rank ones side by side, their ranks added; with a dense one, summed."""
    both = {name: _sum(total[name], more[name]) for name in total.keys() & more.keys()}
    return {**total, **more, **both}


def _sum(a: Delta, b: Delta) -> Delta:
    if isinstance(a, LowRankDelta) and isinstance(b, LowRankDelta):
        left_DR, right_KR = (
            torch.cat([x, y], 1) for x, y in ((a.left_DR, b.left_DR), (a.right_KR, b.right_KR))
        )
        return cheapest(LowRankDelta(left_DR, right_KR))
    return DenseDelta(dense(a) + dense(b))
