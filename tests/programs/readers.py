"""What reads a whole run, at full size: `make scale ARGS="readers"`.

All 21,919 records under 11 editors, made up, in parts of 128 as GPUs leave them. Each reader runs
in a process of its own, whose peak of memory is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from cluster.grid import Lease
from cluster.store import Store
from jobs.runs.parts import PARTS, hive_path
from rome.analysis.summary import record_metrics
from rome.data.results import RESULT_SCHEMA
from tests.programs.matrices import _peak_gb
from tests.support.runs_to_report import make_row

RECORDS, EDITORS, PART_ROWS, SHARD_ROWS = 21_919, 11, 128, 1000


def _row(case_id: int, draw: np.random.Generator) -> dict[str, Any]:
    """As large as a run's: ten texts, as many relations as COUNTERFACT has, many workers."""
    row = make_row(case_id, 0.0, draw, texts=10, words=80)
    return row | {"relation_id": f"P{case_id % 34}", "worker": f"node:{case_id % 32}"}


def make(folder: Path, records: int = RECORDS, editors: int = EDITORS) -> None:
    """A run of so many records and editors, of which each has the same texts."""
    names = ["none", *(f"editor-{i}" for i in range(1, editors))]
    store, draw = Store(folder), np.random.default_rng(0)
    manifest = {"name": "demo", "records": records, "editors": names}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for shard, start in enumerate(range(0, records, SHARD_ROWS)):
        for first in range(start, min(start + SHARD_ROWS, records), PART_ROWS):
            stop = min(first + PART_ROWS, start + SHARD_ROWS, records)
            rows = [_row(case_id, draw) for case_id in range(first, stop)]
            for editor in names:
                some = rows if editor == "none" else [row | {"edit_norm": 1.0} for row in rows]
                table = pl.from_arrow(pa.Table.from_pylist(some, schema=RESULT_SCHEMA))
                assert isinstance(table, pl.DataFrame)
                group = hive_path(benchmark="counterfact", model="made-up", editor=editor)
                part = Lease(group, shard, first - start, stop - start).part
                store.write_table(PARTS + part, table.with_columns(record_metrics()).to_arrow())


def reduce(folder: str) -> None:
    from jobs import reduce

    reduce.reduce([folder])


def status(folder: str) -> None:
    from jobs import status

    assert status.status(Store(folder)).left == 0


def compare(folder: str) -> None:
    from jobs import compare

    compare.compare([folder], [])


def report(folder: str) -> None:
    from jobs import report

    Path(folder, "report.html").write_text(report.report([folder], texts=2)[0], "utf-8")


def resume(folder: str) -> None:
    """The driver's look at what is done."""
    from cluster.grid import Grid
    from cluster.queue import LeaseTable

    names = json.loads(Path(folder, "manifest.json").read_text())
    ids = range(names["records"])
    shards = tuple(tuple(ids[i : i + SHARD_ROWS]) for i in range(0, len(ids), SHARD_ROWS))
    groups = [
        hive_path(benchmark="counterfact", model="made-up", editor=name)
        for name in names["editors"]
    ]
    assert LeaseTable(Store(folder).sub("results"), groups, Grid(shards, PART_ROWS)).finished


READERS = {reader.__name__: reader for reader in (reduce, status, compare, report, resume)}


def read(name: str, folder: Path) -> dict[str, float]:
    """Seconds and peak of memory of a reader in a process of its own."""
    command = [sys.executable, "-m", "tests.programs.readers", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure() -> None:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        make(Path(folder))
        parts = list(Path(folder).rglob("part-*.parquet"))
        size = sum(part.stat().st_size for part in parts) / 1e9
        made = {"rows": RECORDS * EDITORS, "parts": len(parts), "GB": round(size, 2)}
        print(
            "readers", json.dumps(made), f"made in {time.perf_counter() - began:.0f} s", flush=True
        )
        for name in READERS:
            print("readers", name, json.dumps(read(name, Path(folder))), flush=True)
        page = Path(folder, "report.html").stat().st_size / 1e6
        print("readers", json.dumps({"report_MB": round(page, 1)}), flush=True)


if __name__ == "__main__":
    start = time.perf_counter()
    READERS[sys.argv[1]](sys.argv[2])
    spent = {"seconds": time.perf_counter() - start, "peak_GB": _peak_gb()}
    print(json.dumps({key: round(value, 2) for key, value in spent.items()}))
