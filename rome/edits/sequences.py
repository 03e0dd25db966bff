"""Many edits of one model: made together, or one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from rome.data.records import Request
from rome.editors import Editor, JointEditor
from rome.edits.deltas import Delta, DenseDelta, Edit, LowRankDelta, dense, written
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
    def __init__(
        self, model: EditableModel, editor: Editor, scored: Literal["after", "end"]
    ) -> None:
        self._model, self._editor, self._scored = model, editor, scored

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        edits: list[Edit] = []
        totals: list[Mapping[str, Delta]] = [{}]
        for request in requests:
            # One write of all edits before, so that a weight is rounded to its dtype only once.
            with written(self._model, Edit(request, totals[-1])):
                (edit,) = self._editor.edit([request])
            edits.append(edit)
            totals.append(_added(totals[-1], edit.deltas))
        shown = totals[1:] if self._scored == "after" else totals[-1:] * len(edits)
        return [replace(edit, deltas=total) for edit, total in zip(edits, shown, strict=True)]


def _added(total: Mapping[str, Delta], more: Mapping[str, Delta]) -> dict[str, Delta]:
    """Both changes: low-rank ones side by side, their ranks added; with a dense one, summed."""
    both = {name: _sum(total[name], more[name]) for name in total.keys() & more.keys()}
    return {**total, **more, **both}


def _sum(a: Delta, b: Delta) -> Delta:
    if isinstance(a, LowRankDelta) and isinstance(b, LowRankDelta):
        return LowRankDelta(
            torch.cat([a.left_DR, b.left_DR], 1), torch.cat([a.right_KR, b.right_KR], 1)
        )
    return DenseDelta(dense(a) + dense(b))
