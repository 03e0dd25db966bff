"""The parts of a run: where they lie, and what all of them say together.

A part lies in a hive path, `results/benchmark=/model=/editor=/`, whose values are quoted.
"""

from __future__ import annotations

import io
import posixpath
from collections import defaultdict
from collections.abc import Callable, Sequence
from urllib.parse import quote, unquote

import polars as pl

from cluster.store import Store

PARTS = "results/"
BATCHES = "batches/"
"""Below PARTS, the parts whose rows are batches of chains (see jobs.runs.chains)."""
_COLUMNS = ("benchmark", "model", "editor")


def hive_path(**values: str) -> str:
    """The folder below `results/` of the parts with these values."""
    return "/".join(f"{key}={quote(value, safe='')}" for key, value in values.items())


def hive_values(path: str) -> dict[str, str]:
    """The values in a hive path."""
    pairs = (name.split("=", 1) for name in path.split("/") if "=" in name)
    return {key: unquote(value) for key, value in pairs}


def collect(store: Store, of: Callable[[pl.LazyFrame], pl.DataFrame]) -> pl.DataFrame:
    """`of` the result rows of a run with its hive columns, reading only what it needs.

    Raises ValueError if there is none, or a part is not whole.
    """
    batches = f"{PARTS}{BATCHES}"
    parts = [name for name in store.list(PARTS, ".parquet") if not name.startswith(batches)]
    if not parts:
        raise ValueError(
            f"{store.uri} has no results yet: no part in {PARTS}. "
            "Run jobs.evaluate, or wait for its first part, and reduce again."
        )
    try:
        return of(_scan(store, parts))
    except (pl.exceptions.PolarsError, OSError):
        for part in parts:
            store.read_table(part)  # Names the damaged one.
        raise


def _scan(store: Store, parts: Sequence[str]) -> pl.LazyFrame:
    folders = defaultdict(list)
    for part in parts:
        folders[posixpath.dirname(part)].append(store.address(part))
    # Not polars' own hive columns: those also come from the folders above the run directory.
    return pl.concat(
        [
            pl.scan_parquet(files, glob=False, hive_partitioning=False).with_columns(
                **{key: pl.lit(value) for key, value in _columns(folder).items()}
            )
            for folder, files in folders.items()
        ]
    )


def _columns(folder: str) -> dict[str, str]:
    """The values of a path that rows have not."""
    values = hive_values(folder)
    found = {key: values[key] for key in _COLUMNS if key in values}
    return found | ({"editor": row_of(folder)} if "edits" in values else {})


def row_of(group: str) -> str:
    """The row of tables that a group's parts are of. A checkpoint of a chain is one by itself,
    `memit@1000` after a thousand edits; a chain's batches are in no table."""
    values = hive_values(group)
    if group.startswith(BATCHES):
        return f"{values['editor']}, batches"
    return at(values["editor"], values["edits"]) if "edits" in values else values["editor"]


def at(editor: str, edits: int | str) -> str:
    """The name of a checkpoint in tables."""
    return f"{editor}@{edits}"


def write_table(store: Store, name: str, frame: pl.DataFrame) -> None:
    """Commit a frame as Parquet."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    store.write_bytes(name, buffer.getvalue())
