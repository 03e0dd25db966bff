"""The driver: start workers, hand out leases, watch, resume, finish."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from cluster.driver import Driver, RunError, RunSettings
from cluster.lock import LockedError, RunLock
from cluster.progress import Progress
from cluster.queue import Grid, Lease, LeaseTable
from cluster.store import Store
from cluster.worker import Task, Worker

__all__ = ["LockedError", "Outcome", "RunError", "RunSettings", "ensure_ray", "once", "run"]

DeadRow = Callable[[Lease, str, int], pa.Table]
"""Makes the one row of a dead letter from its lease of one record, the error, and the attempts."""


@dataclass(frozen=True)
class Outcome:
    """What is in the store after a run, read from the store."""

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


def ensure_ray() -> None:
    """Join the cluster that RAY_ADDRESS names (as in a Ray job), else start Ray on this machine.

    Never joins by itself some other cluster that happens to run here.
    """
    if ray.is_initialized():
        return
    # Nothing of size passes through the object store. Workers' errors come back as values.
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=200_000_000,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )


def run(
    store: Store,
    groups: Sequence[str],
    grid: Grid,
    make_task: Callable[[], Task],
    dead_row: DeadRow,
    settings: RunSettings | None = None,
    expect: dict[str, Any] | None = None,
) -> Outcome:
    """Do every record of the grid for every group that has no row in the store yet.

    `make_task` is pickled and builds the task in each worker. `expect` is what the task's
    `describe()` must be. Ray is not touched where nothing is left to do. Raises LockedError while
    another driver works in `store`, ValueError where a part there is broken or of other data, and
    RunError where workers differ from `expect` or none can boot.
    """
    settings = settings or RunSettings()
    started = time.monotonic()
    with RunLock(store) as lock:
        table = LeaseTable(store, groups, grid, settings.max_attempts, settings.retry_dead)
        stopped = False
        if not table.finished:
            ensure_ray()
            with _stop_signals() as stop, Progress(table.total, len(table.done)) as progress:
                actor = ray.remote(Worker).options(max_restarts=0, **_resources(settings))
                limits = (settings.record_seconds, settings.boot_seconds)
                driver = Driver(
                    table,
                    grid,
                    settings,
                    spawn=lambda: actor.remote(make_task, store, grid, *limits),
                    bury=lambda lease, error: store.write_table(
                        lease.part, dead_row(lease, error, lease.attempt)
                    ),
                    expect=expect,
                    progress=progress,
                )
                stopped = driver.drive(stop, lock)
            table = LeaseTable(store, groups, grid)
        return Outcome(
            done=len(table.done),
            total=table.total,
            dead=[(*key, error) for key, error in sorted(table.dead.items())],
            duplicates=table.duplicates,
            stopped=stopped,
            seconds=time.monotonic() - started,
        )


def once(function: Callable[..., Any], *args: Any, settings: RunSettings) -> Any:
    """What a function answers where a worker of these settings would run. Raises RayError."""
    ensure_ray()
    return ray.get(ray.remote(function).options(**_resources(settings)).remote(*args))


def _resources(settings: RunSettings) -> dict[str, Any]:
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}  # Idle threads that spin slow their neighbours.
    if not settings.num_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # num_gpus=0 alone hides none.
    return {
        "num_cpus": settings.num_cpus,
        "num_gpus": settings.num_gpus,
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": environment},
    }


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
