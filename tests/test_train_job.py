"""jobs.train as a user runs it: a tiny model, real records, real Ray, and a driver that dies."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from jobs.tasks.training import trained
from jobs.train import load
from rome.options import ConfigError
from tests.support import tiny
from tests.support.commands import command

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 30, 5
HERE = ("--set", "workers.workers=0")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a tiny GPT-2, a store of forty records, and a training of each kind."""
    folder = tmp_path_factory.mktemp("workspace")
    model = tiny.model("gpt2", "float32")
    tiny.save(model, folder / "model")
    # Many, since a tiny model often samples half a character, and such a passage is left out.
    passages = [" ".join(three) for three in itertools.product(tiny.SENTENCES, repeat=3)]
    (folder / "passages.txt").write_text("\n".join(passages), encoding="utf-8")
    source = {"name": "tiny", "source": str(folder / "model"), "dtype": "float32"}
    training = {"steps": STEPS, "rate": 1e-3, "rate_of_rates": 1e-2, "batch": 4}
    common = {
        "name": "tiny-mend",
        "model": source,
        "training": training | {"validate_every": EVERY, "validation": 8, "patience": 100},
        "workers": {"num_cpus": 0.5},
    }
    mend = {"editor": "mend", "network": {"rank": 8}}
    records = {"data": {"benchmark": str(folder / "records"), "skip": 4}}
    (folder / "mend.yaml").write_text(yaml.safe_dump(common | mend | records))
    ke = {"name": "tiny-ke", "editor": "ke", "network": {"hidden": 8, "condition": 8}}
    text = {"data": {"corpus": str(folder / "passages.txt"), "passages": 120, "beginning": 8}}
    (folder / "ke.yaml").write_text(yaml.safe_dump(common | ke | text))
    facts = ["everyday", "--limit", 40, "--shard-rows", 16, "--out", folder / "records"]
    assert command("prepare", *facts)[0] == 0
    return folder


def start(workspace: Path, ray_address: str, name: str, *arguments: str) -> subprocess.Popen[str]:
    """A training in a process of its own, that can be killed."""
    line = [sys.executable, "-m", "jobs.train", str(workspace / f"{name}.yaml"), *arguments]
    environment = os.environ | {"ROME_WORKSPACE": str(workspace), "RAY_ADDRESS": ray_address}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, bufsize=1
    )


def train(workspace: Path, name: str, *arguments: object) -> tuple[int, str]:
    return command("train", workspace / f"{name}.yaml", *arguments, ROME_WORKSPACE=workspace)


def curve(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "curve.parquet")


@pytest.fixture(scope="module")
def reference(workspace: Path, ray_address: str) -> Path:
    """A training that was never interrupted, where its editor finds it."""
    status, text = train(workspace, "mend")
    assert status == 0, text
    assert f"step {STEPS}/{STEPS}" in text
    return workspace / "hypernetworks" / "tiny-mend"


def test_the_curve_has_a_row_per_validation_and_falls(reference: Path) -> None:
    rows = curve(reference)
    assert rows["step"].to_list() == list(range(0, STEPS + 1, EVERY))
    unedited, first, last = rows.row(0, named=True), rows[1:3], rows[-2:]
    assert unedited["val_local_loss"] == 0
    assert unedited["train_loss"] is None
    assert sum(last["train_loss"]) < sum(first["train_loss"])
    assert min(rows["val_edit_loss"][1:].to_list()) < 0.9 * unedited["val_edit_loss"]
    assert rows["seconds"].is_sorted()
    assert (reference / "figures" / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL]
)
def test_a_killed_training_goes_on_as_if_it_had_not_been(
    reference: Path, workspace: Path, ray_address: str, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(workspace, ray_address, "mend", "--out", str(tmp_path))
    deadline = time.monotonic() + 100
    while not (tmp_path / "checkpoint.safetensors").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    assert STEPS not in curve(tmp_path)["step"]
    status, text = train(workspace, "mend", "--out", tmp_path)
    assert status == 0, text
    assert curve(tmp_path).drop("seconds").equals(curve(reference).drop("seconds"))
    weights = (reference / "weights.safetensors").read_bytes()
    assert (tmp_path / "weights.safetensors").read_bytes() == weights


def test_what_is_done_is_not_done_again(reference: Path, workspace: Path, ray_address: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    status, text = train(workspace, "mend")
    assert status == 0, text
    assert "edit accuracy" in text
    assert {path: path.stat().st_mtime_ns for path in reference.iterdir()} == before


def test_another_training_in_the_same_folder_is_refused(
    reference: Path, workspace: Path, ray_address: str
) -> None:
    status, text = train(workspace, "mend", "--set", "training.rate=0.5")
    assert status == 1
    assert "training.rate: 0.001 there, 0.5 now" in text


def test_ke_trains_on_continuations_that_the_model_wrote(workspace: Path) -> None:
    status, text = train(workspace, "ke", "--set", "training.steps=10", *HERE)
    assert status == 0, text
    folder = workspace / "hypernetworks" / "tiny-ke"
    assert curve(folder)["step"].to_list() == [0, 5, 10]
    examples = pl.read_parquet(folder / "examples.parquet")
    passages = (workspace / "passages.txt").read_text("utf-8").splitlines()
    for row in examples.to_dicts():
        assert any(passage.startswith(row["beginning"]) for passage in passages)
        assert not any(
            passage.startswith(row["beginning"] + row["sampled"]) for passage in passages
        )
        assert any(passage.startswith(row["local"] + row["local_end"]) for passage in passages)


def test_a_run_takes_its_trained_editor_from_the_workspace(
    reference: Path, workspace: Path, ray_address: str
) -> None:
    run: dict[str, Any] = {
        "name": "tiny",
        "model": yaml.safe_load((workspace / "mend.yaml").read_text())["model"],
        "benchmark": str(workspace / "records"),
        "editors": {"none": {}, "mend": {"weights": "tiny-mend"}},
        "records": {"limit": 4},
        "scoring": {"generation": {"max_tokens": 60}},
        "workers": {"workers": 0},
    }
    path = workspace / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    status, text = command("evaluate", path, "--out", workspace / "run", ROME_WORKSPACE=workspace)
    assert status == 0, text
    rows = pl.read_parquet(workspace / "run/results/**/*.parquet", hive_partitioning=True)
    assert (rows.filter(editor="mend")["edit_norm"] > 0).all()
    nll = {
        name: sum(rows.filter(editor=name)["rewrite_nll_new"].list.first())
        for name in run["editors"]
    }
    assert nll["mend"] < nll["none"]

    run["editors"]["mend"]["weights"] = "mend-smollm2-counterfact"
    path.write_text(yaml.safe_dump(run))
    other = [path, "--set", "name=other", "--out", workspace / "other"]
    status, text = command("evaluate", *other, ROME_WORKSPACE=workspace)
    assert status == 1
    assert "python -m jobs.train configs/train/mend-smollm2-counterfact.yaml" in text


def test_weights_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ROME_WORKSPACE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"python -m jobs\.train configs/train/x\.yaml"):
        trained("x")
    with pytest.raises(ConfigError, match=r"must be a file that jobs\.train wrote"):
        trained(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/train").glob("*.yaml")), ids=lambda path: path.stem
)
def test_configs_are_of_what_they_are_named_for(path: Path) -> None:
    config = load(str(path), [])
    assert config.name == path.stem
    assert config.editor == path.stem.partition("-")[0]
