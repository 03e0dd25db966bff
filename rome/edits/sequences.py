"""Many edits of one model: made together, or one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from rome.data.records import Request
from rome.editors import Editor, JointEditor
from rome.edits.deltas import Delta, DenseDelta, Edit, LowRankDelta, cheapest, dense, written
from rome.models import EditableModel


@dataclass(frozen=True)
class Grouping:
    """The number of records that share an edited model: a group, in the order of their shard.

    The last group of a shard may be smaller. A record that cannot be edited takes its group along,
    because the model with the edits of all of them cannot be had: each of them becomes a dead
    letter with that record's error.
    """

    edits_per_model: int = 1
    """So many requests are edited together, by one edit; for editors that can, such as MEMIT."""
    sequence: int = 1
    """So many edits follow each other, each computed on the model that has those before it."""
    scored: Literal["after", "end"] = "end"
    """Records of a sequence are scored right after their own edit, or at the end under all."""

    def __post_init__(self) -> None:
        sizes = (self.edits_per_model, self.sequence)
        if min(sizes) != 1:
            raise ValueError(
                "edits_per_model and sequence must be at least 1, and one of them 1, got "
                f"{sizes[0]} and {sizes[1]}"
            )

    @property
    def size(self) -> int:
        """Records of a group; 1 where each has a model of its own."""
        return max(self.edits_per_model, self.sequence)


_SCORED_TOGETHER = 8
"""Records of a sequence that are scored after their own edit, each on a model of its own: so many
changes of all edits so far are held at a time."""


def turns(editor: Editor, requests: int) -> Iterator[tuple[Editor, range]]:
    """The editor of one group, and which of its requests it takes at a time."""
    at_a_time = requests
    if isinstance(editor, _InSequence):
        editor = editor.begun()
        at_a_time = _SCORED_TOGETHER if editor.scored == "after" else requests
    for start in range(0, requests, at_a_time):
        yield editor, range(start, min(start + at_a_time, requests))


def grouped(model: EditableModel, editor: Editor, grouping: Grouping) -> Editor:
    """An editor whose `edit` takes the requests of one group.

    For each it gives the changes of the model that the record is scored on, and its own health.
    Raises ValueError where the editor is to edit requests together and cannot.
    """
    if grouping.sequence > 1:
        return _InSequence(model, editor, grouping.scored)
    if grouping.edits_per_model == 1:
        return editor
    if not isinstance(editor, JointEditor):
        raise ValueError(
            f"edits_per_model must be 1 for {type(editor).__name__}, which has no edit_together; "
            "`sequence` makes edits one after another with any editor"
        )
    return _Together(editor)


class _Together:
    def __init__(self, editor: JointEditor) -> None:
        self._editor = editor

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        edit = self._editor.edit_together(requests)
        return [replace(edit, request=request) for request in requests]


class _InSequence:
    """One sequence: each call of `edit` goes on where the last one ended.

    It keeps the change of all edits so far, which takes no more memory than the edited weights.
    """

    def __init__(
        self, model: EditableModel, editor: Editor, scored: Literal["after", "end"]
    ) -> None:
        self._model, self._editor, self.scored = model, editor, scored
        self._total: Mapping[str, Delta] = {}

    def begun(self) -> _InSequence:
        """The same from its first edit."""
        return _InSequence(self._model, self._editor, self.scored)

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        edits: list[Edit] = []
        for request in requests:
            # One write of all edits before, so that a weight is rounded to its dtype only once.
            with written(self._model, Edit(request, self._total)):
                (edit,) = self._editor.edit([request])
            self._total = _added(self._total, edit.deltas)
            edits.append(replace(edit, deltas=self._total if self.scored == "after" else {}))
        if self.scored == "after":
            return edits
        return [replace(edit, deltas=self._total) for edit in edits]


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
