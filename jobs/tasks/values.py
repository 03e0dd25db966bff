"""The values of a chain's large batches: all workers find them, one reads those of its batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cluster.store import DamagedError, Store, StoreError
from cluster.words import shown
from jobs.runs.chains import Chain
from rome.data.records import Record, RecordError
from rome.data.results import ERROR, OK
from rome.editors.values import Value

VALUE_SCHEMA = pa.schema(
    [
        pa.field("run", pa.string(), nullable=False),
        pa.field("case_id", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("attempts", pa.int32(), nullable=False),
        # z, to the bit: the state after the last of the editor's layers that says the target.
        pa.field("value", pa.list_(pa.float64())),
        # As in a result row, see Value.health.
        pa.field("edit_steps", pa.int32()),
        pa.field("edit_loss", pa.float64()),
        pa.field("edit_init_norm", pa.float64()),
        pa.field("edit_delta_norm", pa.float64()),
        pa.field("edit_clamp_hits", pa.int32()),
        pa.field("edit_value_norm", pa.float64()),
        pa.field("edit_skipped", pa.int32()),
        pa.field("worker", pa.string()),
    ]
)


def found(records: Iterable[Record], values: Iterable[Value]) -> list[dict[str, Any]]:
    """A row for each value."""
    return [
        {
            "case_id": record.case_id,
            "status": OK,
            "value": value.target.double().cpu().numpy(),
            **{f"edit_{name}": number for name, number in value.health.items()},
        }
        for record, value in zip(records, values, strict=True)
    ]


def failed(records: Iterable[Record], error: RecordError) -> list[dict[str, Any]]:
    """A row for each record that has no value."""
    text = shown(str(error))
    return [{"case_id": record.case_id, "status": ERROR, "error": text} for record in records]


def known(run: Store, chain: Chain, number: int) -> tuple[Tensor, int] | None:
    """The values of a batch [E, D], float64, in the order of its edits, and how many NAS skips;
    None if there is no part of them: in a run that an earlier version began, for one.

    Raises RecordError where one of the records has none, and StoreError where some rows are not to
    be seen.
    """
    results, columns = run.sub("results"), ("case_id", "error", "value", "edit_skipped")
    names = results.list(f"{chain.values}/part-{number:05d}-", ".parquet")
    values: dict[int, np.ndarray[Any, Any]] = {}
    errors: dict[int, str] = {}
    skipped: dict[int, int] = {}
    if not names:
        return None
    for table in results.read_tables(names, columns):
        if isinstance(table, DamagedError):
            raise table
        for case_id, error, value, left in zip(*(table[c] for c in columns), strict=True):
            if error.is_valid:
                errors[case_id.as_py()] = error.as_py()
            else:
                values[case_id.as_py()] = value.values.to_numpy()
                skipped[case_id.as_py()] = left.as_py()
    wanted = chain.batch(number)
    if missing := [case_id for case_id in wanted if case_id not in values]:
        if missing[0] in errors:
            raise RecordError(errors[missing[0]])
        raise StoreError(
            f"{results.uri}/{chain.values} must hold the value of case {missing[0]}, and does not "
            "show it"
        )
    return torch.from_numpy(np.stack([values[i] for i in wanted])), sum(skipped[i] for i in wanted)
