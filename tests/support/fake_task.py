"""A task without mathematics, some of whose records are bad; and a driver of it.

`python fake_task.py RUN_DIR` runs it in a process of its own, which a test can kill.
"""

import ctypes
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.grid import Grid, Lease
from cluster.run import Outcome, run
from cluster.settings import RunSettings
from cluster.store import Store
from cluster.told import tell

GROUPS = ("editor=none", "editor=rome")
GRID = Grid((tuple(range(100, 122)), tuple(range(200, 215))), rows=4)


@dataclass
class FakeTask:
    """Squares case ids. `bad` says what a case does instead; `log` is a folder for what was run."""

    log: Path
    bad: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    fingerprint: str = "f00"
    dirty: bool = False

    def describe(self) -> dict[str, Any]:
        # pyarrow's first conversion takes seconds of imports, for which no record is to blame.
        pa.Table.from_pylist([], schema=SCHEMA)
        with open(self.log / "pids", "a") as file:
            file.write(f"{os.getpid()}\n")
        return {"fingerprint": self.fingerprint, "cuda": os.environ.get("CUDA_VISIBLE_DEVICES")}

    def verify(self) -> None:
        if self.dirty:
            raise ValueError("the weights are not what they were at the start")

    def run(self, lease: Lease) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for case_id in GRID.ids(lease):
            tell(len(rows))
            rows.append(self._row(lease, case_id))
        return pa.Table.from_pylist(rows, schema=SCHEMA)

    def _row(self, lease: Lease, case_id: int) -> dict[str, Any]:
        with open(self.log / f"{lease.group}-{case_id}", "a") as file:
            file.write(f"{lease.start} {lease.stop} {lease.attempt}\n")
        time.sleep(self.seconds)
        how = self.bad.get(case_id)
        if how == "raise":
            raise KeyError(f"case {case_id} is bad")
        if how == "row":
            return {"case_id": case_id, "error": "no such subject", "attempts": lease.attempt}
        if how == "segfault":
            ctypes.string_at(0)
        if how == "slow":
            time.sleep(1.2)
        if how == "hang":
            time.sleep(3600)
        if how == "unpicklable":
            raise type("LocalError", (Exception,), {"__reduce__": lambda self: 1 / 0})("odd")
        if how == "dirty once" and not (self.log / "dirty").exists():
            (self.log / "dirty").touch()
            self.dirty = True
        return {"case_id": case_id, "square": case_id**2, "attempts": lease.attempt}


SCHEMA = pa.schema(
    [
        ("case_id", pa.int64()),
        ("square", pa.int64()),
        ("attempts", pa.int64()),
        ("error", pa.string()),
    ]
)


@dataclass
class FakeWork:
    """The arguments of its FakeTask."""

    log: Path
    bad: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    fingerprint: str = "f00"

    def task(self) -> FakeTask:
        return FakeTask(self.log, self.bad, self.seconds, self.fingerprint)

    def dead_row(self, lease: Lease, error: str) -> pa.Table:
        (case_id,) = GRID.ids(lease)
        row = {"case_id": case_id, "attempts": lease.attempt, "error": error}
        return pa.Table.from_pylist([row], schema=SCHEMA)


def drive(
    folder: Path,
    settings: RunSettings,
    bad: dict[int, str] | None = None,
    seconds: float = 0.0,
    fingerprint: str = "f00",
    groups: tuple[str, ...] = GROUPS,
) -> Outcome:
    """A run in `folder`/results, with what was run in `folder`/log."""
    log = folder / "log"
    log.mkdir(parents=True, exist_ok=True)
    work = FakeWork(log, bad or {}, seconds, fingerprint)
    expect = {"fingerprint": "f00", "cuda": ""}
    return run(Store(folder / "results"), groups, GRID, work, settings, expect)


if __name__ == "__main__":
    outcome = drive(Path(sys.argv[1]), RunSettings(workers=2, num_cpus=0.5), seconds=0.15)
    print(outcome.done, outcome.total, outcome.duplicates, outcome.stopped)
