"""jobs.evaluate as a user runs it: a tiny model, real records, real Ray, and things that die."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from rome import second_moment
from tests.support import tiny
from tests.support.commands import command

ROOT = Path(__file__).parents[1]
HERE = ["workers.workers=0", "templates.texts=['{}']"]
"""Without Ray, whose workers take seconds to start."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a tiny GPT-2 in float64, its run file, and a store of twelve records."""
    folder = tmp_path_factory.mktemp("workspace")
    model = tiny.model("gpt2")
    tiny.save(model, folder / "model")
    config = {
        "name": "tiny",
        "model": {
            "name": "tiny-gpt2",
            "source": str(folder / "model"),
            "dtype": "float64",
            "second_moment": {"corpus": "self", "tokens": 2000},
            "editors": {"rome": {"layer": 1, "value": {"steps": 3}}},
        },
        "benchmark": str(folder / "records"),
        "editors": {"none": {}, "rome": {}},
        "scoring": {"generation": {"max_tokens": 90}},
        "lease_records": 3,
        "workers": {"num_cpus": 0.5, "workers": 2},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    prepare("everyday", "--limit", 12, "--shard-rows", 7, "--out", folder / "records")
    return folder


def prepare(*arguments: object) -> None:
    status, text = command("prepare", *arguments)
    assert status == 0, text


def options(workspace: Path, out: Path, overrides: Iterable[str]) -> list[str]:
    sets = [part for override in overrides for part in ("--set", override)]
    return [str(workspace / "tiny.yaml"), "--out", str(out), *sets]


def start(workspace: Path, out: Path, ray_address: str, *overrides: str) -> subprocess.Popen[str]:
    """A run in a process of its own, that can be killed, or that must not have joined a Ray."""
    line = [sys.executable, "-m", "jobs.evaluate", *options(workspace, out, overrides)]
    environment = os.environ | {"ROME_WORKSPACE": str(workspace), "RAY_ADDRESS": ray_address}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True, bufsize=1
    )


def evaluate(workspace: Path, out: Path, *overrides: str) -> tuple[int, str]:
    return command("evaluate", *options(workspace, out, overrides), ROME_WORKSPACE=workspace)


def rows(out: Path) -> pl.DataFrame:
    """All rows of a run by editor and case; a row that is there twice fails the test."""
    frame = pl.read_parquet(out / "results/**/*.parquet", hive_partitioning=True)
    assert not frame.select("editor", "case_id").is_duplicated().any()
    return frame.sort("editor", "case_id")


def numbers(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """What must not depend on who computed it or when."""
    return frame.drop("worker", pl.selectors.starts_with("seconds_")).to_dicts()


def same(a: Any, b: Any) -> bool:
    """But for the name of the run, which is that of its folder."""
    if isinstance(a, dict):
        return all(same(a[key], b[key]) for key in a if key != "run")
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == pytest.approx(b, rel=1e-6, abs=1e-9)) if isinstance(a, float) else a == b


@pytest.fixture(scope="module")
def reference(workspace: Path, ray_address: str) -> Path:
    """A whole run by two workers."""
    out = workspace / "runs" / "reference"
    status, text = evaluate(workspace, out)
    assert status == 0, text
    return out


def test_every_record_has_its_row_under_every_editor(reference: Path, workspace: Path) -> None:
    frame = rows(reference)
    assert frame.height == 24
    assert frame["status"].unique().to_list() == ["ok"]
    assert frame["neighborhood_nll_true"].list.len().unique().to_list() == [10]
    assert (frame.filter(editor="none")["edit_steps"].is_null()).all()
    assert (frame.filter(editor="rome")["edit_steps"] == 3).all()
    assert (frame["GE"] > 0).all()
    # An edit of a random model still moves its own prompt the most.
    before, after = (
        frame.filter(editor=e)["rewrite_nll_new"].list.first() for e in ("none", "rome")
    )
    assert (after < before).all()
    manifest = json.loads((reference / "manifest.json").read_text())
    assert manifest["context_templates"][0] == "{}"
    assert len(manifest["context_templates"]) == 21
    assert manifest["name"] == "reference"  # As its folder.
    assert frame["run"].unique().to_list() == ["reference"]
    assert manifest["records"] == 12
    assert "unedited" in (reference / "table.md").read_text()


def test_same_numbers_whatever_the_workers_leases_and_batches(
    reference: Path, workspace: Path, ray_address: str
) -> None:
    out = workspace / "runs" / "other"
    overrides = ["workers.workers=1", "lease_records=5", "token_budget=400"]
    status, text = evaluate(workspace, out, *overrides)
    assert status == 0, text
    for one, other in zip(numbers(rows(reference)), numbers(rows(out)), strict=True):
        assert same(one, other), (one, other)


def test_no_workers_do_the_same_in_this_process_without_ray(
    reference: Path, workspace: Path
) -> None:
    """From a copy of the checkpoint, which changes nothing either."""
    out = workspace / "runs" / "here"
    process = start(workspace, out, "nowhere:1", "workers.workers=0", "model.local_copy=true")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for one, other in zip(numbers(rows(reference)), numbers(rows(out)), strict=True):
        assert same(one, other), (one, other)


def test_the_same_line_again_does_nothing_in_seconds(
    reference: Path, workspace: Path, ray_address: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference.glob("results/**/*.parquet")}
    began = time.monotonic()
    status, text = evaluate(workspace, reference)
    assert (status, time.monotonic() - began < 20) == (0, True), text
    assert "unedited" in text
    assert before == {p: p.stat().st_mtime_ns for p in reference.glob("results/**/*.parquet")}


def test_another_config_on_a_run_is_refused_with_the_difference(
    reference: Path, workspace: Path, ray_address: str
) -> None:
    status, text = evaluate(workspace, reference, "editors.rome.value.steps=4")
    assert status == 1
    assert "config.editors.rome.value: None there, {'steps': 4} now" in text
    assert "--out" in text


@pytest.mark.long
def test_killed_worker_and_killed_driver_lose_and_duplicate_nothing(
    reference: Path, workspace: Path, ray_address: str
) -> None:
    out = workspace / "runs" / "killed"
    process = start(workspace, out, ray_address, "lease_records=1")
    _wait_for_parts(out, 2)
    worker = rows(out)["worker"][0]
    os.kill(int(worker.rpartition(":")[2]), signal.SIGKILL)
    _wait_for_parts(out, 6)
    process.kill()
    process.communicate()
    done = set(out.glob("results/**/*.parquet"))
    assert len(done) < 24
    stamps = {path: path.stat().st_mtime_ns for path in done}
    status, text = evaluate(workspace, out, "lease_records=1")
    assert status == 0, text
    assert stamps == {path: path.stat().st_mtime_ns for path in done}
    frame = rows(out)
    assert frame.height == 24
    for one, other in zip(numbers(rows(reference)), numbers(frame), strict=True):
        assert same({**one, "attempts": 0}, {**other, "attempts": 0})


def test_a_record_that_cannot_be_done_is_a_row_with_its_error(
    workspace: Path, tmp_path: Path
) -> None:
    fact = {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": "{} is in",
            "subject": "Paris",
            "target_new": {"str": "Italy", "id": None},
            "target_true": {"str": "France", "id": None},
            "relation_id": "P17",
        },
        "paraphrase_prompts": ["Where is Paris? In"],
        "neighborhood_prompts": ["Lyon is in"],
        "attribute_prompts": [],
        "generation_prompts": ["Paris is"],
    }
    # Longer than the 128 positions that the model has.
    long = fact | {"case_id": 1, "paraphrase_prompts": ["In 1890 it was. " * 60 + "Paris is in"]}
    (tmp_path / "facts.json").write_text(json.dumps([fact, long, fact | {"case_id": 2}]))
    store = tmp_path / "records"
    prepare(tmp_path / "facts.json", "--out", store)
    status, text = evaluate(workspace, tmp_path / "run", f"benchmark={store}", *HERE)
    assert status == 3, text
    frame = rows(tmp_path / "run")
    assert frame.filter(case_id=1)["status"].to_list() == ["error", "error"]
    assert frame["attempts"].unique().to_list() == [1]  # It would have the error again.
    assert frame.filter(pl.col("case_id") != 1)["status"].to_list() == ["ok"] * 4
    assert "case 1" in text
    assert "128 positions" in frame.filter(case_id=1)["error"][0]


def test_a_mistyped_key_names_the_right_one(workspace: Path, ray_address: str) -> None:
    status, text = evaluate(workspace, workspace / "runs/x", "editors.rome.kyes=mean")
    assert status == 1
    assert "'kyes'; did you mean 'keys'?" in text
    assert not (workspace / "runs/x").exists()


def _wait_for_parts(out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(out.glob("results/**/part-*.parquet"))) < count:
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.02)


def test_another_second_moment_than_the_run_began_with_is_refused(
    reference: Path, workspace: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(workspace / "second_moments", copied / "second_moments")
    for name in ("model", "records", "tiny.yaml"):
        (copied / name).symlink_to(workspace / name)
    out = tmp_path / "run"
    limited = ["records.limit=2", "editors={rome: {}}", *HERE]
    assert evaluate(copied, out, *limited)[0] == 0
    next(out.glob("results/**/*.parquet")).unlink()
    (file,) = copied.glob("second_moments/tiny-gpt2/*.safetensors")
    moment, origin = second_moment.load(file)
    assert origin is not None
    moment.sum_KK[0, 0] *= 2
    second_moment.save(file, moment, origin)
    status, text = evaluate(copied, out, *limited)
    assert status == 1
    assert "must be the second moment that the run began with" in text


@pytest.fixture
def two_models(workspace: Path, tmp_path: Path) -> str:
    """What says that a run is of the tiny GPT-2 and of a tiny Llama."""
    there = yaml.safe_load((workspace / "tiny.yaml").read_text())["model"]
    llama = tiny.model("llama")
    tiny.save(llama, tmp_path / "llama")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(there))
    other = there | {"name": "tiny/llama", "source": str(tmp_path / "llama")}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(other))
    return f"model=[{tmp_path}/a.yaml, {tmp_path}/b.yaml]"


def test_several_models_are_one_run_with_one_table(
    workspace: Path, tmp_path: Path, two_models: str
) -> None:
    out = tmp_path / "run"
    overrides = [two_models, "records.limit=2", *HERE]
    status, text = evaluate(workspace, out, *overrides)
    assert status == 0, text
    assert text.count("NS_plus: NS after") == 1  # Below the one table.
    folders = {"tiny-gpt2": "tiny-gpt2", "tiny/llama": "tiny%2Fllama"}
    for name in folders.values():  # The end says where each is, and what may follow.
        assert f"run: {out / name}, in 0:" in text
        assert f"next: python -m jobs.report {out / name} --out {name}.html" in text
    manifests = [
        json.loads((out / name / "manifest.json").read_text()) for name in folders.values()
    ]
    assert [one["config"]["model"]["name"] for one in manifests] == [*folders]
    assert manifests[0]["model_fingerprint"] != manifests[1]["model_fingerprint"]
    frame = pl.read_parquet(out / "*/results/**/*.parquet", hive_partitioning=True)
    assert frame.group_by("model", "editor").len().sort("model", "editor").rows() == [
        (model, editor, 2) for model in folders for editor in ("none", "rome")
    ]
    parts = {path: path.stat().st_mtime_ns for path in out.rglob("part-*.parquet")}
    gone = next(path for path in parts if "llama" in str(path))
    gone.unlink()
    status, text = evaluate(workspace, out, *overrides)
    assert status == 0, text
    again = {path: path.stat().st_mtime_ns for path in out.rglob("part-*.parquet")}
    assert {path for path in parts if again[path] != parts[path]} == {gone}


def test_what_does_not_fit_one_of_the_models_is_refused_before_the_first_begins(
    workspace: Path, tmp_path: Path, two_models: str
) -> None:
    short = yaml.safe_load((tmp_path / "b.yaml").read_text())
    settings = json.loads((tmp_path / "llama/config.json").read_text())
    (tmp_path / "llama/config.json").write_text(
        json.dumps(settings | {"max_position_embeddings": 80})
    )
    status, text = evaluate(workspace, tmp_path / "run", two_models)
    assert status == 1
    assert (
        f"scoring.generation.max_tokens must be at most the 80 positions of {short['name']}" in text
    )
    assert not (tmp_path / "run").exists()
