"""The real driver with up to a thousand simulated workers: `make scale ARGS=thousand`.

Time is simulated, but for the driver's own: the CPU time that its loop takes here counts, and so do
the seconds of a lease that Ray takes in the driver's process, as `make scale` measures them.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from threading import Event
from types import SimpleNamespace
from typing import Any

from cluster.clock import Clock
from cluster.crew import Lost
from cluster.driver import Driver
from cluster.grid import Grid, Lease
from cluster.queue import LeaseTable
from cluster.settings import RunSettings
from cluster.worker import Booted, Report
from tests.support.simulated_run import Unread
from tests.support.simulation import Disk, Pause, Process, SimulatedStore, World

RATE = 20.0
"""Records a second of a worker."""
RAY_SECONDS = 1.6e-3
"""Of the driver's process, for the call and the answer of a lease; `make scale` measures them with
the loop, 0.11 ms a record at 16 records a lease."""


class SteadyCrew:
    """Workers that take the same time for each record. Counts what the driver takes."""

    def __init__(self, world: World, process: Process, workers: int) -> None:
        self.clock: Clock = process
        self._process = process
        self._world, self._workers = world, workers
        self._free = [0.0] * workers
        self._started = 0
        self._mail: dict[int, Booted | Report] = {}
        self._calls = 0
        self._wake: Pause | None = None
        self._began = time.thread_time()
        self.driver_seconds = 0.0
        self.leases = 0

    def _answer(self, answer: Booted | Report, seconds: float) -> int:
        self._calls += 1
        call = self._calls

        def arrive() -> None:
            self._mail[call] = answer
            if self._wake is not None:
                self._wake.resume()

        self._world.at(seconds, arrive)
        return call

    def start(self) -> tuple[Any, Any]:
        self._started += 1
        return self._started - 1, self._answer(Booted(), 1.0)

    def work(self, worker: int, lease: Lease) -> int:
        self.leases += 1
        self._charge(RAY_SECONDS)
        now = self._world.now
        self._free[worker] = max(self._free[worker], now) + lease.rows / RATE
        return self._answer(Report(), self._free[worker] - now)

    def _charge(self, seconds: float) -> None:
        self.driver_seconds += seconds
        self.clock.sleep(seconds)

    def answers(
        self, calls: Collection[Any], seconds: float
    ) -> Iterator[tuple[Any, Booted | Report | Lost]]:
        self._charge(time.thread_time() - self._began)
        if not self._mail:
            self._wake = Pause(self._process)
            self._world.at(seconds, self._wake.resume)
            self._process.wait()
            self._wake = None
        there, self._mail = self._mail, {}
        self._began = time.thread_time()
        yield from ((call, answer) for call, answer in there.items() if call in calls)

    def told(self, leases: Iterable[Lease]) -> dict[Lease, float]:
        return {}

    def end(self, worker: Any) -> None: ...

    def fits(self) -> int:
        return self._workers

    def lacking(self) -> str:
        return ""

    def draining(self) -> set[str]:
        return set()


def measure(workers: int, lease: int, records: int) -> dict[str, float]:
    """A run's share of the ideal, and the driver's seconds a lease and of each second."""
    world = World(0)
    process = Process(world, "driver", "head")
    crew = SteadyCrew(world, process, workers)
    grid = Grid((tuple(range(records)),), lease)
    ended: list[float] = []

    def main() -> None:
        table = LeaseTable(SimulatedStore(Disk(world), process), ["editor=a"], grid)
        silent: Any = SimpleNamespace(
            update=lambda *_: None, note=lambda *_, **__: None, finished=lambda *_: None
        )
        settings = RunSettings(workers=workers)
        driver = Driver(table, grid, settings, crew, lambda *_: None, None, silent, Unread())
        driver.drive(Event(), SimpleNamespace(taken_by=None))  # type: ignore[arg-type]
        ended.append(world.now)

    process.start(main)
    world.run(lambda: bool(ended), 10**9)
    wall = ended[0] - 1.0  # Without the boot.
    return {
        "seconds": wall,
        "share_of_ideal": records / RATE / workers / wall,
        "driver_ms_a_lease": 1e3 * crew.driver_seconds / crew.leases,
        "driver_share": crew.driver_seconds / wall,
    }


def main() -> None:
    """The table of docs/scaling.md."""
    print("| workers | records | a lease | seconds | share of ideal | ms a lease | driver busy |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for workers, records, lease in (
        (100, 241_109, 16),
        (1000, 241_109, 16),
        (1000, 1_205_000, 64),
        (1000, 2_411_090, 64),
    ):
        found = measure(workers, lease, records)
        print(
            f"| {workers} | {records:,} | {lease} | {found['seconds']:.0f} | "
            f"{found['share_of_ideal']:.1%} | {found['driver_ms_a_lease']:.2f} | "
            f"{found['driver_share']:.0%} |",
            flush=True,
        )
