"""Memory of thousands of edits in one model, SmolLM2: `make scale ARGS=chains`.

3,000 made-up facts by ROME, one after another; then 1,600 by MEMIT, at once and as a chain of 16
batches. v* takes two steps, since memory is what is asked for, and C is made of random keys.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise

import psutil
import torch

from rome import models
from rome.data.records import Request
from rome.editors import EDITORS, Editor, Resources
from rome.editors.values import ValueSettings
from rome.edits.grouping import Grouping
from rome.edits.sequences import Chain
from rome.models import EditableModel, memory
from rome.second_moment import SecondMoment
from rome.solver import Solver
from tests.programs.trainings import SMOLLM2, record

VALUE = ValueSettings(steps=2)


def request(number: int) -> Request:
    made_up = record(number)
    return Request("{} was born in", made_up.subject, made_up.target_new)


def editor(model: EditableModel, name: str, **settings: object) -> Editor:
    key_size = model.weight(model.weight_name(0)).shape[1]

    def solver(layer: int) -> Solver:
        moment = SecondMoment.zeros(key_size)
        moment.add(torch.randn(4 * key_size, key_size, generator=torch.manual_seed(layer)))
        return moment.solver()

    kind = EDITORS[name]
    resources = Resources(model, ["{}"], solver, memory.token_budget(model))
    return kind.build(resources, kind.settings(**settings))


def follow(chain: Chain, marks: tuple[int, ...], name: str) -> None:
    """Make the edits up to each mark, and print what the process holds then."""
    state, began = chain.begin(), time.perf_counter()
    for start, end in pairwise((0, *marks)):
        _, state = chain.go_on(state, [request(number) for number in range(start, end)])
        held = sum(delta_bytes(state.total).values()) + sum(
            tensor.nbytes for tensor in state.carried.values()
        )
        print(
            f"| {name} | {end:,} | {psutil.Process().memory_info().rss / 2**30:.2f} | "
            f"{held / 2**20:.1f} | {(time.perf_counter() - began) / end:.2f} |",
            flush=True,
        )


def delta_bytes(total: Mapping[str, object]) -> dict[str, int]:
    return {
        name: sum(value.nbytes for value in vars(delta).values()) for name, delta in total.items()
    }


def measure() -> None:
    model = models.load(SMOLLM2, "float32")
    rome = editor(model, "rome", layer=6, value=VALUE)
    memit = {"layers": [2, 3, 4, 5, 6], "second_moment_weight": 1_000, "value": VALUE}
    at_once, history = (
        editor(model, "memit", **memit),
        editor(model, "memit", history=True, **memit),
    )
    print("| chain | edits | process, GB | change and state, MB | seconds an edit |")
    print("|---|---:|---:|---:|---:|")
    follow(Chain(model, rome, Grouping(1, 3000)), (100, 500, 1000, 2000, 3000), "ROME, one by one")
    follow(Chain(model, history, Grouping(100, 16)), (100, 400, 800, 1600), "MEMIT, 16 x 100")
    follow(Chain(model, at_once, Grouping(1600, 1)), (1600,), "MEMIT at once")
