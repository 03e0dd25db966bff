"""A command answers what needs no model before it imports what is slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.__main__ import COMMANDS
from jobs.cli import check_config
from rome.options import ConfigError

SLOW = ("torch", "ray", "transformers", "scipy", "matplotlib", "sklearn", "datasets")
RUN = "configs/runs/everyday-rome.yaml"
PROGRAM = """
import atexit, json, sys, time
*sys.argv[1:], slow = json.loads(sys.argv.pop())
atexit.register(lambda: print(json.dumps({
    "slow": sorted(set(slow) & sys.modules.keys()), "seconds": time.process_time()
})))
from jobs.__main__ import app
app()
"""
JOBS = [name for name in COMMANDS if name not in ("edit", "show")]


def answer(*line: str) -> tuple[int, str, dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([*line, SLOW])], capture_output=True, text=True
    )
    said, _, measured = done.stdout.rstrip().rpartition("\n")
    return done.returncode, said + done.stderr, json.loads(measured)


def check(measured: dict[str, object]) -> None:
    assert measured["slow"] == []
    assert float(str(measured["seconds"])) < 0.5


def test_the_map_of_all_commands() -> None:
    status, said, measured = answer("--help")
    assert status == 0
    assert all(name in said for name in COMMANDS)
    check(measured)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str) -> None:
    status, said, measured = answer(name, "--help")
    assert (status, "Usage:" in said) == (0, True)
    check(measured)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["evalute"], "Did you mean 'evaluate'?"),
        (["evaluate", "x.yaml", "--sett", "a=1"], "No such option"),
        (["evaluate", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (
            ["evaluate", RUN, "--set", "limit"],
            "--set takes key=value",
        ),
        (["evaluate", RUN, "--set", "records.limt=3"], "records.limt: unknown key 'limt'; did you"),
        (["sweep", RUN, "--set", "scoring.strct=true"], "did you mean 'strict'?"),
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["reduce", "/nowhere"], "/nowhere is not a run directory"),
        (["compare", "/nowhere"], "/nowhere is not a run directory"),
        (["report", "/nowhere"], "/nowhere is not a run directory"),
        (
            ["judge", "/nowhere", "--endpoint", "http://localhost:1/v1", "--model", "m"],
            "/nowhere is not a run directory",
        ),
        (["status", "/nowhere"], "/nowhere is not a run directory"),
        (["report", "/nowhere", "--out", "s3://bucket/report.html"], "no URI, got s3:/bucket"),
        (["study", "make", "/nowhere", "--out", "x"], "/nowhere is not a run directory"),
    ],
)
def test_a_slip_of_the_hand(line: list[str], says: str) -> None:
    status, said, measured = answer(*line)
    assert status in (1, 2)
    assert says in said
    check(measured)


def test_every_job_is_a_module_that_says_the_same(tmp_path: Path) -> None:
    """`python -m jobs.NAME` is `rome-bench NAME`."""
    for name in JOBS:
        module = f"jobs.{name.replace('-', '_')}"
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[2:] == answer(name, "--help")[1].splitlines()[2:]


def test_a_right_line_passes_the_look_at_its_files() -> None:
    """A run's model is a name in its file, and its keys may be set."""
    run = "configs/runs/everyday-rome.yaml"
    check_config(run, ["model.second_moment.tokens=auto", "model=gpt2-xl"])
    with pytest.raises(ConfigError, match="did you mean"):
        check_config(run, ["model=gpt2-xxl"])
