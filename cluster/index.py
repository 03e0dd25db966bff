"""An index of the parts of a run, so that a resume opens those alone that it has not read before.

It lies beside the parts and is checked against them: what it says of a part counts only while the
part has the size and the time that it had. A part that was committed within two seconds before the
index may be another of the same size and time, as in git's index ("racily clean"), and is read.
Where the index is missing or of no use, everything is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta

import pyarrow as pa

from cluster.store import DamagedError, Stat, Store, StoreError

INDEX = "_index.parquet"
WORTHWHILE = 256
"""An index is written after so many parts had to be opened."""
_SAME_TIME = timedelta(seconds=2)
_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("size", pa.int64()),
        ("committed", pa.timestamp("us", "UTC")),
        ("case_ids", pa.list_(pa.int64())),
        ("errors", pa.list_(pa.string())),
    ]
)

Rows = tuple[Sequence[int], Sequence[str | None]]
"""Case ids and errors of a part."""


def known(store: Store, parts: Mapping[str, Stat]) -> dict[str, Rows]:
    """The rows of those parts that are as they were when the index was written."""
    try:
        written: datetime = store.committed(INDEX)
        columns = store.read_table(INDEX, _SCHEMA.names).to_pydict()
        rows = zip(*(columns[name] for name in _SCHEMA.names), strict=True)
    except (StoreError, DamagedError, KeyError):
        return {}
    return {
        name: (case_ids, errors)
        for name, size, committed, case_ids, errors in rows
        if parts.get(name) == Stat(size, committed) and written - committed > _SAME_TIME
    }


def save(store: Store, parts: Mapping[str, Stat], rows: Mapping[str, Rows]) -> None:
    """Write what was read of parts; a store that refuses it goes without."""
    lines = [
        (name, stat.size, stat.committed, *rows[name])
        for name, stat in parts.items()
        if name in rows
    ]
    columns = zip(*lines, strict=True) if lines else ((),) * len(_SCHEMA)
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], _SCHEMA)
    with suppress(StoreError):
        store.write_table(INDEX, table)
