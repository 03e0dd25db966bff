"""The actor that does leases: pin a task, work, verify, commit one part, report."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import ray

from cluster import lease_log, told
from cluster.clock import REAL, Clock
from cluster.grid import Grid, Lease
from cluster.lease_log import kept_log
from cluster.lock import LOCK_NAME
from cluster.settings import RunSettings
from cluster.store import DamagedError, Store, StoreError, retry
from cluster.words import shown

COMMIT_SECONDS = 5.0
"""A worker tries again for so long before it gives a lease back that it cannot commit."""
COMMIT_LIMIT = 600.0
"""A worker whose commit hangs for so long ends itself."""
GRACE = 3.0
"""Seconds that a worker has for its last words."""
STAGE = "seconds_"
"""Columns of rows that start so are a record's seconds in a stage."""

log = logging.getLogger(__name__)


class Task(Protocol):
    """The work of a worker. Built once in each worker process, where it may pin a model."""

    def describe(self) -> dict[str, Any]:
        """Facts that must be the same in every worker of a run, such as a model's fingerprint."""

    def run(self, lease: Lease) -> pa.Table:
        """One row for each case id of the lease, in the order of the shard.

        It may say how far it is by `cluster.told.tell`.
        The table has a column `case_id` and may have a column `error`, null for rows that are fine.
        An exception fails the lease: its records are done again one by one, and one that fails
        alone as often as the run allows becomes a dead letter. Only StoreError and
        DamagedError blame no record.
        """

    def verify(self) -> None:
        """Raise if the state that leases share, such as weights, is not what it was at the start.

        Called after each lease, before its part is committed; if it raises, nothing is committed
        and the worker ends.
        """


class Work(Protocol):
    """A run's work, small enough to be pickled and sent to each worker."""

    def task(self) -> Task:
        """Build the task, in a worker."""

    def dead_row(self, lease: Lease, error: str) -> pa.Table:
        """The one row of a dead letter, from its lease of one record after its last attempt."""


@dataclass(frozen=True)
class Booted:
    """The answer of `Worker.boot`: the task's facts and its node, or why there is no task."""

    facts: dict[str, Any] = field(default_factory=dict)
    node: str = ""
    failure: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """The outcome of a lease; it is sent after the commit.

    errors: the committed dead letters by case id. failure: why nothing was committed, through whose
    fault `blame` says: that of a record, of the worker, which must not be used again, or of the
    store. seconds: by stage. written: bytes.
    """

    errors: dict[int, str] = field(default_factory=dict)
    failure: str | None = None
    blame: Literal["record", "worker", "store"] = "record"
    seconds: dict[str, float] = field(default_factory=dict)
    written: int = 0


def describe_error(error: BaseException) -> str:
    """An exception in one line: what, and where it was raised."""
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    if frames := traceback.extract_tb(error.__traceback__):
        text += f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"
    return shown(text)


@contextmanager
def time_limit(seconds: float, store: Store, name: str) -> Iterator[None]:
    """End this process if the block takes longer, with the tracebacks of its threads in the log
    `name` of the store, or on stderr where native code holds the GIL.

    faulthandler waits in a C thread, which also fires then.
    """

    def last_words() -> None:
        lease_log.write(store, name, f"not done within {seconds:g} s\n{lease_log.stacks()}")

    timer = threading.Timer(seconds, last_words)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()


class Worker:
    """The body of the actor. No exception leaves it: the driver may be unable to unpickle one."""

    def __init__(
        self,
        work: Work,
        store: Store,
        grid: Grid,
        settings: RunSettings,
        name: str,
        clock: Clock = REAL,
    ) -> None:
        """name: of the run, for the logs."""
        self._work, self._store, self._grid = work, store, grid
        self._settings, self._name, self._clock = settings, name, clock
        self._task: Task | None = None
        self._spoiled: str | None = None

    def boot(self) -> Booted:
        """Build the task. Apart from `__init__`, so that its failure is a value, not a death."""
        name = f"boot-{lease_log.process()}.log"
        with self._log(name):
            return self._boot(name)

    def _boot(self, name: str) -> Booted:
        started = self._clock.now()
        try:
            with self._limit(self._settings.boot_seconds, name):
                if not self._store.exists(LOCK_NAME):
                    raise FileNotFoundError(
                        f"node {os.uname().nodename} does not see {self._store.uri}/{LOCK_NAME}. "
                        "All nodes must share the run directory: use a shared folder or a URI "
                        "such as s3://bucket/folder."
                    )
                self._task = self._work.task()
                facts, node = self._task.describe(), self._node()
                return Booted(facts, node, seconds=self._clock.now() - started)
        except Exception as error:
            log.warning("the worker did not boot", exc_info=error)
            return Booted(failure=describe_error(error))

    def _limit(self, seconds: float, name: str) -> AbstractContextManager[None]:
        return time_limit(seconds, self._store, name)

    def _log(self, name: str) -> AbstractContextManager[None]:
        return kept_log(self._store, name)

    def _heard(self, lease: Lease) -> AbstractContextManager[None]:
        return told.heard_by_driver(self._store.uri, lease)

    def _node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def work(self, lease: Lease) -> Report:
        """Do a lease and commit its part."""
        if self._spoiled or self._task is None:
            return Report(failure=self._spoiled or "the worker did not boot", blame="worker")
        name = lease_log.log_of(lease)
        with self._log(name):
            report = self._do(self._task, lease, name)
        log.info(
            report.failure or "lease done",
            extra={
                "run": self._name,
                "lease": lease.part,
                "attempt": lease.attempt,
                "case_ids": list(self._grid.ids(lease)),
                "dead_letters": list(report.errors),
                "seconds": report.seconds,
            },
        )
        return report

    def _do(self, task: Task, lease: Lease, name: str) -> Report:
        failure: Report | None = None
        started = self._clock.now()
        with self._limit(self._settings.record_seconds * self._grid.size(lease), name):
            try:
                with self._heard(lease):
                    table = task.run(lease)
            except (StoreError, DamagedError) as error:
                failure = Report(failure=describe_error(error), blame="store")
            except Exception as error:
                log.warning("the lease failed", exc_info=error)
                failure = Report(failure=describe_error(error))
            ran = self._clock.now()
            try:
                task.verify()
            except Exception as error:
                log.warning("the worker is not as it was", exc_info=error)
                self._spoiled = describe_error(error)
                return Report(failure=self._spoiled, blame="worker")
        if failure is not None:
            return failure
        verified = self._clock.now()
        try:
            with self._limit(COMMIT_LIMIT, name):
                errors, written = commit(self._store, self._grid, lease, table, self._clock)
        except StoreError as error:
            return Report(failure=describe_error(error), blame="store")
        except Exception as error:
            log.warning("the lease could not be committed", exc_info=error)
            return Report(failure=describe_error(error))
        seconds = {
            "run": ran - started,
            "verify": verified - ran,
            "commit": self._clock.now() - verified,
            **_stages(table),
        }
        return Report(errors, seconds=seconds, written=written)


def commit(
    store: Store, grid: Grid, lease: Lease, table: pa.Table, clock: Clock = REAL
) -> tuple[dict[int, str], int]:
    """Write the rows of a lease. The dead letters of what was written, and its bytes.

    Raises ValueError where the rows are not those of the lease, and StoreError.
    """
    ids = table["case_id"].to_pylist()
    if ids != list(grid.ids(lease)):
        raise ValueError(
            "Task.run must return one row for each case id of the lease, in order: "
            f"expected {list(grid.ids(lease))}, got {ids}"
        )

    def write(lease: Lease, table: pa.Table) -> int:
        return retry(lambda: write_part(store, grid, lease, table), COMMIT_SECONDS, clock)

    if "error" not in table.column_names or table["error"].null_count == lease.rows:
        return {}, write(lease, table)
    # A dead letter is alone in its part, so that a retry replaces it (see cluster.queue).
    singles = enumerate(lease.singles())
    written = sum(write(single, table.slice(row, 1)) for row, single in singles)
    errors = zip(ids, table["error"].to_pylist(), strict=True)
    return {case_id: error for case_id, error in errors if error is not None}, written


def write_part(store: Store, grid: Grid, lease: Lease, table: pa.Table) -> int:
    """Commit the part of a lease, which says what it is of; its bytes."""
    return store.write_table(lease.part, grid.origin.on(table, lease.group))


def _stages(table: pa.Table) -> dict[str, float]:
    names = [name for name in table.column_names if name.startswith(STAGE)]
    sums = {name.removeprefix(STAGE): pc.sum(table[name]).as_py() for name in names}
    return {name: seconds for name, seconds in sums.items() if seconds is not None}
