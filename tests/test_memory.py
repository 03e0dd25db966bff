"""A batch that does not fit into memory is halved, says so, and gives the same."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch

from rome.editors import EDITORS, contexts
from rome.editors.values import _Problem
from rome.models import costs, memory
from tests.support import tiny
from tests.support.computations import COMPUTATIONS, distance, mend_network
from tests.support.two_gpus import costs_like

LIMITED = """
import resource, torch
from rome.models import memory

torch.zeros(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), used + (512 << 20)))

def squares(batch):
    work = torch.ones(len(batch), 32 << 20)  # 128 MiB an item.
    return [float(row[0]) * i**2 for row, i in zip(work, batch)]

print(memory.in_halves(squares, [0, 1, 2, 3, 4, 5, 6, 7]))
"""


def test_batches_by_length_keep_to_the_budget_with_their_padding() -> None:
    lengths = [3, 1, 9, 1, 2]  # The third is too long for any batch and runs alone.
    assert list(memory.by_length(lengths, 6)) == [[1, 3, 4], [0], [2]]
    assert list(memory.by_length(lengths, 6, most=2)) == [[1, 3], [4, 0], [2]]
    assert list(memory.by_length([], 6)) == []


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_a_token_of_an_optimisation_takes_no_more_memory_than_is_said(family: str) -> None:
    model = tiny.model(family, "float32")
    chosen = [contexts.contexts(model, request, tiny.TEMPLATES) for request in tiny.REQUESTS]
    problem = _Problem(model, 0, contexts.observe(model, 0, chosen))
    weights = {weight.untyped_storage().data_ptr() for weight in model.hf.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    delta_ED = torch.zeros(len(chosen), 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outcome = problem.log_probabilities(delta_ED)
    tokens = problem.ids_BS.numel()
    with costs_like("cuda", "cpu"):
        said = memory.bytes_per_token(model) * costs.of(model.device).backward
    taken = sum(kept.values()) / tokens
    assert said / 4 < taken <= said
    del outcome


@pytest.mark.slow
def test_a_process_short_of_memory_goes_on_with_halves() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == str([float(i**2) for i in range(8)])
    assert "out of memory with a batch of 8: going on with halves" in done.stderr


def test_an_item_that_does_not_fit_alone_raises() -> None:
    def never(batch: object) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        memory.in_halves(never, [1, 2, 3])


def test_other_errors_are_not_retried(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(batch: object) -> list[int]:
        raise RuntimeError("shapes do not fit")

    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="shapes"):
        memory.in_halves(wrong, [1, 2])
    assert not caplog.records


# One for each editor; each scores, says and writes as well.
HALVED = (
    *("edit rome 0", "edit memit", "edit memit together", "edit ft 1", "edit ft+l 0"),
    *("edit attnedit 2", "edit kn", "edit ke", "edit mend"),
    *("edit alphaedit", "edit ultraedit together", "edit lora together"),
    *("trace hidden", "trace mlp", "trace mlp_severed"),
    *("train ke", "train mend", "second moments"),
)


def test_what_is_halved_is_every_kind_of_work() -> None:
    kinds = {" ".join(name.split()[:2]) for name in HALVED}
    assert {f"edit {editor}" for editor in EDITORS} - kinds == {"edit none"}
    assert {name for name in COMPUTATIONS if name.startswith("train")} <= kinds


@pytest.mark.parametrize("name", HALVED)
def test_no_pass_of_a_model_is_beside_the_function_that_halves(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = COMPUTATIONS[name]
    model = asked.make("gpt2", "float32")
    if name == "edit mend":  # The network of this computation is made with a pass.
        network = mend_network(model)
        monkeypatch.setattr("tests.support.computations.mend_network", lambda _: network)
    run, in_halves, passes, inside = model.run, memory.in_halves, [], [0]

    def seen(*args: Any, **options: Any) -> Any:
        passes.append(inside[0])
        return run(*args, **options)

    def entered(*args: Any) -> Any:
        inside[0] += 1
        try:
            return in_halves(*args)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(model, "run", seen)
    monkeypatch.setattr(memory, "in_halves", entered)
    asked.compute(model)
    assert passes
    assert all(passes)


@pytest.mark.slow
@pytest.mark.parametrize("name", HALVED)
@pytest.mark.usefixtures("one_thread")
def test_every_computation_goes_on_item_by_item(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that holds one item at a time changes no number."""
    asked = COMPUTATIONS[name]
    expected = asked.compute(asked.make("llama", "float64"))
    in_halves, failed = memory.in_halves, []

    def short(run: Any, batch: Any) -> Any:
        def limited(part: Any) -> Any:
            if len(part) > 1:
                failed.append(len(part))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(part)

        return in_halves(limited, batch)

    monkeypatch.setattr(memory, "in_halves", short)
    monkeypatch.setattr("gc.collect", lambda: 0)  # Nothing is short here, and it is slow.
    found = asked.compute(asked.make("llama", "float64"))
    assert failed
    assert distance(found, expected) <= 1e-6  # Llama's norms are computed in float32.
