"""The host's work is counted as a GPU would see it."""

from __future__ import annotations

import json

import pytest
import torch

from rome.scoring import generation
from tests.programs import counts, perf
from tests.programs.counts import Counts, counted
from tests.support.two_gpus import two_gpus

SHAPE = {
    "model_type": "gpt2",
    "n_embd": 8,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 256,
    "vocab_size": 700,
}

pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_kind_of_work_is_counted_once() -> None:
    with two_gpus():
        here = torch.arange(6.0, device="meta:0")
        mask = here > 2

        def of(work: object) -> tuple[int, int]:
            found = counted(work)  # type: ignore[arg-type]
            return found.transfers, found.synchronisations

        assert of(lambda: here + here) == (0, 0)
        assert of(lambda: here * 2) == (0, 0)
        assert of(lambda: torch.zeros(3).to("meta:0")) == (1, 0)
        assert of(lambda: torch.zeros(3, device="meta:0")) == (0, 0)
        assert of(lambda: here.cpu()) == (0, 1)
        assert of(lambda: here.tolist()) == (0, 1)
        assert of(lambda: float(here[0])) == (0, 1)
        assert of(lambda: here.to("meta:1")) == (0, 0)
        assert of(lambda: here[mask]) == (0, 1)
        assert of(lambda: here[torch.tensor([1, 2])]) == (1, 0)
        assert of(lambda: mask.nonzero()) == (0, 1)
        assert of(lambda: torch.zeros(3).nonzero()) == (0, 0)
        assert counted(lambda: here + here).operators == 1
    assert Counts(5, 4, 3) - Counts(1, 2, 3) == Counts(4, 2, 0)


def test_stages_of_a_model_are_counted_the_same_twice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--count", "--random", json.dumps(SHAPE), "--count-records", "2"]
    assert perf.main(arguments) == 0
    first = capsys.readouterr().out
    assert perf.main(arguments) == 0
    assert capsys.readouterr().out == first
    lines = dict(line.removeprefix("count ").split(": ") for line in first.splitlines()[1:])
    assert list(lines) == [
        "an evaluation of v*'s loss",
        "a decoded token",
        "a batch of scores",
        "a batch of scores, unedited",
        "a batch of greedy answers",
    ]
    for line in lines.values():
        names = [part.split()[0] for part in line.split(", ")]
        assert names == ["operators", "transfers", "synchronisations"]
        assert int(line.split()[1].replace(",", "").rstrip(",")) > 50


GPTJ = {
    "model_type": "gptj",
    "n_embd": 8,
    "n_layer": 3,
    "n_head": 2,
    "rotary_dim": 4,
    "n_positions": 256,
    "vocab_size": 700,
}


@pytest.mark.parametrize("shape", [SHAPE, GPTJ], ids=lambda shape: shape["model_type"])
def test_the_device_is_waited_for_once_and_nothing_is_done_row_by_row(
    shape: dict[str, object],
) -> None:
    few, many = (counts.count(counts.build(json.dumps(shape), n)) for n in (2, 4))
    assert {stage: found.synchronisations for stage, found in many.items()} == {
        "an evaluation of v*'s loss": 1,
        "a decoded token": 0,
        "a batch of scores": 1,
        "a batch of scores, unedited": 1,
        "a batch of greedy answers": 1,
    }
    assert {stage: found.operators for stage, found in many.items()} == {
        stage: found.operators for stage, found in few.items()
    }
    for stage in ("an evaluation of v*'s loss", "a decoded token"):
        assert many[stage].transfers == 0


def test_a_wait_in_the_engine_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counts.build(json.dumps(SHAPE), 2)
    before = counts.count(made)["a decoded token"]
    sample = generation._sample

    def waiting(logits_BV: torch.Tensor, top_k: int, draw_B1: torch.Tensor) -> torch.Tensor:
        float(logits_BV.sum())
        return sample(logits_BV, top_k, draw_B1)

    monkeypatch.setattr(generation, "_sample", waiting)
    after = counts.count(counts.build(json.dumps(SHAPE), 2))["a decoded token"]
    assert (after - before).synchronisations == 1
