"""The driver: start workers, hand out leases, watch, resume, finish."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.clock import REAL, Clock
from cluster.crew import RayCrew
from cluster.driver import Driver, RunError
from cluster.grid import Grid, Lease
from cluster.here import drive_here
from cluster.joining import joined, number_of_workers
from cluster.lock import LockedError, RunLock
from cluster.metrics import Metrics
from cluster.nodes import started_here, worker_options, workers_that_fit
from cluster.progress import Progress
from cluster.queue import LeaseTable
from cluster.settings import RunSettings
from cluster.signals import stop_signals
from cluster.store import Store
from cluster.words import note
from cluster.worker import Work, Worker, write_part

FAILURES = (LockedError, RunError, RayError)
"""The errors that `run` raises beside ValueError and OSError, as do `once` and `stream`."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run, read from the store."""

    done: int
    """Records with a row, dead letters among them."""
    total: int
    dead: list[tuple[str, int, str]]
    """(group, case_id, error)"""
    duplicates: int
    """Rows beyond one per record."""
    stopped: bool
    """Ended by a signal before everything was done."""
    seconds: float


def run(
    store: Store,
    groups: Sequence[str],
    grid: Grid,
    work: Work,
    settings: RunSettings | None = None,
    expect: dict[str, Any] | None = None,
    name: str | None = None,
    gpu_rows: int | None = None,
    begins: Callable[[], None] = lambda: None,
    so_far: Callable[[], str] | None = None,
) -> Outcome:
    """Do every record of the grid for every group that has no row in the store yet.

    `expect` is what the task's `describe()` must be. `gpu_rows` are the rows of a lease where
    workers have GPUs, instead of the grid's, or fewer where they would not go round. `name` is what
    logs and metrics call the run. `begins` is called before the first record, if any is left, and
    `so_far` on the way, for what is to be shown of the results.
    Ray is not touched where nothing is left to do. Raises LockedError while another driver works in
    `store`, ValueError where a part there is of other data, StoreError where the store cannot be
    used, and RunError where workers differ from `expect`, none can boot, or none can write.
    """
    name = name or store.uri
    settings = settings or RunSettings()

    def drive(table: LeaseTable, lock: RunLock) -> bool:
        begins()
        now = joined(settings) if settings.workers else settings
        json_of = name if settings.logs == "json" else None
        done = Counter(group for group, _ in table.done)
        left = {
            group: (len(grid.of(group)) - done[group]) * grid.of(group).records for group in groups
        }
        shown = Progress(table.total, len(table.done), json_of, left, so_far)
        if now.workers and now.num_gpus and gpu_rows:
            table.queue(_rows_on_gpus(table, grid, now, gpu_rows))
        with stop_signals() as stop, shown as progress:
            if now.workers == 0:
                return drive_here(table, grid, store, work, expect, stop, progress)
            if gpus := ray.cluster_resources().get("GPU", 0):
                progress.note(
                    f"Each worker has {now.num_gpus:g} of the cluster's {gpus:g} GPUs "
                    "(workers.num_gpus)."
                )
            _say_room(now, table.pending, progress)
            actor = ray.remote(Worker).options(max_restarts=0, **worker_options(now))
            crew = RayCrew(now, lambda: actor.remote(work, store, grid, now, name), store.uri)
            write, metrics = dead_rows(store, grid, work), Metrics(name)
            driver = Driver(table, grid, now, crew, write, expect, progress, metrics)
            return driver.drive(stop, lock)

    return finish(store, groups, grid, settings, drive)


def _say_room(settings: RunSettings, leases: int, progress: Progress) -> None:
    """Say it if the cluster has room for some of the workers that are asked for, but not for all,
    and leases for more."""
    if settings.workers == "auto":
        return
    # Ray knows nothing of their memory, which bounds "auto" alone.
    fit, asked = workers_that_fit(replace(settings, memory_gib=0)), settings.workers
    if not 0 < fit < min(asked, leases):
        return
    others = "the others wait for a node"
    if started_here():
        others = (
            "no other node joins a Ray that a command starts for itself, so the others never come"
        )
    progress.note(
        f"There is room for {fit} of {asked} workers, each with "
        f"workers.num_cpus={settings.num_cpus:g} and workers.num_gpus={settings.num_gpus or 0:g}; "
        f"{others}."
    )


def dead_rows(store: Store, grid: Grid, work: Work) -> Callable[[Lease, str], object]:
    """What commits the row of a dead letter."""
    return lambda lease, error: write_part(store, grid, lease, work.dead_row(lease, error))


def finish(
    store: Store,
    groups: Sequence[str],
    grid: Grid,
    settings: RunSettings,
    drive: Callable[[LeaseTable, RunLock], bool],
    clock: Clock = REAL,
) -> Outcome:
    """Have `drive` do what no part holds, under the lock of the run directory.

    `drive` says whether it was stopped; it is not called where nothing is left to do. Raises what
    `run` raises.
    """
    started = clock.now()
    with RunLock(store, clock=clock) as lock:
        table = LeaseTable(store, groups, grid, settings.max_attempts, settings.retry_dead, clock)
        for part in table.set_aside:
            note(f"note: a damaged part is now {store.uri}/{part}; its rows are done again")
        stopped = False
        if not table.finished:
            stopped = drive(table, lock)
            table = LeaseTable(store, groups, grid, clock=clock)
        return Outcome(
            done=len(table.done),
            total=table.total,
            dead=[(*key, error) for key, error in sorted(table.dead.items())],
            duplicates=table.duplicates,
            stopped=stopped,
            seconds=clock.now() - started,
        )


def _rows_on_gpus(table: LeaseTable, grid: Grid, settings: RunSettings, most: int) -> int:
    """Rows of a lease, so few that each worker gets four of them, in multiples of the grid's.

    Of all records and not of those that are left, so that a resumed run has the same leases.
    """
    each = table.total // (4 * number_of_workers(settings))
    return max(grid.rows, min(most, each // grid.rows * grid.rows))
