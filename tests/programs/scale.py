"""Measure the driver's cost, and how well many workers are used: `make scale`.

All rows of COUNTERFACT (or as many made-up ones) go the whole way, from shards of records to a
part of result rows a lease, with an editor that only sleeps. Ends with 1 if a bound is not held.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from cluster.grid import Grid, Lease
from cluster.run import run
from cluster.settings import RunSettings
from cluster.store import Store
from rome.data.results import OK, RESULT_SCHEMA
from tests.programs import boots, long_chains, matrices, readers, thousand, trainings
from tests.programs.chaos_nodes import Nodes, environment

ROWS = 21_919
DRIVER_BOUND = 0.5e-3
"""Seconds of the driver a record, at leases of 16."""
USE_BOUND = 0.97
"""Share of the workers' time that the editor has."""
SHARD_ROWS = 1000


@dataclass
class SleepTask:
    """Reads its records, sleeps, and gives rows of the size of real ones."""

    records: Store
    grid: Grid
    seconds: float
    log: str

    def __post_init__(self) -> None:
        self.shards: dict[int, pa.Table] = {}

    def describe(self) -> dict[str, Any]:
        pa.Table.from_pylist([], schema=RESULT_SCHEMA)  # Imports what it needs now.
        Path(self.log, f"ready-{os.getpid()}").write_text(str(time.time()))
        return {}

    def verify(self) -> None:
        """There is nothing to restore."""

    def run(self, lease: Lease) -> pa.Table:
        if lease.shard not in self.shards:
            name = f"shard-{lease.shard:05d}.parquet"
            self.shards = {lease.shard: self.records.read_table(name)}
        ids = self.grid.ids(lease)
        shard = self.shards[lease.shard]
        chosen = shard.filter(pc.is_in(shard["case_id"], value_set=pa.array(ids))).to_pylist()
        time.sleep(self.seconds * lease.rows)
        return pa.Table.from_pylist([_row(record) for record in chosen], schema=RESULT_SCHEMA)


@dataclass(frozen=True)
class SleepWork:
    """The arguments of its SleepTask."""

    records: Store
    grid: Grid
    seconds: float
    log: str

    def task(self) -> SleepTask:
        return SleepTask(self.records, self.grid, self.seconds, self.log)

    def dead_row(self, lease: Lease, error: str) -> pa.Table:
        raise AssertionError(f"{lease} failed {lease.attempt} times: {error}")


def _row(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": "scale",
        "case_id": record["case_id"],
        "subject": record["subject"],
        "status": OK,
        "attempts": 1,
        "neighborhood_nll_new": [0.5] * 10,
        "neighborhood_nll_true": [0.25] * 10,
        "texts": [record["text"]] * 10,
        "worker": str(os.getpid()),
    }


def write_records(store: Store) -> Grid:
    shards = []
    for number, start in enumerate(range(0, ROWS, SHARD_ROWS)):
        ids = list(range(start, min(start + SHARD_ROWS, ROWS)))
        columns = {
            "case_id": ids,
            "subject": [f"subject {i}" for i in ids],
            "text": [f"subject {i}, of which a text of some length is told, " * 8 for i in ids],
        }
        store.write_table(f"shard-{number:05d}.parquet", pa.table(columns))
        shards.append(tuple(ids))
    return Grid(tuple(shards), rows=16)


def measure(nodes: int, cpus: int, seconds: float, root: str | None) -> dict[str, float]:
    """A run of all rows: its wall and driver seconds, and how much of the workers it used."""
    with environment() as _, tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.mkdir()
        store = Store(root or folder)
        grid = write_records(store.sub("records"))
        cluster = Nodes(nodes, cpus=cpus)
        os.environ["RAY_ADDRESS"] = cluster.address
        try:
            work = SleepWork(store.sub("records"), grid, seconds, str(log))
            settings = RunSettings(workers=nodes * cpus)
            cpu = time.process_time()
            results = store.sub("results")
            outcome = run(results, ["editor=sleep"], grid, work, settings, name="scale")
            cpu = time.process_time() - cpu
        finally:
            ray.shutdown()
            cluster.shut()
        assert (outcome.done, outcome.dead, outcome.duplicates) == (ROWS, [], 0)
        ready = [float(path.read_text()) for path in log.glob("ready-*")]
        commits = _commits(store.sub("results"))
        end = max(moment for moments in commits.values() for moment, _ in moments)
        return {
            "wall_seconds": end - min(ready),
            "driver_ms_a_record": 1e3 * cpu / ROWS,
            "wall_ms_a_record": 1e3 * (end - min(ready)) / ROWS,
            "workers": len(commits),
            "use": _use(commits, max(ready), end, seconds),
        }


def _commits(results: Store) -> dict[str, list[tuple[float, int]]]:
    """When each worker committed how many rows, in order."""
    commits: dict[str, list[tuple[float, int]]] = {}
    for name, when in sorted(results.written("editor=sleep/").items(), key=lambda item: item[1]):
        workers = results.read_table(name, ["worker"])["worker"].to_pylist()
        commits.setdefault(workers[0], []).append((when.timestamp(), len(workers)))
    return commits


def _use(
    commits: dict[str, list[tuple[float, int]]], ready: float, end: float, seconds: float
) -> float:
    """Share of the workers' time that the editor had, once all were there, up to the very end.

    A worker's time begins with the end of the lease that it had when the last one came.
    """
    worked = there = 0.0
    for moments in commits.values():
        begin = next((moment for moment, _ in moments if moment >= ready), end)
        worked += seconds * sum(rows for moment, rows in moments if moment > begin)
        there += end - begin
    return worked / there


def _matrices() -> None:
    for name in matrices.SIZES:
        matrices.measure(name)


OTHERS: dict[str, Callable[[], None]] = {
    "thousand": thousand.main,
    "matrices": _matrices,
    "training": trainings.measure,
    "boot": boots.measure,
    "chains": long_chains.measure,
    "readers": readers.measure,
}
"""Measured by programs of their own, without a bound."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["costless", "sleeping", *OTHERS])
    parser.add_argument("--store", help="a URI instead of a folder")
    options = parser.parse_args()
    failed = False
    for what in options.what:
        if what == "costless":
            found = measure(nodes=1, cpus=2, seconds=0, root=options.store)
            failed |= found["driver_ms_a_record"] > 1e3 * DRIVER_BOUND
        elif what in OTHERS:
            OTHERS[what]()
            continue
        else:
            found = measure(nodes=8, cpus=4, seconds=0.1, root=options.store)
            failed |= found["use"] < USE_BOUND
        print(what, json.dumps({key: round(value, 3) for key, value in found.items()}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
