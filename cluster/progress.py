"""Live progress: a bar on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import unquote

import rich.progress

from cluster.words import PlainConsole, shown

LOG_SECONDS = 10.0
_LINES = 16
"""Editors, or checkpoints of chains, at most that have a line of their own."""
_SHARES = (1 / 3, 2 / 3)
"""Of the rows that were left, those after which the results so far are shown."""
WIDE = 100
"""Columns of a terminal that shows a line for each editor."""
# Weight of the newest lease in a group's seconds a row.
_NEWEST = 0.3

log = logging.getLogger(__name__)


class Rate:
    """Records per second over the last `window` changes; rows of former runs do not count."""

    def __init__(self, window: int = 32) -> None:
        self._changes: deque[tuple[float, int]] = deque(maxlen=window)

    def add(self, now: float, done: int) -> None:
        """Tell how many rows there are at a time; the first call only sets the origin."""
        if not self._changes or done > self._changes[-1][1]:
            self._changes.append((now, done))

    def per_second(self, now: float) -> float:
        """0.0 while nothing has been done. Falls while nothing happens."""
        if len(self._changes) < 2:
            return 0.0
        (start, first), (_, last) = self._changes[0], self._changes[-1]
        return (last - first) / max(now - start, 1e-9)


class Progress:
    """Shows the phase, done/total, rate, time and workers on stderr for the length of a `with`.

    left: records of each group that are not done; a group's name ends in `editor=NAME` or the like,
    or has more behind that.
    json_of: the name of the run in a log of JSON objects; None for text.
    so_far: the results of what is done, in words; shown twice on the way of a run that takes longer
    than LOG_SECONDS, unless its log is JSON.
    """

    def __init__(
        self,
        total: int,
        done: int,
        json_of: str | None = None,
        left: dict[str, int] | None = None,
        so_far: Callable[[], str] | None = None,
    ) -> None:
        self._json_of = json_of
        self._total, self._done, self._dead, self._workers = total, done, 0, (0, 0)
        self._left = dict(left or {})
        self._seconds: dict[str, float] = {}
        self._rate = Rate()
        self._started = time.monotonic()
        self._printed = self._started
        self._so_far = so_far if json_of is None else None
        self._shown_at = deque(done + share * (total - done) for share in _SHARES)
        console = PlainConsole(stderr=True)
        self._bar = (
            rich.progress.Progress(
                rich.progress.BarColumn(10),
                rich.progress.TextColumn("{task.description}", markup=False),
                console=console,
            )
            if console.is_terminal and json_of is None
            else None
        )
        self._wide = console.width >= WIDE and 1 < len(self._left) <= _LINES

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._task = self._bar.add_task(self.line(), total=self._total, completed=self._done)
            # One line an editor below, where there is room.
            self._tasks = {
                group: self._bar.add_task(self._of(group), total=left)
                for group, left in self._left.items()
                if self._wide
            }
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        else:
            self.note(self.line())

    def finished(self, group: str, rows: int, seconds: float) -> None:
        """A lease of so many rows of a group took a worker so long."""
        each = seconds / max(rows, 1)
        before = self._seconds.get(group, each)
        self._seconds[group] = before + (each - before) * _NEWEST
        self._left[group] = max(0, self._left.get(group, 0) - rows)

    def update(
        self, done: int, dead: int, ready: int, workers: int, under_way: float = 0.0
    ) -> None:
        """Rows and dead letters in the store, how many of the workers are ready, and what they have
        done of their leases, in rows; these are shown as done, a lost lease's until it is lost."""
        self._show_so_far(done)
        # A lease that a second worker has done is still under way in the first.
        done = min(done + int(under_way), max(done, self._total))
        self._done, self._dead, self._workers = done, dead, (ready, workers)
        now = time.monotonic()
        if ready:  # The start of Ray and of the workers is not part of the rate.
            self._rate.add(now, done)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=self.line())
            for group, task in self._tasks.items():
                done_of = (self._bar.tasks[task].total or 0) - self._left[group]
                self._bar.update(task, completed=done_of, description=self._of(group))
        elif now - self._printed >= LOG_SECONDS:
            self._printed = now
            self.note(self.line())

    def _show_so_far(self, done: int) -> None:
        if time.monotonic() - self._started < LOG_SECONDS:
            return
        passed = 0
        while self._shown_at and self._shown_at[0] <= done:
            self._shown_at.popleft()
            passed += 1
        if self._so_far is None or not passed or done >= self._total:
            return
        try:
            self.note(f"{done} of {self._total} rows so far:\n{self._so_far()}")
        except Exception as error:  # No run ends because it could not be looked at.
            self.note(f"the rows so far cannot be shown: {error}")

    def note(self, text: str, **fields: Any) -> None:
        """Say something once; `fields` are of the JSON object."""
        text = shown(text)
        if self._json_of is not None:
            log.info(text, extra={"run": self._json_of, **fields})
        elif self._bar is not None:
            self._bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def line(self) -> str:
        now = time.monotonic()
        ready, workers = self._workers
        if not ready and self._done < self._total:
            phase = f"{workers or '?'} workers load the model, "
        elif not self._seconds and self._done < self._total:
            phase = "first records, "
        else:
            phase = ""
        seconds = self.seconds_left(now)
        return (
            f"{phase}{self._done}/{self._total}, {self._rate.per_second(now):.2f} rows/s, "
            f"{clock(now - self._started)} elapsed, "
            f"{'?' if seconds is None else clock(seconds)} left, "
            f"{ready}/{workers} workers, {self._dead} dead"
        )

    def seconds_left(self, now: float) -> float | None:
        """From the seconds that a row of each group takes a worker; of a group that has not begun,
        the most that one of the others takes. None while nothing is known."""
        if self._seconds and self._workers[0]:
            slowest = max(self._seconds.values())
            left = sum(n * self._seconds.get(group, slowest) for group, n in self._left.items())
            return left / self._workers[0]
        rate = self._rate.per_second(now)
        return (self._total - self._done) / rate if rate else None

    def _of(self, group: str) -> str:
        name = group.partition("editor=")[2] or group.rpartition("=")[2]
        name = unquote(name.replace("/", ", "))
        each = self._seconds.get(group)
        return f"  {name}: {self._left[group]} left" + (f", {each:.2g} s a row" if each else "")


def clock(seconds: float) -> str:
    """H:MM:SS."""
    return str(timedelta(seconds=round(seconds)))
