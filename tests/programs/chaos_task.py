"""A fast task whose records, workers and stores fail on demand, and a driver process of it.

`python chaos_task.py SPEC` drives a run, SPEC being a `Spec` as JSON, and prints the outcome.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.driver import RunError
from cluster.grid import Grid, Lease
from cluster.lock import LockedError
from cluster.run import run
from cluster.settings import RunSettings
from cluster.store import Store

GROUP = "editor=fake"
SHARDS = 4


@dataclass(frozen=True)
class Spec:
    """A run: `root` holds records and results, `log` is a local folder of what was run.

    bad: case id -> what happens there instead of a row. dies_after: the worker that commits this
    case ends right after its commit, once.
    """

    root: str
    log: str
    records: int = 6000
    seconds: float = 0.002
    bad: dict[str, str] = field(default_factory=dict)
    dies_after: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def changed(self, **changes: Any) -> Spec:
        return replace(self, **changes)

    def dump(self) -> str:
        return json.dumps(asdict(self))


def write_records(spec: Spec) -> None:
    """The input: shards of case ids and values."""
    size = -(-spec.records // SHARDS)
    for number in range(SHARDS):
        ids = list(range(number * size, min((number + 1) * size, spec.records)))
        table = pa.table({"case_id": ids, "value": [i * 3 for i in ids]})
        Store(spec.root).write_table(f"records/shard-{number:05d}.parquet", table)


class ChaosTask:
    def __init__(self, spec: Spec, grid: Grid) -> None:
        self.spec, self.grid, self.dirty = spec, grid, False
        self.shards: dict[int, dict[int, int]] = {}
        self.log = (Path(spec.log) / f"runs-{os.getpid()}").open("a", buffering=1)

    def describe(self) -> dict[str, Any]:
        # pyarrow's first conversion takes seconds of imports, for which no record is to blame.
        pa.Table.from_pylist([], schema=SCHEMA)
        return {}

    def verify(self) -> None:
        if self.dirty:
            raise RuntimeError("the weights are not what they were at the start")

    def run(self, lease: Lease) -> pa.Table:
        if lease.shard not in self.shards:
            shard = Store(self.spec.root).read_table(f"records/shard-{lease.shard:05d}.parquet")
            values = zip(shard["case_id"].to_pylist(), shard["value"].to_pylist(), strict=True)
            self.shards[lease.shard] = dict(values)
        rows = [self.row(lease, case_id) for case_id in self.grid.ids(lease)]
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def row(self, lease: Lease, case_id: int) -> dict[str, Any]:
        self.log.write(f"{case_id}\n")
        time.sleep(self.spec.seconds)
        if how := self.spec.bad.get(str(case_id)):
            self.go_wrong(how, case_id)
        value = self.shards[lease.shard][case_id] ** 2
        return {
            "case_id": case_id,
            "value": value,
            "attempts": lease.attempt,
            "worker": os.getpid(),
        }

    def go_wrong(self, how: str, case_id: int) -> None:
        marker = Path(self.spec.log) / f"once-{case_id}"
        if how.startswith("once "):
            if marker.exists():
                return
            marker.touch()
        match how.removeprefix("once "):
            case "raise":
                raise KeyError(f"case {case_id} is bad")
            case "segfault":
                ctypes.string_at(0)
            case "hang":
                time.sleep(3600)
            case "slow":
                time.sleep(15)
            case "dirty":
                self.dirty = True
            case "memory":
                hog = []
                while True:
                    hog.append(bytearray(os.urandom(1 << 20)) * 64)
                    time.sleep(0.02)


SCHEMA = pa.schema(
    [
        ("case_id", pa.int64()),
        ("value", pa.int64()),
        ("attempts", pa.int64()),
        ("error", pa.string()),
        ("worker", pa.int64()),
    ]
)


@dataclass(frozen=True)
class ChaosWork:
    spec: Spec
    grid: Grid

    def task(self) -> ChaosTask:
        return ChaosTask(self.spec, self.grid)

    def dead_row(self, lease: Lease, error: str) -> pa.Table:
        (case_id,) = self.grid.ids(lease)
        row = {"case_id": case_id, "attempts": lease.attempt, "error": error}
        return pa.Table.from_pylist([row], schema=SCHEMA)


class DyingStore(Store):
    """Its process ends right after the commit of one case, once."""

    def __init__(self, uri: str, case_id: int, log: str) -> None:
        super().__init__(uri)
        object.__setattr__(self, "_case_id", case_id)
        object.__setattr__(self, "_marker", Path(log) / "died")

    def write_table(self, name: str, table: pa.Table) -> int:
        size = super().write_table(name, table)
        case_id, marker = self.__dict__["_case_id"], self.__dict__["_marker"]
        if case_id in table["case_id"].to_pylist() and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return size


def drive(spec: Spec) -> int:
    root = Store(spec.root)
    names = root.list("records/shard-", ".parquet")
    shards = [root.read_table(name, ["case_id"]) for name in names]
    grid = Grid(tuple(tuple(shard["case_id"].to_pylist()) for shard in shards), rows=16)
    results = root.sub("results")
    if spec.dies_after is not None:
        results = DyingStore(results.uri, spec.dies_after, spec.log)
    settings = RunSettings(**{"workers": 4, "num_cpus": 1, "record_seconds": 60} | spec.settings)
    outcome = run(results, [GROUP], grid, ChaosWork(spec, grid), settings, name="chaos")
    print(json.dumps({"done": outcome.done, "dead": outcome.dead, "stopped": outcome.stopped}))
    return 130 if outcome.stopped else 0


if __name__ == "__main__":
    try:
        sys.exit(drive(Spec(**json.loads(sys.argv[1]))))
    except (LockedError, RunError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
