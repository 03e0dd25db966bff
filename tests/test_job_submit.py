"""`ray job submit` of the embedded default against a head started as the README says."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import psutil
import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of a head's dashboard, and the environment of the cluster and of its users."""
    folder = tempfile.mkdtemp(dir="/tmp")  # Ray puts sockets in it, whose paths must be short.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a token of this test alone",
        "ROME_WORKSPACE": str(tmp_path / "workspace"),
    }
    dashboard = free_port()
    command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address=127.0.0.3", f"--port={free_port()}", "--num-cpus=2"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}"]
    command += ["--object-store-memory=100000000"]
    log = (tmp_path / "head.log").open("w")
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + 60
        while not answers(address, environment):
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            assert time.monotonic() < deadline, "the head did not come up"
            time.sleep(0.5)
        yield address, environment
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait(30)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def answers(address: str, environment: dict[str, str]) -> bool:
    """Whether the head takes jobs."""
    request = urllib.request.Request(f"{address}/api/jobs/")
    request.add_header("Authorization", f"Bearer {environment['RAY_AUTH_TOKEN']}")
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def test_the_embedded_default_runs_as_a_job_and_its_logs_show_progress(
    head: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = head
    job = [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--"]
    job += ["python", "-m", "jobs.evaluate", "configs/runs/everyday-rome.yaml"]
    job += ["--out", str(tmp_path / "run")]
    # Little of everything, so that it takes a minute.
    for override in (
        "records.limit=2",
        "lease_records=1",
        "model.second_moment.tokens=2000",
        "editors.rome.value.steps=2",
        "scoring.generation.max_tokens=30",
    ):
        job += ["--set", override]
    done = subprocess.run(job, env=environment, cwd=ROOT, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert "rows/s" in log
    assert " left, " in log
    assert "unedited" in log
    rows = pl.read_parquet(tmp_path / "run/results/**/*.parquet", hive_partitioning=True)
    assert sorted(rows["editor"].to_list()) == ["none", "none", "rome", "rome"]
    assert rows["status"].unique().to_list() == ["ok"]
