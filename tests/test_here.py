"""A run without workers is done in this process, as any run is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.calls import once, stream
from cluster.driver import RunError
from cluster.run import run
from cluster.settings import RunSettings
from cluster.store import Store
from jobs.runs.config import ModelConfig
from jobs.tasks.loading import load_model
from tests.support import tiny
from tests.support.fake_task import GRID, GROUPS, FakeTask, FakeWork

HERE = RunSettings(workers=0)


def test_every_record_has_its_row_and_bad_ones_an_error(tmp_path: Path) -> None:
    log, store = tmp_path / "log", Store(tmp_path / "results")
    log.mkdir()
    bad = {104: "raise", 111: "row"}

    def drive() -> tuple[int, int, list[int]]:
        outcome = run(store, GROUPS, GRID, FakeWork(log, bad), HERE)
        assert not outcome.stopped
        assert not outcome.duplicates
        return outcome.done, outcome.total, sorted(case_id for _, case_id, _ in outcome.dead)

    assert drive() == (74, 74, [104, 104, 111, 111])
    tries = (log / f"{GROUPS[0]}-104").read_text().splitlines()
    assert [line.split()[2] for line in tries] == ["1", "1", "2", "3"]  # Its lease, then alone.
    ran = {path.name: path.read_text() for path in log.glob("editor*")}
    assert drive() == (74, 74, [104, 104, 111, 111])
    assert {path.name: path.read_text() for path in log.glob("editor*")} == ran


def test_the_bar_moves_within_a_lease(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.progress.LOG_SECONDS", 0.0)
    (tmp_path / "log").mkdir()
    run(Store(tmp_path / "results"), GROUPS, GRID, FakeWork(tmp_path / "log"), HERE)
    shown = [
        int(line.partition("/")[0].split()[-1]) for line in capsys.readouterr().err.splitlines()
    ]
    assert set(shown) == set(range(75))  # Also those that end no lease.
    assert shown == sorted(shown)


def test_a_changed_state_ends_the_run_and_what_was_done_is_kept(tmp_path: Path) -> None:
    log, store = tmp_path / "log", Store(tmp_path / "results")
    log.mkdir()
    with pytest.raises(ValueError, match="the weights are not what they were"):
        run(store, GROUPS, GRID, FakeWork(log, {110: "dirty once"}), HERE)
    outcome = run(store, GROUPS, GRID, FakeWork(log), HERE)
    assert (outcome.done, outcome.dead) == (74, [])
    assert len((log / f"{GROUPS[0]}-100").read_text().splitlines()) == 1


def test_another_model_is_refused_with_the_difference(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    task = FakeTask(tmp_path / "log")
    with pytest.raises(RunError, match="fingerprint: the run has 'abc', the worker has 'f00'"):
        run(
            Store(tmp_path / "results"),
            GROUPS,
            GRID,
            FakeWork(tmp_path / "log"),
            HERE,
            expect={**task.describe(), "fingerprint": "abc"},
        )


def test_functions_are_called_here() -> None:
    here: list[int] = []
    assert once(here.append, 3, settings=HERE) is None
    assert list(stream(lambda n: iter(range(n)), 3, settings=HERE)) == [0, 1, 2]
    assert here == [3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees GPUs here")
def test_a_worker_whose_torch_sees_none_of_its_gpus_refuses_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model("gpt2")
    tiny.save(model, tmp_path)
    config = ModelConfig(name="tiny", source=str(tmp_path), dtype="float64")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ValueError, match=r"CUDA_VISIBLE_DEVICES=0.*workers.num_gpus=0"):
        load_model(config)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert load_model(config).device.type == "cpu"
