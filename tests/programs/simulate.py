"""Simulate runs under faults that follow from a seed: `make simulate ARGS="--seed 17"`.

Prints what struck how often, and each seed that broke a rule with what happened in it. Ends with 1
if one did. With `--mistakes`, the scheduler has one mistake after the other, and the table says
within how many seeds which rule found it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pool

from tests.support.mistakes import MISTAKES
from tests.support.simulated_run import FAULTS, Simulation, ViolationError

SEEDS = 10_000
PROCESSES = 2
LAST = 120
"""Lines of a schedule that are shown."""


@dataclass
class Seen:
    """What some seeds had in them."""

    violations: dict[int, str] = field(default_factory=dict)
    strokes: Counter[str] = field(default_factory=Counter)
    seeds: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)

    def add(self, simulation: Simulation) -> None:
        self.strokes.update(simulation.strokes)
        self.seeds.update(simulation.strokes.keys())
        self.total.update(
            seeds=1,
            records=len(simulation.keys),
            events=simulation.world.events,
            drivers=len(simulation.drivers),
            workers=len(simulation.hands),
            seconds=round(simulation.world.now),
            doubled=simulation.doubled,
        )

    def merge(self, other: Seen) -> None:
        self.violations |= other.violations
        self.strokes += other.strokes
        self.seeds += other.seeds
        self.total += other.total


def look(seeds: range, mistake: str | None = None) -> Seen:
    """Simulate some seeds, up to the first violation if there is a mistake to be found."""
    seen = Seen()
    with MISTAKES[mistake]() if mistake else contextlib.nullcontext():
        for seed in seeds:
            with contextlib.redirect_stderr(io.StringIO()):  # What a driver says of a run.
                simulation = Simulation(seed)
                try:
                    simulation.finish()
                except ViolationError as error:
                    seen.violations[seed] = str(error)
            seen.add(simulation)
            if mistake and seen.violations:
                break
    return seen


def chunks(first: int, number: int, size: int = 100) -> Iterator[range]:
    for start in range(first, first + number, size):
        yield range(start, min(start + size, first + number))


def replay(seed: int) -> int:
    """Print all that happens under a seed."""
    simulation = Simulation(seed, tells=True)
    broken = None
    try:
        simulation.finish()
    except ViolationError as error:
        broken = error
    print(f"faults: {', '.join(sorted(simulation.faults))}")
    print(*simulation.world.said, sep="\n")
    print(f"seed {seed}: {broken or 'no rule was broken'}")
    return int(broken is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="only this one, and print all of it")
    parser.add_argument("--mistakes", action="store_true")
    options = parser.parse_args()
    if options.seed is not None:
        return replay(options.seed)
    started = time.monotonic()
    if options.mistakes:
        return _find_mistakes(options.first, options.seeds)
    seen = Seen()
    with Pool(PROCESSES) as pool:
        for part in pool.imap_unordered(look, chunks(options.first, options.seeds)):
            seen.merge(part)
    for seed in sorted(seen.violations)[:3]:
        replay(seed)
    print("| fault | seeds | strokes |\n|---|---:|---:|")
    for fault in FAULTS:
        print(f"| {fault} | {seen.seeds[fault]} | {seen.strokes[fault]} |")
    print(", ".join(f"{number:,} {what}" for what, number in seen.total.items()))
    print(f"{len(seen.violations)} violations in {time.monotonic() - started:.0f} s")
    for seed, broken in sorted(seen.violations.items()):
        print(f"seed {seed}: {broken}")
    return int(bool(seen.violations))


def _find_mistakes(first: int, number: int) -> int:
    """A mistake each: the seeds until it was found, and what found it."""
    print("| mistake | seeds | broken rule |\n|---|---:|---|")
    unfound = 0
    with Pool(PROCESSES) as pool:
        looks = pool.imap(partial(_with, range(first, first + number)), MISTAKES)
        for mistake, seen in zip(MISTAKES, looks, strict=True):
            broken = next(iter(seen.violations.values()), None)
            unfound += broken is None
            print(f"| {mistake} | {seen.total['seeds']} | {broken or 'none'} |", flush=True)
    return int(unfound > 0)


def _with(seeds: range, mistake: str) -> Seen:
    return look(seeds, mistake)


if __name__ == "__main__":
    sys.exit(main())
