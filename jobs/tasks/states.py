"""The states of chains: where they lie in a run's store, which are kept, and which batch names one.

`RUN_DIR/chains/<hive path>/edits-....safetensors` holds the change of all edits so far and what the
editor carries on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa

from cluster.store import Store
from jobs.runs.chains import Chain
from jobs.runs.parts import PARTS
from rome.data.results import OK

BATCH_SCHEMA = pa.schema(
    [
        pa.field("run", pa.string(), nullable=False),
        # The number of the batch in its chain, from 0.
        pa.field("case_id", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("attempts", pa.int32(), nullable=False),
        # In the model after this batch.
        pa.field("edits", pa.int32()),
        pa.field("records", pa.list_(pa.int64())),
        # The state of the chain after this batch, and its sha256; None inside a lease.
        pa.field("file", pa.string()),
        pa.field("sha256", pa.string()),
        # Frobenius norms of the edited weights, and of what all edits so far changed.
        pa.field("weights", pa.list_(pa.string())),
        pa.field("weight_norms", pa.list_(pa.float64())),
        pa.field("change_norms", pa.list_(pa.float64())),
        # At a checkpoint, see rome.scoring.drift.
        pa.field("perplexity", pa.float64()),
        pa.field("perplexity_unedited", pa.float64()),
        pa.field("agreement", pa.float64()),
        pa.field("seconds_edit", pa.float64()),
        pa.field("worker", pa.string()),
    ]
)

_FOLDER = "chains/"


def name_of(chain: Chain, edits: int, digest: str) -> str:
    return f"{_FOLDER}{chain.path}/edits-{edits:07d}-{digest[:16]}.safetensors"


def content(run: Store, row: Mapping[str, Any]) -> bytes | None:
    """The content of the state that a batch's row names; None if it is gone, or not what it was."""
    with suppress(FileNotFoundError):
        data = run.read_bytes(row["file"])
        if hashlib.sha256(data).hexdigest() == row["sha256"]:
            return data
    return None


def batches(run: Store, group: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of the batches of a chain, and the part that each is in."""
    columns = ("case_id", "status", "error", "edits", "file", "sha256")
    for part in run.list(f"{PARTS}{group}/part-", ".parquet"):
        for row in run.read_table(part, columns).to_pylist():
            yield part, row


def remove_before(run: Store, chain: Chain, before: int) -> None:
    """Remove the states of fewer than `before` edits, except those of checkpoints."""
    kept = {f"{edits:07d}" for edits in chain.grouping.checkpoints}
    for name in run.list(f"{_FOLDER}{chain.path}/edits-", ".safetensors"):
        edits = name.rpartition("/")[2].split("-")[1]
        if int(edits) < before and edits not in kept:
            _delete(run, name)


def remove_what_is_done_with(run: Store, chain: Chain) -> None:
    """Of a chain that no worker works on, keep the states of checkpoints that a batch names, and
    the last one, from which a chain that ended before its time is tried again."""
    named = {
        row["file"]: row["edits"]
        for _, row in batches(run, chain.batches)
        if row["status"] == OK and row["file"] is not None
    }
    wanted = {*chain.grouping.checkpoints, max(named.values(), default=0)}
    folder = f"{_FOLDER}{chain.path}"
    for name in run.list(f"{folder}/", ".safetensors"):
        if named.get(name) not in wanted:
            _delete(run, name)
    run.sub(folder).sweep()


def _delete(run: Store, name: str) -> None:
    with suppress(FileNotFoundError):  # Another one did.
        run.delete(name)
