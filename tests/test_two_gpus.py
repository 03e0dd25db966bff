"""A model spread over two GPUs does what it does on one device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rome import models
from rome.editors import EDITORS
from rome.models import EditableModel
from tests.support import tiny
from tests.support.computations import COMPUTATIONS, FAMILIES, distance
from tests.support.two_gpus import spread, two_gpus

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

# Another order of additions, in the layers that compute in float32.
ROUNDING = 1e-6


def check(
    compute: Callable[[EditableModel], Any],
    make: Callable[[], EditableModel],
    head_alone: bool = False,
) -> None:
    """What is computed on one device is computed on two."""
    expected = compute(make())
    model = make()
    with two_gpus():
        spread(model, head_alone)
        assert {str(p.device) for p in model.hf.parameters()} == {"meta:0", "meta:1"}
        found = compute(model)
    assert distance(found, expected) <= ROUNDING


@pytest.mark.parametrize("name", COMPUTATIONS)
@pytest.mark.parametrize("family", FAMILIES[:3])
def test_every_computation(family: str, name: str) -> None:
    asked = COMPUTATIONS[name]
    check(asked.compute, lambda: asked.make(family, "float64"))


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_the_head_alone_on_another_device(family: str) -> None:
    compute = COMPUTATIONS["edit rome 1"].compute
    check(compute, lambda: tiny.model(family), head_alone=True)


def test_every_editor_is_in_the_list() -> None:
    edits = [name.split()[1] for name in COMPUTATIONS if name.startswith("edit ")]
    assert set(edits) == set(EDITORS)


def test_a_difference_is_seen() -> None:
    one = {"a": torch.tensor([3.0, 4.0]), "b": [("x", 2, 0.5)]}
    assert distance(one, one) == 0
    assert distance(one | {"a": torch.tensor([3.0, 4.5])}, one) == pytest.approx(0.1)
    assert distance(one | {"b": [("x", 2, 0.6)]}, one) == pytest.approx(0.2)
    for other in (("y", 2, 0.5), ("x", 3, 0.5), ("x", 2, float("nan")), ("x", 2)):
        assert distance(one | {"b": [other]}, one) == float("inf")


def test_the_two_devices_refuse_what_gpus_refuse() -> None:
    with two_gpus():
        here, there = (torch.arange(4.0, device=f"meta:{n}") for n in range(2))
        for mixed in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: here[there.long()],
            lambda: here + torch.ones(4),
        ):
            with pytest.raises(RuntimeError, match="tensors on"):
                mixed()
        assert (here + there.to(here.device))[torch.tensor([3])].tolist() == [6]


def test_a_model_that_gpus_do_not_hold_is_refused(tmp_path: Path) -> None:
    model = tiny.model("gpt2", "float32")
    tiny.save(model, tmp_path)
    with pytest.raises(ValueError, match="must fit into the GPUs"):
        models.load(str(tmp_path), "float32", "auto")
