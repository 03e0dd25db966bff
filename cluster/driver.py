"""The driver's loop: workers, their leases, their deaths."""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from cluster.crew import Crew, Lost
from cluster.grid import Grid, Lease
from cluster.lock import RunLock
from cluster.metrics import Metrics
from cluster.progress import LOG_SECONDS, Progress
from cluster.queue import LeaseTable
from cluster.settings import RunSettings
from cluster.slots import Slot, described, difference
from cluster.store import retry
from cluster.worker import Booted, Report

BOOT_FAILURES = 4
"""A run in which nothing works ends when one worker has failed to boot this often in a row."""
STOP_SECONDS = 25.0
"""Seconds that leases in flight have after SIGINT or SIGTERM: 30, less the time to end."""
LOOK_SECONDS = 2.0
"""Between two looks at the cluster's nodes, or at what workers tell of their leases."""
SLOW = 2.0
"""An idle worker copies a lease that has taken so many times as long as leases take."""
REST_SECONDS = 30.0
"""Longest pause of a worker that could not write before it tries again."""


_T = TypeVar("_T")


class RunError(RuntimeError):
    """The run cannot go on. What is done is in the store; the same command resumes."""


class Driver:
    """Keeps the workers of a run alive and the lease table moving."""

    def __init__(
        self,
        table: LeaseTable,
        grid: Grid,
        settings: RunSettings,
        crew: Crew,
        write_dead_row: Callable[[Lease, str], object],
        expect: dict[str, Any] | None,
        progress: Progress,
        metrics: Metrics,
    ) -> None:
        """write_dead_row: commits the dead row of a lease with its error."""
        self._table, self._grid, self._settings = table, grid, settings
        self._crew, self._clock = crew, crew.clock
        self._write_dead_row, self._expect = write_dead_row, expect
        self._progress, self._metrics = progress, metrics
        self._slots: list[Slot] = []
        self._looked, self._said_waiting = 0.0, -LOG_SECONDS
        self._asked, self._told = 0.0, dict[Lease, float]()
        self._draining: set[str] = set()
        self._record_seconds: deque[float] = deque(maxlen=64)
        self._failing_since: float | None = None

    def drive(self, stop: threading.Event, lock: RunLock) -> bool:
        """Work until everything is done; returns whether `stop` ended it before."""
        deadline = None
        try:
            while not self._table.finished:
                if lock.taken_by is not None:
                    raise RunError(f"Another driver took the run directory over: {lock.taken_by}.")
                if stop.is_set() and deadline is None:
                    deadline = self._clock.now() + STOP_SECONDS
                    self._progress.note(
                        f"Stopping: leases in flight have {STOP_SECONDS:g} s; "
                        "a second signal drops them. The same command resumes."
                    )
                if deadline is None:
                    self._look()
                    self._fill()
                elif not self._working() or self._clock.now() > deadline:
                    return True
                self._wait()
                self._expire()
                self._show()
            return False
        finally:
            for slot in self._slots:
                slot.end()

    def _look(self) -> None:
        """Look at the nodes: those that are there, those about to leave; add slots for new ones."""
        if self._clock.now() - self._looked < LOOK_SECONDS:
            return
        self._looked = self._clock.now()
        draining = self._crew.draining()
        for node in draining - self._draining:
            if workers := sum(slot.node == node for slot in self._slots):
                self._progress.note(
                    f"Node {node[:8]} will be taken away: its {workers} workers end their leases "
                    "and move to other nodes."
                )
        self._draining = draining
        fits, wanted = self._crew.fits(), self._settings.workers
        if not fits and self._looked - self._said_waiting >= LOG_SECONDS:
            self._said_waiting = self._looked
            self._progress.note(f"Waiting for a node to join: {self._crew.lacking()}.")
        # No more than there are leases.
        most = self._table.pending + sum(bool(slot.calls) for slot in self._slots)
        number = max(1, min(fits if wanted == "auto" else wanted, most))
        self._slots += [Slot(str(name), self._crew) for name in range(len(self._slots), number)]

    def _fill(self) -> None:
        """Replace dead workers while there is work for them, and hand out leases."""
        now = self._clock.now()
        # The last leases go round one by one, so that nobody hoards while others idle.
        depth = self._settings.in_flight if self._table.pending > len(self._slots) else 1
        # One for each worker first: a second lease in hand must not keep another worker idle.
        for held in range(1, depth + 1):
            for slot in self._slots:
                if now >= slot.rests_until:
                    self._supply(slot, held, now)

    def _supply(self, slot: Slot, held: int, now: float) -> None:
        """Start the worker of a slot, or see that it holds so many leases."""
        if slot.worker is None and self._table.pending and self._may_boot():
            slot.worker, boot = self._crew.start()
            slot.calls[boot] = None
        if slot.node in self._draining:
            if not slot.calls:
                slot.end()
            return
        if not slot.ready or len(slot.calls) >= held:
            return
        if lease := self._table.lease(slot.name) or (not slot.calls and self._copy(slot, now)):
            if not slot.calls:
                slot.since = now
            slot.calls[self._crew.work(slot.worker, lease)] = lease

    def _may_boot(self) -> bool:
        booting = sum(slot.worker is not None and not slot.ready for slot in self._slots)
        return booting < (self._settings.boots_at_once or len(self._slots))

    def _copy(self, idle: Slot, now: float) -> Lease | None:
        """A lease of a worker that is so slow that an idle one may be done with it before."""
        if not self._record_seconds:
            return None
        usual = statistics.median(self._record_seconds)
        for slot in self._slots:
            lease = slot.oldest
            if lease is None or now - slot.since < SLOW * usual * self._grid.size(lease) + 1:
                continue
            # A worker that stands still also has those behind it, for ever.
            for held in filter(None, slot.calls.values()):
                if held.attempt == 1 and self._table.copy(idle.name, held):
                    self._metrics.copied()
                    return held
        return None

    def _working(self) -> bool:
        return any(slot.ready and slot.calls for slot in self._slots)

    def _wait(self) -> None:
        """Handle the answers that are there, or the next one if it comes within half a second."""
        slots = {call: slot for slot in self._slots for call in slot.calls}
        if not slots:
            self._clock.sleep(0.1)
            return
        for call, answer in self._crew.answers(slots, 0.5):
            if call in slots[call].calls:  # One before it may have ended the worker.
                self._handle(slots[call], call, answer)

    def _handle(self, slot: Slot, call: Any, answer: Booted | Report | Lost) -> None:
        if isinstance(answer, Lost):
            self._lose(slot, answer.error, answer.node)
        elif isinstance(answer, Booted):
            self._booted(slot, call, answer)
        elif answer.blame == "worker":
            self._lose(slot, answer.failure or "")
        else:
            self._reported(slot, call, answer)

    def _booted(self, slot: Slot, call: Any, answer: Booted) -> None:
        if answer.failure is not None:
            self._lose(slot, answer.failure)
            return
        if self._expect is not None and answer.facts != self._expect:
            raise RunError(difference(self._expect, answer.facts))
        del slot.calls[call]
        slot.ready, slot.failures, slot.node = True, 0, answer.node
        self._metrics.stages({"boot": answer.seconds})

    def _reported(self, slot: Slot, call: Any, report: Report) -> None:
        lease, began = slot.calls.pop(call), slot.since
        slot.since = self._clock.now()
        assert lease is not None
        if report.failure is None:
            self._record_seconds.append((slot.since - began) / self._grid.size(lease))
            self._progress.finished(lease.group, self._grid.size(lease), slot.since - began)
            self._failing_since, slot.failures = None, 0
            new = self._table.complete(slot.name, lease, report.errors)
            self._metrics.finished(new, len(report.errors) if new else 0, report.written)
            self._metrics.stages(report.seconds)
        elif report.blame == "store":
            self._store_failed(slot, lease, report.failure)
        else:
            self._note(f"{described(self._grid, lease)} failed: {report.failure}", lease)
            self._settle(self._table.fail(slot.name, lease), report.failure, lease)

    def _store_failed(self, slot: Slot, lease: Lease, error: str) -> None:
        """Nobody's lease is to blame: wait for the store, but not for ever."""
        self._table.give_back(slot.name, lease)
        now, limit = self._clock.now(), self._settings.store_seconds
        if self._failing_since is None:
            self._failing_since = now
            self._note(f"The store fails; trying for {limit:g} s: {error}", lease)
        if now - self._failing_since > limit:
            raise RunError(
                f"The store has failed for {limit:g} s: {error}. When it works again (free space, "
                "mend the connection, restore the file), the same command goes on."
            )
        slot.rest(REST_SECONDS)

    def _lose(self, slot: Slot, error: str, node_lost: bool = False) -> None:
        """A worker is dead or must be: give its leases back and see that it is replaced."""
        oldest, was_ready = slot.oldest, slot.ready
        seconds = self._clock.now() - slot.since
        slot.end()
        self._metrics.lost()
        if not was_ready:
            slot.rest(60.0)
            self._progress.note(f"Worker {slot.name} did not boot: {error}")
            if slot.failures >= BOOT_FAILURES and not any(other.ready for other in self._slots):
                raise RunError(f"No worker boots; the last error was: {error}")
            return
        if oldest is not None and seconds >= self._limit(oldest):
            error = f"no result within {self._limit(oldest):g} s; {error}"
        during = described(self._grid, oldest) if oldest else "nothing"
        self._note(f"Worker {slot.name} ended during {during}: {error}", oldest)
        lost = self._retry(lambda: self._table.lose(slot.name, node_lost, oldest))
        self._settle(lost, error, oldest)

    def _settle(self, exhausted: Lease | None, error: str, failed: Lease | None) -> None:
        """Write the dead letter of a lease that had its last try."""
        if exhausted is None:
            if failed is not None:
                self._metrics.retried(failed.rows)
            return
        self._retry(lambda: self._write_dead_row(exhausted, error))
        errors = dict.fromkeys(self._grid.ids(exhausted), error)
        self._table.complete("", exhausted, errors)
        self._metrics.finished(exhausted.rows, exhausted.rows, 0)

    def _retry(self, call: Callable[[], _T]) -> _T:
        return retry(call, self._settings.store_seconds, self._clock)

    def _limit(self, lease: Lease) -> float:
        return self._settings.record_seconds * self._grid.size(lease)

    def _expire(self) -> None:
        """End workers whose oldest lease is long overdue, which their own watchdog missed."""
        for slot in self._slots:
            oldest = slot.oldest
            if oldest and self._clock.now() - slot.since > 2 * self._limit(oldest) + 60:
                self._lose(slot, "the worker did not end itself")

    def _note(self, text: str, lease: Lease | None) -> None:
        fields = {"lease": lease.part, "case_ids": list(self._grid.ids(lease))} if lease else {}
        self._progress.note(text, **fields)

    def _show(self) -> None:
        ready, done = sum(slot.ready for slot in self._slots), len(self._table.done)
        under_way = {lease for slot in self._slots if slot.ready and (lease := slot.oldest)}
        if self._clock.now() - self._asked >= LOOK_SECONDS:
            self._asked = self._clock.now()
            # What was told stays until the lease ends: the worker takes it back a little before.
            self._told |= self._crew.told(under_way)
        self._told = {lease: rows for lease, rows in self._told.items() if lease in under_way}
        inside = sum(self._told.values())
        self._progress.update(done, len(self._table.dead), ready, len(self._slots), inside)
        self._metrics.now(
            left=self._table.total - done,
            in_flight=sum(len(slot.calls) for slot in self._slots if slot.ready),
            pending=self._table.pending,
            ready=ready,
            wanted=len(self._slots),
        )
