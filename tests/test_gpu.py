"""The script for a GPU does all of its parts on a CPU, keeps what it did, and fails if one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.programs import gpu, gpu_correctness
from tests.programs.gpu_report import Task
from tests.support.computations import COMPUTATIONS, FAMILIES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

# A machine with a GPU may have none of these, nor this project as a package.
BARE = """
import sys
for name in (
    "ray", "polars", "pydantic", "nltk", "typer", "rich", "datasets", "gguf", "sklearn", "scipy",
    "matplotlib", "pytest", "peft", "accelerate",
):
    sys.modules[name] = None
from tests.programs import gpu
sys.exit(gpu.main(sys.argv[1:]))
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", BARE, "--device", "cpu", *arguments]


def environment() -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The text and the JSON of all parts on a machine without the packages of `BARE`."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    done = subprocess.run(
        command("--out", str(out), "--seconds", "1000"),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())


def test_every_computation_of_every_family_is_compared(found: tuple[str, dict[str, Any]]) -> None:
    text, kept = found
    names = {check["name"] for check in kept["checks"]}
    there = [name for name in COMPUTATIONS if not name.startswith("edit lora")]  # No peft.
    assert names >= {f"{f}, {name}, on cpu" for f in FAMILIES for name in there}
    assert "llama, edit lora together: it needs peft, which is not installed" in text
    assert "llama, edit mend, A B A" in names
    assert text.splitlines()[-1] == f"gpu: {len(names)} checks, 0 failed"
    assert all(check["passed"] for check in kept["checks"])
    # The other side is another path, not the same one again.
    assert any(
        "0.0e+00" not in check["note"] for check in kept["checks"] if "on cpu" in check["name"]
    )


def test_speed_and_profile_have_all_their_rows(found: tuple[str, dict[str, Any]]) -> None:
    text, kept = found
    assert [row["what"] for row in kept["speed"] if row["workers"] == 1][:8] == [
        *("keys", "values", "edit", "probabilities", "generation", "record"),
        *("row, unedited", "row, edited"),
    ]
    assert [row["workers"] for row in kept["speed"]][-1] == 2
    assert all(row["seconds"] > 0 for row in kept["speed"])
    stages = {row["stage"]: row for row in kept["profile"]}
    assert len(stages) == 5
    assert "aten::addmm" in " ".join(stages["probabilities"]["dearest on the host"])
    assert "left out: GE of whole rows: there is no nltk" in text
    assert "left out: device: auto: it needs a GPU" in text


def test_what_is_done_when_time_runs_out_is_printed_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["--parts", "correctness", "--seconds", "6", "--out", str(out)]
    done = subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads(out.read_text())
    checks = len(kept["checks"])
    assert 0 < checks < len(gpu_correctness.tasks("cpu"))
    assert f"gpu: {checks} checks, 0 failed" in done.stdout
    assert "left out: device: auto: no time was left" in done.stdout


def test_what_is_done_when_it_is_ended_is_printed_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    with subprocess.Popen(
        command("--parts", "correctness", "--out", str(out)),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not out.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    kept = json.loads(out.read_text())
    assert kept["checks"]
    assert f"gpu: {len(kept['checks'])} checks, 0 failed" in text
    assert "left out: device: auto: it was interrupted" in text


def test_a_wrong_number_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(device: str) -> list[Task]:
        chosen = [task for task in gpu_correctness.tasks(device) if task.name.startswith("gpt2")]
        return chosen[:2]

    monkeypatch.setitem(gpu.PARTS, "correctness", (wrong, 1.0))
    monkeypatch.setattr(gpu_correctness, "ROUNDING", -1.0)
    arguments = ["--device", "cpu", "--parts", "correctness", "--out", str(tmp_path / "x.json")]
    assert gpu.main(arguments) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "gpu: 2 checks, 2 failed"


def test_a_machine_without_a_gpu_is_told_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "speeds"])
    assert "--parts must be some of correctness,speed,profile" in capsys.readouterr().err
