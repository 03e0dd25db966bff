"""The meter measures, compares and refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rome.edits.deltas import LowRankDelta
from tests.programs import bench, flops, perf, rounds
from tests.support import reference

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SHAPE = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 256,
    "vocab_size": 1000,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TINY = ["--random", json.dumps(SHAPE), "--records", "3", "--oracle-records", "2"]

# A machine with a GPU may have none of these, nor this project as a package.
_BARE = """
import sys
for name in ("ray", "polars", "pydantic", "nltk", "typer", "rich", "datasets", "gguf"):
    sys.modules[name] = None
from tests.programs import perf
sys.exit(perf.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The table and the JSON of a whole measurement without the packages of `_BARE`."""
    out = tmp_path_factory.mktemp("perf") / "results.json"
    command = [sys.executable, "-c", _BARE, *TINY, "--repeats", "2", "--out", str(out)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_the_table_has_every_row_with_finite_numbers(
    measured: tuple[str, dict[str, Any]],
) -> None:
    table, result = measured
    rows = ["keys", "values", "edit", "probabilities", "generation", "record"]
    whole = ["row, unedited", "row, edited"]
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")] == [
        "| what",
        *(f"| {row}" for row in (*rows, *whole)),
    ]
    assert list(result["rows"]) == [*rows, *whole]
    for row in (result["rows"][name] for name in rows):
        numbers = [row["ratio"], row["tokens_per_second"], row["flops"], row["share_of_matmul"]]
        numbers += [*row["oracle"]["every"], *row["engine"]["every"]]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        assert len(row["oracle"]["every"]) == len(row["engine"]["every"]) == 2
        assert row["ratio"] == row["oracle"]["seconds"] / row["engine"]["seconds"]


def test_a_whole_row_is_what_a_worker_does(measured: tuple[str, dict[str, Any]]) -> None:
    """Its parts are all of it but for the reading of records, and the first round is kept apart."""
    table, result = measured
    for name in ("row, unedited", "row, edited"):
        row = result["rows"][name]
        parts = ["edit", "probabilities", "greedy", "generation", "fingerprint", "parquet"]
        assert list(row["parts"]) == parts
        assert 0.8 < sum(row["parts"].values()) / row["engine"]["every"][-1] <= 1
        assert f"{name}, last round, s/record: edit " in table
        assert row["engine"]["first"] == row["engine"]["every"][0]
        assert row["engine"]["seconds"] == row["engine"]["every"][1]
    # Both models speak; only one of them is edited.
    unedited, edited = (result["rows"][f"row, {name}"]["parts"] for name in rounds.MODELS)
    assert edited["edit"] > 10 * unedited["edit"]
    assert min(unedited["greedy"], edited["greedy"]) > 0


def test_the_parts_add_up_to_the_whole(measured: tuple[str, dict[str, Any]]) -> None:
    rows = measured[1]["rows"]
    stages = [rows[name] for name in ("edit", "probabilities", "generation")]
    assert rows["record"]["flops"] == pytest.approx(sum(stage["flops"] for stage in stages))
    for side in ("oracle", "engine"):
        for i, seconds in enumerate(rows["record"][side]["every"]):
            assert seconds == pytest.approx(sum(stage[side]["every"][i] for stage in stages))


def test_oracle_and_engine_agree(measured: tuple[str, dict[str, Any]]) -> None:
    apart = measured[1]["distance"]
    assert apart["direction"] < 1e-5
    assert 0 < apart["value"] < 1e-4
    assert 0 < apart["log_p"] < 1e-4
    assert apart["texts"] == 0


def test_a_speed_up_that_changes_numbers_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slightly_wrong(left_DR: torch.Tensor, right_KR: torch.Tensor) -> LowRankDelta:
        return LowRankDelta(left_DR * 1.01, right_KR)

    monkeypatch.setattr("rome.editors.rome.LowRankDelta", slightly_wrong)
    assert perf.main([*TINY, "--repeats", "1", "--stages", "edit"]) == 1
    printed = capsys.readouterr()
    assert "'value' is off by" in printed.err
    assert printed.out == ""


def test_stages_and_the_oracle_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    once = [*TINY[:4], "--repeats", "1", "--oracle-records"]
    assert perf.main([*once, "1", "--stages", "probabilities"]) == 0
    printed = capsys.readouterr().out
    assert "| probabilities | " in printed
    assert "| edit" not in printed
    assert "| record" not in printed
    assert perf.main([*once, "0", "--dtype", "bfloat16"]) == 0
    assert "nothing was compared" in capsys.readouterr().out


@pytest.fixture(scope="module")
def made() -> bench.Bench:
    return bench.build(
        source="",
        random=json.dumps(SHAPE),
        records_file=None,
        records=2,
        oracle_records=1,
        layer=1,
        dtype="float32",
        device="cpu",
    )


def test_the_cost_of_a_token_is_what_torch_counts(made: bench.Bench) -> None:
    model, costs = made.engine, flops.Costs.of(made.engine, made.settings.layer)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.hf(torch.arange(7)[None])
    # Attention scores are left out.
    dense = counter.get_flop_counts()["Global"][torch.ops.aten.addmm]
    logits = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert dense == 7 * (costs.lower + costs.upper)
    assert logits == 7 * costs.logits


def test_equal_beginnings_are_counted_once() -> None:
    assert flops.beginnings([[1, 2, 3], [1, 2, 4], [1, 2], [5]]) == 5


def test_work_of_an_edit_counted_by_hand() -> None:
    request = reference.Contexts(
        before=[[1, 2, 3], [9, 1, 2, 3]], target=[7, 8], at=[1, 2], kl=[1, 2, 6], kl_at=1
    )
    costs = flops.Costs(lower=1, upper=1000, logits=1_000_000)
    keys, values = flops.edit(costs, [request], steps=[3])
    # 1, 12, 123, 1237, and 9 with the same after it; before the subject's last token: 1, 9, 91.
    assert keys.flops == 9 * 1 + 3 * 1000
    # From the subject's last token on: 2 3 7 twice, and 2 of the KL prompt; 3 forward, 2 backward.
    assert values.flops == 5 * (7 * 1000 + (2 * 2 + 1) * 1_000_000)
    assert values.tokens == 3 * 7


def test_both_sides_sample_alike_after_prompts_of_very_different_lengths(
    made: bench.Bench,
) -> None:
    """A prompt longer than the shortest reads its own tokens; one longer than a text has none."""
    record = made.records[0]
    longer = tuple(f"{p}{' it was said' * 2 * i}" for i, p in enumerate(record.generation_prompts))
    lengths = [len(row.ids) for row in made.engine.encode(longer)]
    assert max(lengths) > made.generation.max_tokens > sorted(lengths)[4]
    record = dataclasses.replace(record, generation_prompts=longer)
    uneven = dataclasses.replace(made, records=[record], oracle_records=[record])
    stages = ["edit", "generation"]
    theirs = rounds.run_oracle(uneven, stages, [])
    ours = rounds.run_engine(uneven, stages, [], token_budget=8192)
    assert len(theirs.texts) == 2
    assert rounds.distance(theirs, ours).texts == 0
