"""The workers of a run: what the driver asks of them, and Ray, which has them.

The driver knows nothing else of the world. tests/support/simulation.py has another crew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from cluster import told
from cluster.clock import REAL, Clock
from cluster.grid import Lease
from cluster.nodes import draining_nodes, lacking, node_was_lost, workers_that_fit
from cluster.settings import RunSettings
from cluster.worker import Booted, Report


@dataclass(frozen=True)
class Lost:
    """In place of an answer: the worker is dead, `node` says whether with its node."""

    error: str
    node: bool = False


class Crew(Protocol):
    """Workers, and the nodes that they are on.

    A call is what a worker was asked for, by which its answer is known.
    """

    clock: Clock

    def start(self) -> tuple[Any, Any]:
        """Start a worker; returns it and the call of its boot."""

    def work(self, worker: Any, lease: Lease) -> Any:
        """Hand a lease to a worker, which does its leases in their order; returns the call."""

    def answers(
        self, calls: Collection[Any], seconds: float
    ) -> Iterator[tuple[Any, Booted | Report | Lost]]:
        """The answers that are there, or the next one if it comes within so many seconds."""

    def told(self, leases: Iterable[Lease]) -> dict[Lease, float]:
        """How many rows are done of each lease whose worker tells of it."""

    def end(self, worker: Any) -> None:
        """End a worker, dead or alive, at once."""

    def fits(self) -> int:
        """How many workers there is room for, whoever uses it now."""

    def lacking(self) -> str:
        """Why there is room for none."""

    def draining(self) -> set[str]:
        """The nodes that will be taken away soon."""


class RayCrew:
    """Actors of Ray. make: an actor's handle. store: where the run's rows are, its address."""

    def __init__(self, settings: RunSettings, make: Callable[[], Any], store: str) -> None:
        self._settings, self._make, self._store = settings, make, store
        self.clock = REAL

    def start(self) -> tuple[Any, Any]:
        worker = self._make()
        return worker, worker.boot.remote()

    def work(self, worker: Any, lease: Lease) -> Any:
        return worker.work.remote(lease)

    def answers(
        self, calls: Collection[Any], seconds: float
    ) -> Iterator[tuple[Any, Booted | Report | Lost]]:
        refs = list(calls)
        if not (there := ray.wait(refs, num_returns=len(refs), timeout=0)[0]):
            there = ray.wait(refs, timeout=seconds)[0]
        for ref in there:
            try:
                yield ref, ray.get(ref)
            # Not only RayActorError: OutOfMemoryError is none, and an answer may fail to unpickle.
            except Exception as error:
                yield ref, Lost(_in_one_line(error), node_was_lost(error))

    def told(self, leases: Iterable[Lease]) -> dict[Lease, float]:
        with suppress(Exception):  # The bar stands still while Ray's head does.
            return told.read(self._store, leases)
        return {}

    def end(self, worker: Any) -> None:
        with suppress(Exception):  # It may be dead, and so may the cluster.
            ray.kill(worker)

    def fits(self) -> int:
        return workers_that_fit(self._settings)

    def lacking(self) -> str:
        return lacking(self._settings) or "nothing"

    def draining(self) -> set[str]:
        return draining_nodes()


def _in_one_line(error: BaseException) -> str:
    """Ray's errors without the ids before and the guesses after what Ray knows."""
    text = " ".join(str(error).split())
    for noise in (" Some common causes", " Object store memory usage"):
        text = text.partition(noise)[0]
    known = max(text.find("The actor is dead because"), 0)
    return f"{type(error).__name__}: {text[known:]}"[:1000]
