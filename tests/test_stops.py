"""Jobs that are stopped before anything is done: no error, and the status that is run again."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.here import drive_here
from jobs.cli import STOPPED
from tests.support import tiny
from tests.support.commands import command
from tests.support.computations import FACTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, records, facts; a run that needs a second moment, one that does not, and a trace."""
    folder = tmp_path_factory.mktemp("stops")
    model = tiny.model("gpt2")
    tiny.save(model, folder / "model")
    (folder / "facts.json").write_text(json.dumps([asdict(fact) for fact in FACTS]))
    assert command("prepare", "everyday", "--limit", 3, "--out", folder / "records")[0] == 0
    config: dict[str, Any] = {
        "name": "stops",
        "model": {
            "name": "tiny",
            "source": str(folder / "model"),
            "dtype": "float64",
            "second_moment": {"corpus": "self", "tokens": 2000},
            "editors": {"rome": {"layer": 1}},
        },
        "workers": {"workers": 0},
    }
    rows = {"benchmark": str(folder / "records"), "templates": {"texts": ["{}"]}}
    files: dict[str, dict[str, Any]] = {
        "run": {**rows, "editors": {"none": {}, "rome": {}}},
        "unedited": {**rows, "editors": {"none": {}}},
        "trace": {"facts": str(folder / "facts.json")},
    }
    for name, more in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | more))
    return folder


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as soon as a run begins."""

    def stop_and_drive(*args: Any) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return drive_here(*args)

    monkeypatch.setattr("cluster.run.drive_here", stop_and_drive)


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize(
    ("job", "file", "what"),
    [
        ("evaluate", "unedited", "rows"),
        ("evaluate", "run", "chunks"),
        ("second_moment", "run", "chunks"),
        ("sweep", "run", "chunks"),
        ("trace", "trace", "traces"),
    ],
)
def test_a_job_that_is_stopped_at_once_says_how_to_go_on(
    folder: Path, tmp_path: Path, job: str, file: str, what: str
) -> None:
    out = () if job == "second_moment" else ("--out", tmp_path / "out")
    status, said = command(job, folder / f"{file}.yaml", *out, ROME_WORKSPACE=tmp_path)
    assert status == STOPPED, said
    assert "stopped: 0 of " in said
    assert f"{what} are done; the same line resumes: " in said
    assert "error" not in said
