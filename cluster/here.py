"""A run in this process, without Ray: for a debugger, a notebook, a first look in seconds."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pyarrow as pa

from cluster import told
from cluster.driver import RunError
from cluster.grid import Grid, Lease
from cluster.lease_log import kept_log, log_of
from cluster.progress import Progress
from cluster.queue import LeaseTable
from cluster.slots import described, difference
from cluster.store import DamagedError, Store, StoreError
from cluster.worker import Task, Work, commit, describe_error, write_part

_HERE = "here"

log = logging.getLogger(__name__)


def drive_here(
    table: LeaseTable,
    grid: Grid,
    store: Store,
    work: Work,
    expect: dict[str, Any] | None,
    stop: threading.Event,
    progress: Progress,
) -> bool:
    """Work until everything is done; returns whether `stop` ended it before.

    Records that fail become dead letters as in any run, with their traceback in the log. Nothing
    ends a record that takes too long: somebody may be looking at it in a debugger. Raises RunError
    where the task is not what is expected, and whatever its `verify` raises.
    """
    task = work.task()
    if expect is not None and (facts := task.describe()) != expect:
        raise RunError(difference(expect, facts))

    def under_way(rows: float) -> None:
        progress.update(len(table.done), len(table.dead), 1, 1, rows)

    under_way(0)
    while not table.finished and not stop.is_set():
        began = time.monotonic()
        lease = table.lease(_HERE)
        assert lease is not None
        try:
            with kept_log(store, log_of(lease)), told.heard(under_way):
                rows = _run(task, grid, lease)
        except (StoreError, DamagedError):
            raise
        except Exception as error:
            progress.note(f"{described(grid, lease)} failed: {describe_error(error)}")
            if (last := table.fail(_HERE, lease)) is not None:
                write_part(store, grid, last, work.dead_row(last, describe_error(error)))
                table.complete(_HERE, last, dict.fromkeys(grid.ids(last), describe_error(error)))
            task.verify()
            continue
        task.verify()
        errors, _ = commit(store, grid, lease, rows)
        table.complete(_HERE, lease, errors)
        progress.finished(lease.group, grid.size(lease), time.monotonic() - began)
        under_way(0)
    return not table.finished


def _run(task: Task, grid: Grid, lease: Lease) -> pa.Table:
    try:
        return task.run(lease)
    except (StoreError, DamagedError):
        raise
    except Exception:
        log.warning("%s failed", described(grid, lease), exc_info=True)
        raise
