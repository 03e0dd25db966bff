"""Mistakes that a scheduler could have, to see whether a simulation finds them.

Each puts a few lines of the real code as somebody might have written them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pyarrow as pa

from cluster import index, queue, worker
from cluster.driver import Driver
from cluster.grid import Grid, Lease
from cluster.queue import LeaseTable
from cluster.store import Store
from cluster.worker import Report
from jobs.runs import manifests
from tests.support import simulation
from tests.support.in_words import in_words

Mistake = Callable[[], AbstractContextManager[object]]


def part_named_by_attempt() -> AbstractContextManager[object]:
    """Late writers and retries write beside each other."""

    def part(lease: Lease) -> str:
        rows = f"{lease.shard:05d}-{lease.start:06d}-{lease.stop:06d}"
        return f"{lease.group}/part-{rows}-{lease.attempt}.parquet"

    return patch.object(Lease, "part", property(part))


def reported_before_the_commit() -> AbstractContextManager[object]:
    """A worker answers while its part is still being written."""

    def early(
        store: Store, grid: Grid, lease: Lease, table: pa.Table, clock: Any
    ) -> tuple[dict[int, str], int]:
        clock.start(lambda: commit(store, grid, lease, table, clock))
        errors = zip(table["case_id"].to_pylist(), table["error"].to_pylist(), strict=True)
        return {case_id: error for case_id, error in errors if error is not None}, 0

    commit = worker.commit
    return patch.object(worker, "commit", early)


def manifest_written_without_the_lock() -> AbstractContextManager[object]:
    """Of two drivers that begin at once, one has the manifest and the other the rows."""

    def claim(store: Store, manifest: dict[str, Any], *_: object) -> dict[str, Any]:
        manifests.write(store, manifest)
        return manifest

    return patch.object(manifests, "claim", claim)


def retry_that_takes_the_old_letter_for_the_new() -> AbstractContextManager[object]:
    """A worker that dies during a retry ends it: the old dead letter looks like its commit."""

    def mark(table: LeaseTable, errors: Any) -> None:
        table._retrying = table._retrying if not hasattr(table, "_queues") else set()
        right(table, errors)

    right = LeaseTable._mark
    return patch.object(LeaseTable, "_mark", mark)


def newest_lease_blamed() -> AbstractContextManager[object]:
    """A death is blamed on what the worker had not begun."""

    def lose(table: LeaseTable, name: str, *how: Any) -> Lease | None:
        table._queues.get(name, deque()).reverse()
        return right(table, name, *how)

    right = LeaseTable.lose
    return patch.object(LeaseTable, "lose", lose)


def nodes_deaths_blamed() -> AbstractContextManager[object]:
    """A record pays for a node that was lost."""
    return patch.object(queue, "NODE_LOSSES", 0)


def store_blamed_on_records() -> AbstractContextManager[object]:
    """Records out of sight become dead letters."""

    def reported(driver: Driver, slot: Any, call: Any, report: Report) -> None:
        right(driver, slot, call, replace(report, blame="record") if report.failure else report)

    right = Driver._reported
    return patch.object(Driver, "_reported", reported)


def files_that_are_missing_blamed_on_records() -> AbstractContextManager[object]:
    """A file out of sight is nobody's fault that a worker knows of."""
    return patch.object(simulation, "MissingError", FileNotFoundError)


def death_without_a_look_at_the_store() -> AbstractContextManager[object]:
    """What a worker committed before it died is done again, in other parts."""
    return patch.object(LeaseTable, "_committed", lambda *_: False)


def damage_believed_at_once() -> AbstractContextManager[object]:
    """A part that is being written is moved away."""
    return patch.object(queue, "WRITTEN_SECONDS", 0.0)


def attempts_without_end() -> AbstractContextManager[object]:
    """A record that fails alone is tried for ever."""

    def again(table: LeaseTable, lease: Lease) -> Lease | None:
        last = right(table, lease)
        if last is not None:
            table._pending.append(lease)
        return None

    right = LeaseTable._again
    return patch.object(LeaseTable, "_again", again)


def dead_letter_without_a_row() -> AbstractContextManager[object]:
    """The driver counts a dead letter that it has not written."""

    def settle(driver: Driver, exhausted: Lease | None, error: str, failed: Lease | None) -> None:
        driver._write_dead_row = lambda *_: None
        right(driver, exhausted, error, failed)

    right = Driver._settle
    return patch.object(Driver, "_settle", settle)


def index_believed_without_a_look() -> AbstractContextManager[object]:
    """What was once read of a part counts, whatever became of it."""

    def known(store: Store, parts: Any) -> Any:
        rows = read.setdefault(store.__dict__["disk"], {})
        return {name: rows[name] for name in parts if name in rows}

    def save(store: Store, parts: Any, rows: Any) -> None:
        read.setdefault(store.__dict__["disk"], {}).update(rows)

    read: dict[object, dict[str, Any]] = {}
    return patch.multiple(index, known=known, save=save)


MISTAKES: dict[str, Mistake] = in_words(
    part_named_by_attempt,
    reported_before_the_commit,
    manifest_written_without_the_lock,
    retry_that_takes_the_old_letter_for_the_new,
    newest_lease_blamed,
    nodes_deaths_blamed,
    store_blamed_on_records,
    files_that_are_missing_blamed_on_records,
    death_without_a_look_at_the_store,
    damage_believed_at_once,
    attempts_without_end,
    dead_letter_without_a_row,
    index_believed_without_a_look,
)
