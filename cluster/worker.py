"""The actor that does leases: pin a task, work, verify, commit one part, report."""

from __future__ import annotations

import faulthandler
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from cluster.lock import LOCK_NAME
from cluster.queue import Grid, Lease
from cluster.store import Store


class Task(Protocol):
    """What a worker does. Built once in each worker process, where it may pin a model."""

    def describe(self) -> dict[str, Any]:
        """Facts that must be the same in every worker of a run, such as a model's fingerprint."""

    def run(self, lease: Lease) -> pa.Table:
        """One row for each case id of the lease, in the order of the shard.

        The table has a column `case_id` and may have a column `error`, null for rows that are fine.
        An exception fails the lease: its records are done again one by one, and one that fails
        alone as often as the run allows becomes a dead letter.
        """

    def verify(self) -> None:
        """Raise if the state that leases share, such as weights, is not what it was at the start.

        Called after each lease, before its part is committed; if it raises, nothing is committed
        and the worker ends.
        """


@dataclass(frozen=True)
class Booted:
    """What `Worker.boot` found: the task's facts, or why there is no task."""

    facts: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True)
class Report:
    """What became of a lease; it is sent after the commit.

    errors: the committed dead letters by case id. failure: why nothing was committed. spoiled: the
    worker must not be used again.
    """

    errors: dict[int, str] = field(default_factory=dict)
    failure: str | None = None
    spoiled: bool = False


def describe_error(error: BaseException) -> str:
    """An exception in one line: what, and where it was raised."""
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    if frames := traceback.extract_tb(error.__traceback__):
        text += f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"
    return text


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End this process, with the tracebacks of its threads on stderr, if the block takes longer.

    faulthandler waits in a C thread, which also fires while native code holds the GIL.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Worker:
    """The body of the actor. No exception leaves it: the driver may be unable to unpickle one."""

    def __init__(
        self,
        make_task: Callable[[], Task],
        store: Store,
        grid: Grid,
        record_seconds: float,
        boot_seconds: float,
    ) -> None:
        self._make_task, self._store, self._grid = make_task, store, grid
        self._record_seconds, self._boot_seconds = record_seconds, boot_seconds
        self._task: Task | None = None
        self._spoiled: str | None = None

    def boot(self) -> Booted:
        """Build the task. Apart from `__init__`, so that its failure is a value, not a death."""
        try:
            with time_limit(self._boot_seconds):
                if not self._store.exists(LOCK_NAME):
                    raise FileNotFoundError(
                        f"node {os.uname().nodename} does not see {self._store.uri}/{LOCK_NAME}. "
                        "All nodes must share the run directory: use a shared folder or a URI "
                        "such as s3://bucket/folder."
                    )
                self._task = self._make_task()
                return Booted(self._task.describe())
        except Exception as error:
            return Booted(failure=describe_error(error))

    def work(self, lease: Lease) -> Report:
        """Do a lease and commit its part."""
        if self._spoiled or self._task is None:
            return Report(failure=self._spoiled or "the worker did not boot", spoiled=True)
        with time_limit(self._record_seconds * lease.rows):
            try:
                table, failure = self._task.run(lease), None
            except Exception as error:
                table, failure = None, describe_error(error)
            try:
                self._task.verify()
            except Exception as error:
                self._spoiled = describe_error(error)
                return Report(failure=self._spoiled, spoiled=True)
            if failure is not None:
                return Report(failure=failure)
            try:
                return Report(errors=self._commit(lease, table))
            except Exception as error:
                return Report(failure=describe_error(error))

    def _commit(self, lease: Lease, table: pa.Table) -> dict[int, str]:
        ids = table["case_id"].to_pylist()
        if ids != list(self._grid.ids(lease)):
            raise ValueError(
                "Task.run must return one row for each case id of the lease, in order: "
                f"expected {list(self._grid.ids(lease))}, got {ids}"
            )
        if "error" not in table.column_names or table["error"].null_count == lease.rows:
            self._store.write_table(lease.part, table)
            return {}
        # A dead letter is alone in its part, so that a retry replaces it (see cluster.queue).
        for row, single in enumerate(lease.singles()):
            self._store.write_table(single.part, table.slice(row, 1))
        errors = zip(ids, table["error"].to_pylist(), strict=True)
        return {case_id: error for case_id, error in errors if error is not None}
