"""What a hostile name, link, archive or neighbour on the network must not do."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cluster import metrics
from cluster.metrics import Metrics
from cluster.store import Store
from jobs.runs import config as configs
from jobs.tasks.training import trained
from rome import yaml_text
from rome.editors import hypernetwork
from rome.edits import files as edit_files
from rome.files import replacing
from rome.models import files as model_files
from rome.options import ConfigError
from rome.paths import CONFIGS, inside, local
from rome.second_moment import import_npz
from tests.support import tiny
from tests.support.commands import command

RUN = "configs/runs/everyday-rome.yaml"


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/etc/x", "", ".", "a\0b"])
def test_names_do_not_leave_the_workspace(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give another name"):
        inside(tmp_path, name)
    with pytest.raises(ValueError, match="give another name"):
        trained(name)


def test_a_path_that_is_no_path_makes_no_folder_of_the_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes a path alone refuses a URI, and what takes both a URI that is none."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no URI, got s3:/bucket/a"):
        local(Path("s3://bucket/a"))
    for job, *line in (
        ("compare", "x", "--out", "s3://bucket/a"),
        ("export", "x", "memit@1", "--out", "file:///tmp/a"),
        ("study", "make", "x", "--out", "gs://bucket/a"),
    ):
        status, text = command(job, *line)
        assert (status, "no URI" in text) == (2, True), text
    config = CONFIGS / "runs" / "everyday-rome.yaml"
    for out, message in (("s3:/b/run", "two slashes"), ("file:///tmp/run?1", "as %23 and %3F")):
        status, text = command("evaluate", config, "--out", out, ROME_WORKSPACE=tmp_path / "w")
        assert (status, message in text) == (1, True), text
    status, text = command("evaluate", config, ROME_WORKSPACE="s3://bucket/w")
    assert (status, "no URI, got s3://bucket/w" in text) == (1, True), text
    assert not list(tmp_path.iterdir())


def test_a_runs_name_does_not_leave_the_workspace(tmp_path: Path) -> None:
    status, text = command("evaluate", RUN, "--set", "name=../../x", ROME_WORKSPACE=tmp_path / "w")
    assert (status, "give another name" in text) == (1, True)
    assert not list(tmp_path.iterdir())
    assert inside(tmp_path, "é 東/b") == tmp_path / "é 東" / "b"


def test_metrics_have_ascii_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, lambda *_, **__: None)
    assert Metrics("/w/é 東")._run == {"run": "/w/%C3%A9 %E6%9D%B1"}
    assert len(Metrics("東" * 400)._run["run"]) == 255


@pytest.mark.parametrize(
    "override",
    [
        "model.source=https://me:hush@host/m",
        "model.source=https://host/m?token=hush",
        "benchmark=s3://key:hush@bucket/x",
        "model.second_moment.corpus=https://host/x?X-Amz-Signature=hush",
    ],
)
def test_a_config_holds_no_credentials(override: str) -> None:
    with pytest.raises(ConfigError, match="must have no password, key or token") as caught:
        configs.load(CONFIGS / "runs" / "everyday-rome.yaml", [override])
    assert "hush" not in str(caught.value)
    assert override.partition("=")[0] in str(caught.value)


def test_temporaries_are_new_files_and_no_links_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("whole")

    class Known:
        hex = "known"

    monkeypatch.setattr("uuid.uuid4", Known)
    (tmp_path / ".tmp-known").symlink_to(victim)
    (tmp_path / ".tmp-known-a").symlink_to(victim)
    with pytest.raises(OSError, match="exists"):
        Store(tmp_path).write_bytes("a", b"x")
    with pytest.raises(OSError, match="exists"), replacing(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert victim.read_text() == "whole"


def npz(path: Path, **arrays: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in arrays.items():
            archive.writestr(f"mom2.{name}.npy", data)
    return path


def npy(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def test_archives_of_numbers_end_at_a_bound(tmp_path: Path) -> None:
    count, square = npy(np.array(3)), npy(np.eye(3))
    assert import_npz(npz(tmp_path / "a.npz", mom2=square, count=count)).count == 3
    huge = npy(np.eye(3)).replace(b"'shape': (3, 3), }          ", b"'shape': (900000,900000)}   ")
    with pytest.raises(ValueError, match="must be of 16 GiB at most"):
        import_npz(npz(tmp_path / "b.npz", mom2=huge, count=count))
    objects = npy(np.array([None, {}]))
    with pytest.raises(ValueError, match="holds Python objects"):
        import_npz(npz(tmp_path / "c.npz", mom2=objects, count=count))
    for data in (b"", b"PK\x03\x04", (tmp_path / "a.npz").read_bytes()[:-40]):
        (tmp_path / "d.npz").write_bytes(data)
        with pytest.raises(ValueError, match=r"d\.npz is damaged"):
            import_npz(tmp_path / "d.npz")
    with pytest.raises(ValueError, match=r"mom2\.mom2 is damaged"):
        import_npz(npz(tmp_path / "e.npz", mom2=b"\x93NUMPY\x01", count=count))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 2**60),
        struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**62),
        struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 2**40),
    ],
)
def test_a_gguf_that_claims_more_than_it_has_is_damaged(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.gguf is damaged or no GGUF"):
        model_files._check_gguf(file)


def safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "data",
    [
        b"",
        (2**62).to_bytes(8, "little") + b"{}",
        safetensors(b"[" * 100_000),
        safetensors(b"{}"),
        safetensors(b'{"__metadata__": {"origin": "[[", "edits": "[]"}}'),
        safetensors(b'{"__metadata__": {"origin": "{}", "edits": "' + b"[" * 100_000 + b'"}}'),
    ],
)
def test_edits_and_networks_with_hostile_headers_are_damaged(data: bytes, tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    with pytest.raises(ValueError, match="the file is damaged"):
        edit_files.loads(data, model, "f", "the file")
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
        hypernetwork.origin_for(tmp_path / "x.safetensors", model, "mend")


def test_yaml_ends_at_a_bound() -> None:
    names = "abcdefghij"
    laughs = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in pairwise(names)
    )
    for text, says in (
        (laughs, "line 7: with its aliases written out"),
        ("a: &a [*a]", "line 1: an alias is inside its own anchor"),
        ("[" * 100_000, "recursion"),
    ):
        with pytest.raises(yaml_text.YamlError, match=says):
            yaml_text.load(text)
    assert yaml_text.load("- &b {x: 1}\n- *b\n- <<: *b\n  y: 2") == [
        {"x": 1},
        {"x": 1},
        {"x": 1, "y": 2},
    ]


_LISTENING = """
import sys
import psutil, ray
from cluster.calls import FaultError, once
from cluster.joining import ensure_ray
from cluster.settings import RunSettings
from rome.settings import within
ensure_ray(RunSettings())
settings = RunSettings(num_cpus=0.5)
for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
    for found in process.net_connections("inet"):
        if found.status == "LISTEN":
            print("at", found.laddr.ip)
try:
    once(within, "rate", 3, 0, 1, settings=settings)
except ValueError as error:
    print("said", error)
try:
    once(int, "x", settings=settings)
except FaultError as error:
    text = str(error)
    print("fault", "Traceback" in text, "invalid literal" in text, "\\x1b" in text)
"""


@pytest.mark.ray
def test_a_local_ray_listens_on_loopback_alone_and_tells_mistakes_from_faults(
    tmp_path: Path,
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", _LISTENING],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    places = {line.removeprefix("at ") for line in lines if line.startswith("at ")}
    assert places
    assert places <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, places
    assert "said rate must be from 0 to 1, got 3" in lines
    assert "Token authentication" not in done.stderr
    assert "fault True True False" in lines
