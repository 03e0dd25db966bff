"""The driver's loop: workers, their leases, their deaths."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import ray

from cluster.lock import RunLock
from cluster.progress import Progress
from cluster.queue import Grid, Lease, LeaseTable
from cluster.worker import Booted, Report

BOOT_FAILURES = 4
"""A run in which nothing works ends when one worker has failed to boot this often in a row."""
STOP_SECONDS = 30.0
"""How long leases in flight may go on after SIGINT or SIGTERM."""


class RunError(RuntimeError):
    """The run cannot go on. What is done is in the store; the same command resumes."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a run uses the cluster; none of it changes a result."""

    workers: int | Literal["auto"] = "auto"
    """`"auto"`: as many as fit into the cluster when the run starts."""
    num_cpus: float = 1
    num_gpus: float = 0
    """Of one worker; a fraction shares a GPU. With 0, the worker sees no GPU."""
    max_attempts: int = 3
    """How often a record may fail while alone before it becomes a dead letter."""
    in_flight: int = 2
    """Leases that a worker has at a time: one that it does and the next ones."""
    record_seconds: float = 600
    """A worker that takes longer than this times the records of its lease ends itself."""
    boot_seconds: float = 1800
    """A worker that takes longer to build its task ends itself."""
    retry_dead: bool = False
    """Do dead letters of former runs again."""


@dataclass
class _Slot:
    """A place for a worker, filled again when its worker dies.

    calls: what the worker was asked for, oldest first; None stands for its boot. since: when the
    oldest of them began. failures: boots that failed in a row. spawn_at: not to be filled before.
    """

    name: str
    worker: Any = None
    ready: bool = False
    calls: dict[ray.ObjectRef[Any], Lease | None] = field(default_factory=dict)
    since: float = 0.0
    failures: int = 0
    spawn_at: float = 0.0


class Driver:
    """Keeps the workers of a run alive and the lease table moving."""

    def __init__(
        self,
        table: LeaseTable,
        grid: Grid,
        settings: RunSettings,
        spawn: Callable[[], Any],
        bury: Callable[[Lease, str], None],
        expect: dict[str, Any] | None,
        progress: Progress,
    ) -> None:
        """spawn: makes a worker. bury: commits the dead letter of a lease with its error."""
        self._table, self._grid, self._settings = table, grid, settings
        self._spawn, self._bury, self._expect, self._progress = spawn, bury, expect, progress
        self._slots = [_Slot(str(number)) for number in range(self._number_of_workers())]

    def drive(self, stop: threading.Event, lock: RunLock) -> bool:
        """Work until everything is done; returns whether `stop` ended it before."""
        deadline = None
        try:
            while not self._table.finished:
                if lock.taken_by is not None:
                    raise RunError(f"Another driver took the run directory over: {lock.taken_by}.")
                if stop.is_set() and deadline is None:
                    deadline = time.monotonic() + STOP_SECONDS
                    self._progress.note(
                        f"Stopping: leases in flight have {STOP_SECONDS:g} s; "
                        "a second signal drops them. The same command resumes."
                    )
                if deadline is None:
                    self._fill()
                elif not self._working() or time.monotonic() > deadline:
                    return True
                self._wait()
                self._expire()
                self._show()
            return False
        finally:
            for slot in self._slots:
                self._end(slot)

    def _number_of_workers(self) -> int:
        """What the settings say, but no more than there are leases."""
        wanted, fits = self._settings.workers, _workers_that_fit(self._settings)
        if not fits:
            self._progress.note(
                f"No node has room for a worker (num_cpus={self._settings.num_cpus:g}, "
                f"num_gpus={self._settings.num_gpus:g}); waiting for one to join."
            )
        return max(1, min(fits if wanted == "auto" else wanted, self._table.pending))

    def _fill(self) -> None:
        """Replace dead workers while there is work for them, and hand out leases."""
        now = time.monotonic()
        # The last leases go round one by one, so that nobody hoards while others idle.
        depth = self._settings.in_flight if self._table.pending > len(self._slots) else 1
        for slot in self._slots:
            if slot.worker is None and self._table.pending and now >= slot.spawn_at:
                slot.worker = self._spawn()
                slot.calls[slot.worker.boot.remote()] = None
            while slot.ready and len(slot.calls) < depth:
                if (lease := self._table.lease(slot.name)) is None:
                    break
                if not slot.calls:
                    slot.since = now
                slot.calls[slot.worker.work.remote(lease)] = lease

    def _working(self) -> bool:
        return any(slot.ready and slot.calls for slot in self._slots)

    def _wait(self) -> None:
        """Handle the next answer, if one comes within half a second."""
        slots = {ref: slot for slot in self._slots for ref in slot.calls}
        if not slots:
            time.sleep(0.1)
            return
        for ref in ray.wait(list(slots), timeout=0.5)[0]:
            self._handle(slots[ref], ref)

    def _handle(self, slot: _Slot, ref: ray.ObjectRef[Any]) -> None:
        try:
            answer: Booted | Report = ray.get(ref)
        # Not only RayActorError: OutOfMemoryError is none, and an answer may fail to unpickle.
        except Exception as error:
            self._lose(slot, _in_one_line(error))
            return
        if isinstance(answer, Booted):
            self._booted(slot, ref, answer)
        elif answer.spoiled:
            self._lose(slot, answer.failure or "")
        else:
            lease = slot.calls.pop(ref)
            slot.since = time.monotonic()
            assert lease is not None
            if answer.failure is None:
                self._table.complete(slot.name, lease, answer.errors)
            else:
                self._progress.note(f"{_what(self._grid, lease)} failed: {answer.failure}")
                self._settle(self._table.fail(slot.name, lease), answer.failure)

    def _booted(self, slot: _Slot, ref: ray.ObjectRef[Any], answer: Booted) -> None:
        if answer.failure is not None:
            self._lose(slot, answer.failure)
            return
        if self._expect is not None and answer.facts != self._expect:
            raise RunError(_difference(self._expect, answer.facts))
        del slot.calls[ref]
        slot.ready, slot.failures = True, 0

    def _lose(self, slot: _Slot, error: str) -> None:
        """A worker is dead or must be: give its leases back and see that it is replaced."""
        oldest = next(iter(slot.calls.values()), None)
        was_ready, seconds = slot.ready, time.monotonic() - slot.since
        self._end(slot)
        if not was_ready:
            slot.failures += 1
            self._progress.note(f"Worker {slot.name} did not boot: {error}")
            if slot.failures >= BOOT_FAILURES and not any(other.ready for other in self._slots):
                raise RunError(f"No worker boots; the last error was: {error}")
            slot.spawn_at = time.monotonic() + min(60.0, 2.0 ** (slot.failures - 1))
            return
        if oldest is not None and seconds >= self._limit(oldest):
            error = f"no result within {self._limit(oldest):g} s; {error}"
        what = _what(self._grid, oldest) if oldest else "nothing"
        self._progress.note(f"Worker {slot.name} ended during {what}: {error}")
        self._settle(self._table.lose(slot.name), error)

    def _settle(self, exhausted: Lease | None, error: str) -> None:
        """Write the dead letter of a lease that had its last try."""
        if exhausted is not None:
            self._bury(exhausted, error)
            errors = dict.fromkeys(self._grid.ids(exhausted), error)
            self._table.complete("", exhausted, errors)

    def _limit(self, lease: Lease) -> float:
        return self._settings.record_seconds * lease.rows

    def _expire(self) -> None:
        """End workers whose oldest lease is long overdue, which their own watchdog missed."""
        for slot in self._slots:
            oldest = next(iter(slot.calls.values()), None)
            if oldest and time.monotonic() - slot.since > 2 * self._limit(oldest) + 60:
                self._lose(slot, "the worker did not end itself")

    def _end(self, slot: _Slot) -> None:
        if slot.worker is not None:
            with suppress(Exception):  # It may be dead, and so may the cluster.
                ray.kill(slot.worker)
        slot.worker, slot.ready = None, False
        slot.calls.clear()

    def _show(self) -> None:
        ready = sum(slot.ready for slot in self._slots)
        self._progress.update(len(self._table.done), len(self._table.dead), ready, len(self._slots))


def _workers_that_fit(settings: RunSettings) -> int:
    there: dict[str, float] = ray.cluster_resources()
    needs = {"CPU": settings.num_cpus, "GPU": settings.num_gpus}
    # The small term is for fractions: 1 // 0.1 is 9.
    fits = [int(there.get(name, 0) / need + 1e-9) for name, need in needs.items() if need]
    return min(fits, default=1)


def _what(grid: Grid, lease: Lease) -> str:
    ids = grid.ids(lease)
    cases = f"case {ids[0]}" if len(ids) == 1 else f"cases {ids[0]} to {ids[-1]}"
    return f"{cases} of {lease.group} (attempt {lease.attempt})"


def _difference(expect: dict[str, Any], facts: dict[str, Any]) -> str:
    lines = [
        f"  {name}: the run has {expect.get(name)!r}, the worker has {facts.get(name)!r}"
        for name in sorted(expect.keys() | facts.keys())
        if expect.get(name) != facts.get(name)
    ]
    return "\n".join(["A worker is not what the run's manifest says:", *lines])


def _in_one_line(error: BaseException) -> str:
    """Ray's errors without the ids before and the guesses after what Ray knows."""
    text = " ".join(str(error).split()).partition(" Some common causes")[0]
    known = max(text.find("The actor is dead because"), 0)
    return f"{type(error).__name__}: {text[known:]}"[:1000]
