"""The fast core of `make chaos`: a few faults, few records, one seed."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jobs.evaluate import evaluate
from jobs.runs import config as configs
from tests.programs.chaos_faults import FAULTS, Scene, Verdict, judge
from tests.programs.chaos_nodes import Nodes, environment
from tests.programs.chaos_task import Spec, write_records

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Nodes, dict[str, str]]]:
    with environment() as variables:
        nodes = Nodes(2)
        yield nodes, variables
        nodes.shut()


@pytest.mark.parametrize(
    ("fault", "attempts"),
    [
        ("workers killed in a row", 4),
        # Once with its neighbours, three times alone, and perhaps once as a copy.
        ("records segfault", 5),
        ("driver killed", 3),
    ],
)
def test_nothing_is_lost_or_there_twice(
    cluster: tuple[Nodes, dict[str, str]], tmp_path: Path, fault: str, attempts: int
) -> None:
    nodes, variables = cluster
    (tmp_path / "log").mkdir()
    spec = Spec(str(tmp_path / "run"), str(tmp_path / "log"), records=800, seconds=0.01)
    write_records(spec)
    scene = Scene(nodes, spec, random.Random(0), variables)
    assert FAULTS[fault](scene) > 0
    verdict = judge(scene)
    assert verdict == Verdict(lost=0, duplicated=0, attempts=verdict.attempts)
    assert verdict.attempts <= attempts


@pytest.mark.long
def test_a_full_disk_ends_a_run_with_its_reason_and_the_same_line_goes_on() -> None:
    command = [sys.executable, "-m", "tests.programs.chaos", "disk stays full", "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "skipped" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    assert "| disk stays full | 1 | 1 | 0 | 0 |" in done.stdout


@pytest.mark.parametrize(
    ("damaged", "content", "says"),
    [
        ("run", b'{"name": "a r', "Restore it. Or, if this is the config that the run began with"),
        ("run", b"\xff\xfe", "is damaged"),
        ("run", b'{"name": "a run"}', "it lacks benchmark, config"),
        ("run", b"[]", "it lacks everything"),
        ("records", b'{"name', "prepare the records again"),
    ],
)
def test_a_damaged_manifest_is_refused_with_a_way_out(
    tmp_path: Path, damaged: str, content: bytes, says: str
) -> None:
    config = {
        "name": "a run",
        "model": {"name": "m", "source": str(tmp_path / "model"), "dtype": "float32"},
        "benchmark": str(tmp_path / "records"),
        "editors": {"none": {}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    for folder in ("run", "records"):
        (tmp_path / folder).mkdir()
        manifest = json.dumps({"name": "b", "version": "1", "fingerprint": "f"}).encode()
        (tmp_path / folder / "manifest.json").write_bytes(
            content if folder == damaged else manifest
        )
    with pytest.raises(ValueError, match=f"{tmp_path}/{damaged}/manifest.json is damaged") as why:
        evaluate(configs.load(tmp_path / "run.yaml"), str(tmp_path / "run"))
    assert says in str(why.value)
