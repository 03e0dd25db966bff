"""Time and memory of a second moment at a model's size: `make scale ARGS="matrices"`.

Each way runs in a process of its own, whose peak of memory is its own: what a worker does with the
sums of a layer, and how another one gets a solver.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import torch

from cluster.grid import Grid, Lease
from cluster.store import Store
from jobs.tasks import moments
from rome import second_moment
from rome.second_moment import MomentOrigin, SecondMoment

SIZES = {"GPT-2 XL": 6400, "GPT-J": 16_384}
PARTS = 2
_ORIGIN = MomentOrigin(
    model="m", model_fingerprint="f", layer=0, weight="w", corpus="c", corpus_fingerprint="f"
)


def parts(store: Store, K: int) -> None:
    """Sums of made-up keys, as workers commit them."""
    for number in range(PARTS):
        keys = torch.randn(20_000, K, generator=torch.Generator().manual_seed(number)).relu()
        moment = SecondMoment.zeros(K)
        moment.add(keys)
        columns = {
            "case_id": pa.array([number]),
            "count": pa.array([moment.count]),
            "model_fingerprint": pa.array(["f"]),
            "sum_0": pa.array([moments._packed(moment.sum_KK)], pa.large_binary()),
        }
        store.write_table(Lease(moments.GROUP, 0, number, number + 1).part, pa.table(columns))


def write(folder: Path) -> None:
    """Merge, factor, estimate the condition number, save."""
    grid = Grid((tuple(range(PARTS)),), 1)
    moments.write(Store(folder), grid, 0, _ORIGIN, Store(folder / "c.safetensors"), "cpu")


def open_mapped(folder: Path) -> None:
    """A worker's solver from the file, and one key solved."""
    solver = second_moment.load_solver(folder / "c.safetensors")
    solver.solve(torch.ones(1, len(solver.factor_KK)))


def factor_again(folder: Path) -> None:
    """The same from the sum, as each worker had it before: checked, and factored anew."""
    moment, _ = second_moment.load(folder / "c.safetensors")
    moment.solver().solve(torch.ones(1, len(moment.sum_KK)))


WAYS = {way.__name__: way for way in (write, open_mapped, factor_again)}


def measure(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parts(Store(folder), SIZES[name])
        for way in WAYS:
            command = [sys.executable, "-m", "tests.programs.matrices", way, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(name, way, done.stdout.strip(), flush=True)
        size = (Path(folder) / "c.safetensors").stat().st_size
        written = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
        print(name, json.dumps({"file_GB": size / 1e9, "parts_GB": written / 1e9}), flush=True)


def _peak_gb() -> float:
    """Of this process alone: what `getrusage` says begins with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 2**20


if __name__ == "__main__":
    before, began = _peak_gb(), time.perf_counter()
    WAYS[sys.argv[1]](Path(sys.argv[2]))
    seconds, peak = time.perf_counter() - began, _peak_gb() - before
    print(json.dumps({"seconds": round(seconds, 1), "peak_GB": round(peak, 3)}))
