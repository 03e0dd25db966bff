"""The driver: start workers, hand out leases, watch, resume, finish."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.authentication import authentication_token_setup
from ray.exceptions import RayError, RayTaskError

from cluster.clock import REAL, Clock
from cluster.crew import RayCrew
from cluster.driver import Driver, RunError
from cluster.grid import Grid, Lease
from cluster.here import drive_here
from cluster.lock import LockedError, RunLock
from cluster.metrics import Metrics
from cluster.nodes import lacking, started_here, worker_options, workers_that_fit
from cluster.progress import LOG_SECONDS, Progress
from cluster.queue import LeaseTable
from cluster.settings import RunSettings
from cluster.store import Store
from cluster.words import deliberate, printable, redacted
from cluster.worker import Work, Worker, write_part

__all__ = [
    "FAILURES",
    "LockedError",
    "Outcome",
    "RunError",
    "RunSettings",
    "ensure_ray",
    "once",
    "run",
    "stream",
]

FAILURES = (LockedError, RunError, RayError)
"""The errors that `run`, `once` and `stream` raise beside ValueError and OSError."""


class FaultError(RuntimeError):
    """A worker's function failed by a fault of this project; the message is its traceback."""


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


def ensure_ray(settings: RunSettings) -> None:
    """Join the cluster that RAY_ADDRESS names (as in a Ray job), else start Ray on this machine.

    Never joins by itself some other cluster that happens to run here.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if settings.logs == "json":
        quiet["logging_config"] = ray.LoggingConfig(encoding="JSON")
    # Nothing of size passes through the object store. Workers' errors come back as values.
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # As on Windows and macOS: at 127.0.0.1, where Ray listens alone, and not at the address by
        # which others reach this machine.
        ray_constants.ENABLE_RAY_CLUSTER = False
        quiet["_node_ip_address"] = "127.0.0.1"
        # Ray says at length that only this user gets in, which is as it should be.
        authentication_token_setup.logger.addFilter(
            lambda record: not record.getMessage().startswith("Token authentication is enabled")
        )
        ray.init(address="local", include_dashboard=False, object_store_memory=200_000_000, **quiet)


def joined(settings: RunSettings) -> RunSettings:
    """Join the cluster as `ensure_ray` does; the settings with what the cluster decides.

    Raises ValueError where Ray was started here and this machine cannot hold a worker.
    """
    ensure_ray(settings)
    if settings.num_gpus is None:
        settings = replace(settings, num_gpus=int(ray.cluster_resources().get("GPU", 0) >= 1))
    if started_here() and (lack := lacking(settings)):
        raise ValueError(
            f"{lack}, and no other node joins a Ray that a command starts for itself. Set "
            "workers.num_gpus=0 to work on CPUs and workers.num_cpus to what there is; or join a "
            "cluster that has more (RAY_ADDRESS)"
        )
    return settings


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
        with _stop_signals() as stop, shown as progress:
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
            _note(f"note: a damaged part is now {store.uri}/{part}; its rows are done again")
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


def _note(text: str) -> None:
    print(printable(redacted(text)), file=sys.stderr)


def _rows_on_gpus(table: LeaseTable, grid: Grid, settings: RunSettings, most: int) -> int:
    """Rows of a lease, so few that each worker gets four of them, in multiples of the grid's.

    Of all records and not of those that are left, so that a resumed run has the same leases.
    """
    each = table.total // (4 * number_of_workers(settings))
    return max(grid.rows, min(most, each // grid.rows * grid.rows))


def number_of_workers(settings: RunSettings) -> int:
    """The workers that a run has now: those asked for, or those that fit; at least one, which
    stands for this process if there are to be none."""
    if settings.workers != "auto":
        return max(settings.workers, 1)
    return max(workers_that_fit(joined(settings)), 1)


def once(function: Callable[..., Any], *args: Any, settings: RunSettings) -> Any:
    """Call a function in a worker of these settings and return its answer.

    Raises the error that it raises if that is meant for the user (see `words.deliberate`), and
    FaultError in place of others, and RayError where the worker dies; without workers it is called
    here, and raises what it raises.
    """
    if settings.workers == 0:
        return function(*args)
    settings = joined(settings)
    ref = ray.remote(_called).options(**worker_options(settings)).remote(function, *args)
    _await(ref, settings)
    return _answer(ref)


def _await(first: Any, settings: RunSettings) -> None:
    """Wait for a task's first value, and say every ten seconds if no node has room for it."""
    while not ray.wait([first], timeout=LOG_SECONDS, fetch_local=False)[0]:
        if lack := lacking(settings):
            _note(f"waiting for a node to join: {lack}")


def _called(function: Callable[..., Any], *args: Any) -> Any:
    with _told_apart():
        return function(*args)


def _generated(function: Callable[..., Any], *args: Any) -> Iterator[Any]:
    with _told_apart():
        yield from function(*args)


@contextmanager
def _told_apart() -> Iterator[None]:
    """Errors meant for the user from those that are not, in a worker: on the way to the driver they
    lose where they were raised."""
    try:
        yield
    except Exception as error:
        if deliberate(error):
            raise
        text = "".join(traceback.format_exception(error))
        raise FaultError(f"in a worker:\n{printable(redacted(text))}") from None


def _answer(ref: ray.ObjectRef[Any]) -> Any:
    """Get a task's answer, or raise what ended it, without Ray's traceback."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise


def stream(function: Callable[..., Any], *args: Any, settings: RunSettings) -> Iterator[Any]:
    """Run a generator function in a worker of these settings and yield its values as they come.

    Ends early after SIGINT or SIGTERM. Raises as `once` does.
    """
    if settings.workers != 0:
        settings = joined(settings)
    with _stop_signals() as stop:
        for value in _values(function, args, settings):
            yield value
            if stop.is_set():
                return


def _values(
    function: Callable[..., Any], args: Sequence[Any], settings: RunSettings
) -> Iterator[Any]:
    if settings.workers == 0:
        return iter(function(*args))
    # A retry would yield again from its own start, which Ray takes for what it has seen.
    options = {"num_returns": "streaming", "max_retries": 0, **worker_options(settings)}
    values = ray.remote(_generated).options(**options).remote(function, *args)
    _await(values, settings)
    return map(_answer, values)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second raises KeyboardInterrupt."""
    stop = threading.Event()

    def on_signal(_signal: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
