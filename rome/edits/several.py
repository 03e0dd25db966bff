"""One edit a record, also of one that has several requests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol, runtime_checkable

from rome.data.records import Record
from rome.editors import Editor, JointEditor
from rome.edits.deltas import Edit
from rome.edits.grouping import Grouping
from rome.edits.sequences import grouped, shares_a_model
from rome.models import EditableModel


@runtime_checkable
class RecordEditor(Protocol):
    """An editor that knows records, such as one whose edits are stored."""

    def edit_records(self, records: Sequence[Record]) -> list[Edit]:
        """One edit per record, in order."""
        ...


def edit_records(
    model: EditableModel, editor: Editor | RecordEditor, records: Sequence[Record]
) -> list[Edit]:
    """One edit per record, with all of the record's requests; it carries the last of them.

    An editor that can writes the requests of a record together (`edit_together`); any other one
    makes them one after another, in a sequence of the record's own. In a group of records that
    share a model, all requests of all records are the group's.
    """
    if isinstance(editor, RecordEditor):
        return editor.edit_records(records)
    if not any(record.further for record in records):
        return editor.edit([record.request for record in records])
    if shares_a_model(editor):
        edits = editor.edit([request for record in records for request in record.requests])
        return [edits[n - 1] for n in accumulate(len(record.requests) for record in records)]
    alone = [record for record in records if not record.further]
    made = iter(editor.edit([record.request for record in alone]) if alone else [])
    return [_together(model, editor, one) if one.further else next(made) for one in records]


def _together(model: EditableModel, editor: Editor, record: Record) -> Edit:
    if isinstance(editor, JointEditor):
        return editor.edit_together(record.requests)
    sequence = grouped(model, editor, Grouping(sequence=len(record.requests)))
    return sequence.edit(record.requests)[-1]
