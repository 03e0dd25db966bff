"""A worker's place in a run, and words for what happens there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.crew import Crew
from cluster.grid import Grid, Lease


@dataclass
class Slot:
    """A place for a worker, filled again when its worker dies.

    calls: what the worker was asked for, oldest first; None stands for its boot. since: when the
    oldest of them began. failures: boots that failed in a row, or leases that could not be written.
    rests_until: not to be filled or to be given anything before.
    """

    name: str
    crew: Crew
    worker: Any = None
    node: str = ""
    ready: bool = False
    calls: dict[Any, Lease | None] = field(default_factory=dict)
    since: float = 0.0
    failures: int = 0
    rests_until: float = 0.0

    @property
    def oldest(self) -> Lease | None:
        """The lease that the worker does now; None while it boots or idles."""
        return next(iter(self.calls.values()), None)

    def rest(self, longest: float) -> None:
        """Pause for longer after each failure in a row."""
        self.failures += 1
        self.rests_until = self.crew.clock.now() + min(longest, 2.0 ** (self.failures - 1))

    def end(self) -> None:
        """Kill the worker, if there is one, and forget what it was asked for."""
        if self.worker is not None:
            self.crew.end(self.worker)
        self.worker, self.ready, self.node = None, False, ""
        self.calls.clear()


def described(grid: Grid, lease: Lease) -> str:
    ids = grid.ids(lease)
    cases = f"case {ids[0]}" if len(ids) == 1 else f"cases {ids[0]} to {ids[-1]}"
    return f"{cases} of {lease.group} (attempt {lease.attempt})"


def difference(expect: dict[str, Any], facts: dict[str, Any]) -> str:
    lines = [
        f"  {name}: the run has {expect.get(name)!r}, the worker has {facts.get(name)!r}"
        for name in sorted(expect.keys() | facts.keys())
        if expect.get(name) != facts.get(name)
    ]
    return "\n".join(["A worker is not what the run's manifest says:", *lines])
