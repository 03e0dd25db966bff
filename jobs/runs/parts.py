"""The parts of a run: where they lie, and what all of them say together.

A part lies in a hive path, `results/benchmark=/model=/editor=/`, whose values are quoted.
"""

from __future__ import annotations

import io
import posixpath
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from urllib.parse import quote, unquote

import polars as pl
import pyarrow as pa

from cluster.origin import Origin
from cluster.store import Store
from rome.data.results import FORMER_SCHEMA, RESULT_SCHEMA

PARTS = "results/"
BATCHES = "batches/"
"""Below PARTS, the parts whose rows are batches of chains (see jobs.runs.chains)."""
VALUES = "values/"
"""Below PARTS, the parts whose rows are the values of a chain's edits."""
EVALUATED = ("benchmark", "model", "editor")
"""The keys in the hive path of a result row."""
JUDGES = "judges/"
"""Verdicts about the texts of rows, see jobs.judge."""
KEYS = (*EVALUATED, "order", "case_id")
"""The columns that tell the rows of a run apart."""
SWEEP = "sweep.parquet"
"""The table of a sweep, by which its run is known."""


def hive_path(**values: str) -> str:
    """The folder below `results/` of the parts with these values."""
    return "/".join(f"{key}={quote(value, safe='')}" for key, value in values.items())


def hive_values(path: str, keys: Sequence[str] = EVALUATED) -> dict[str, str]:
    """The values in a hive path. Raises ValueError if it lacks one of these keys."""
    pairs = (name.split("=", 1) for name in path.split("/") if "=" in name)
    values = {key: unquote(value) for key, value in pairs}
    if not set(keys) <= values.keys():
        raise ValueError(
            f"parts must lie in a folder {'/'.join(f'{key}=' for key in keys)}, got {path}. Move "
            "what is no part away and run the same command again."
        )
    return values


def of_results(store: Store) -> list[str]:
    """The parts of a run whose rows are results: of scored records, and not of a chain's edits."""
    others = f"{PARTS}{BATCHES}", f"{PARTS}{VALUES}"
    return [name for name in store.list(PARTS, ".parquet") if not name.startswith(others)]


def collect(
    store: Store,
    of: Callable[[pl.LazyFrame], pl.DataFrame],
    origin: Origin | None = None,
    schema: pa.Schema = RESULT_SCHEMA,
    keys: Sequence[str] = EVALUATED,
) -> pl.DataFrame:
    """`of` the rows of a run with its hive columns `keys` and the verdicts of its judges, reading
    only what it needs.

    `schema`: the columns of a row; one that a part of an earlier version lacks is null there.
    Raises ValueError if there is no part, or naming one that is not whole, of something else, or
    that has a column of another type.
    """
    parts = of_results(store)
    if not parts:
        raise ValueError(
            f"{store.uri} has no results yet: no part in {PARTS} is of results. "
            "Begin the run, or wait for its first part (with chains, for their first checkpoint), "
            "and run the same command again."
        )
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda part: _check(store, part, schema, origin or Origin()), parts))
    try:
        types = _types(schema) | (_types(FORMER_SCHEMA) if schema is RESULT_SCHEMA else {})
        return of(_judged(store, scan(store, parts, pl.Schema(types), keys)))
    except (pl.exceptions.PolarsError, OSError):
        for part in parts:
            store.read_table(part)  # Names the damaged one.
        raise


def _check(store: Store, part: str, schema: pa.Schema, origin: Origin) -> None:
    found, where = store.read_schema(part), f"{store.uri}/{part}"
    origin.check(where, posixpath.dirname(part).removeprefix(PARTS), found)
    there = _types(found.remove_metadata())
    for name, kind in _types(schema).items():
        if name not in there and not schema.field(name).nullable:
            raise ValueError(
                f"{where} lacks the column {name}: it is not a part of such a run. "
                "Move it away and run the same command again."
            )
        if there.get(name, kind) != kind:
            raise ValueError(
                f"{where}: the column {name} must hold {kind}, but holds {there[name]}. "
                "Move it away; the line that began the run does its rows again."
            )


@lru_cache(maxsize=16)  # Parts are alike.
def _types(schema: pa.Schema) -> dict[str, pl.DataType]:
    frame = pl.from_arrow(schema.empty_table())
    assert isinstance(frame, pl.DataFrame)
    return dict(frame.schema)


def scan(
    store: Store, parts: Sequence[str], schema: pl.Schema, keys: Sequence[str] = EVALUATED
) -> pl.LazyFrame:
    """The columns of `schema`, null in parts without them, and the hive columns `keys`."""
    folders = defaultdict(list)
    for part in parts:
        folders[posixpath.dirname(part)].append(store.address(part))
    # Not polars' own hive columns: those also come from the folders above the run directory.
    return pl.concat(
        [
            pl.scan_parquet(
                files,
                glob=False,
                hive_partitioning=False,
                schema=schema,
                missing_columns="insert",
                extra_columns="ignore",
            ).with_columns(**{key: pl.lit(value) for key, value in _columns(folder, keys).items()})
            for folder, files in folders.items()
        ]
    )


def _columns(folder: str, keys: Sequence[str]) -> dict[str, str]:
    """The values of a path that rows have not."""
    values = hive_values(folder, keys)
    found = {key: values[key] for key in keys}
    return found | ({"editor": row_of(folder)} if "edits" in values else {})


def row_of(group: str) -> str:
    """The row of tables that a group's parts are of. A checkpoint of a chain is one by itself,
    `memit@1000` after a thousand edits; a chain's batches and values are in no table."""
    values = hive_values(group)
    if group.startswith((BATCHES, VALUES)):
        return f"{values['editor']}, {group.partition('/')[0]}"
    return at(values["editor"], values["edits"]) if "edits" in values else values["editor"]


def at(editor: str, edits: int | str) -> str:
    """The name of a checkpoint in tables."""
    return f"{editor}@{edits}"


AT = r"@(\d+)$"
"""The end of such a name, and its edits."""


def _judged(store: Store, rows: pl.LazyFrame) -> pl.LazyFrame:
    for name in store.list(JUDGES, ".parquet"):
        if "/" not in name.removeprefix(JUDGES):  # Else it holds replies.
            verdicts = pl.from_arrow(store.read_table(name)).lazy()  # type: ignore[union-attr]
            rows = rows.join(
                verdicts.unique(KEYS), on=KEYS, how="left", nulls_equal=True, maintain_order="left"
            )
    return rows


def write_table(store: Store, name: str, frame: pl.DataFrame) -> None:
    """Commit a frame as Parquet."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    store.write_bytes(name, buffer.getvalue())
