"""The faults of chains: as those of `chaos_faults`, inside batches of edits and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from cluster.store import Store
from tests.programs.chaos_chains import (
    BATCH,
    CHECKPOINTS,
    ORDERS,
    RECORDS,
    SCORES,
    STATE,
    ChainSpec,
    judge_chains,
    prepare_chains,
)
from tests.programs.chaos_faults import Scene, Verdict, wait_for
from tests.support.in_words import in_words


@dataclass
class ChainScene(Scene):
    """One run of two chains under one fault."""

    spec: ChainSpec  # type: ignore[assignment]
    task: ClassVar[str] = "tests.programs.chaos_chains"

    def prepare(self) -> None:
        prepare_chains(self.spec)

    def judge(self) -> Verdict:
        return Verdict(*judge_chains(self.spec))

    def point(self, kind: str) -> str:
        """Some point of a kind: see `ChainSpec`."""
        numbers = {BATCH: range(1, 5), STATE: (1, 3), SCORES: CHECKPOINTS}[kind]
        return f"{kind} {self.luck.randrange(ORDERS)} {self.luck.choice(numbers)}"

    def kill_driver_at(self, point: str) -> None:
        with self.driver(pauses=0.5) as process:
            wait_for(lambda: self.spec.was_at(point) or process.poll() is not None)
            assert process.poll() is None, "it ended too early"
            process.kill()


ChainFault = Callable[[ChainScene], int]


def worker_killed_in_a_chain(scene: ChainScene) -> int:
    """In a batch, after the commit of a state and before that of its part, in a checkpoint."""
    points = tuple(map(scene.point, (BATCH, STATE, SCORES)))
    scene.run_on(dies=points)
    assert all(map(scene.spec.died, points))
    return len(points)


def driver_killed_in_a_chain(scene: ChainScene) -> int:
    """In a batch, then in the scoring of the same chain's end."""
    batch = scene.point(BATCH)
    order = batch.split()[1]
    scene.kill_driver_at(batch)
    scene.kill_driver_at(f"{SCORES} {order} {RECORDS}")
    scene.run_on()
    return 2


def head_and_driver_killed_in_a_chain(scene: ChainScene) -> int:
    """Workers of the old head may still write states and parts when the next driver has begun."""
    point = scene.point(BATCH)
    with scene.driver(pauses=2) as process:
        wait_for(lambda: scene.spec.was_at(point))
        scene.nodes.kill_head()
        process.kill()
    scene.nodes.new_head(nodes=2)
    scene.run_on()
    time.sleep(5)
    scene.run_on()  # Removes what a late writer left.
    return 1


def states_lost(scene: ChainScene) -> int:
    """Of what a killed driver left between checkpoints, a state is cut and another one gone."""
    scene.kill_driver_at(f"{BATCH} {scene.luck.randrange(ORDERS)} 4")
    run = Store(scene.spec.root).sub("run")
    names = run.list("chains/", ".safetensors")
    between = [name for name in names if "/edits-0000004-" not in name]
    for number, name in enumerate(between):
        if number % 2 == scene.luck.randrange(2):
            run.delete(name)
        else:
            run.write_bytes(name, run.read_bytes(name)[:-8])
    scene.run_on()
    return len(between)


CHAIN_FAULTS: dict[str, ChainFault] = in_words(
    worker_killed_in_a_chain,
    driver_killed_in_a_chain,
    head_and_driver_killed_in_a_chain,
    states_lost,
)
