"""The store, a run and its readers on a real S3 server process."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
import yaml

from cluster.lock import LOCK_NAME, LockedError, RunLock
from cluster.queue import read_parts
from cluster.store import Store, StoreError, retry
from jobs.runs import manifests
from jobs.runs.config import CorpusConfig, ModelConfig
from jobs.tasks import moments
from rome.second_moment import MomentOrigin, SecondMoment, load, save
from tests.programs.chaos_chain_faults import ChainScene
from tests.programs.chaos_chains import ChainSpec, finish_here
from tests.programs.chaos_faults import FAULTS, Scene, Verdict, judge, wait_for
from tests.programs.chaos_nodes import Nodes, environment
from tests.programs.chaos_task import Spec, write_records
from tests.support import s3_server, tiny

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[1]
TABLE = pa.table({"case_id": [1, 2, 3]})


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with s3_server.server() as variables, environment(variables) as everything:
        yield everything


@pytest.fixture
def store(s3: dict[str, str], request: pytest.FixtureRequest) -> Store:
    return Store(f"s3://{s3_server.BUCKET}/{request.node.name}/folder")


def test_files_are_written_replaced_listed_and_deleted(store: Store) -> None:
    assert store.list() == []
    assert store.write_table("editor=x/part-0.parquet", TABLE) > 100
    store.write_bytes("editor=x/_hidden", b"1")
    store.sub("editor=x").write_bytes("note", b"1")
    store.write_bytes("editor=x/note", b"22")
    assert store.read_bytes("editor=x/note") == b"22"
    assert store.list() == ["editor=x/note", "editor=x/part-0.parquet"]
    assert store.list("editor=x/part-", ".parquet") == ["editor=x/part-0.parquet"]
    assert store.read_table("editor=x/part-0.parquet").equals(TABLE)
    assert not store.exists("editor=x/part-1.parquet")
    with pytest.raises(FileNotFoundError):
        store.read_bytes("editor=x/part-1.parquet")
    store.delete("editor=x/note")
    assert not store.exists("editor=x/note")
    age = time.time() - store.committed("editor=x/part-0.parquet").timestamp()
    assert -5 < age < 60


def test_a_damaged_part_is_set_aside(store: Store) -> None:
    store.write_table("g/part-0.parquet", TABLE)
    store.write_bytes("g/part-1.parquet", store.read_bytes("g/part-0.parquet")[:-10])
    assert read_parts(store, store.list()).damaged == ["g/part-1.parquet"]
    assert store.set_aside("g/part-1.parquet") == "_damaged/g/part-1.parquet"
    assert store.list() == ["g/part-0.parquet"]


def test_a_bucket_that_is_not_there_is_the_stores_fault(s3: dict[str, str]) -> None:
    with pytest.raises(StoreError, match="s3://nowhere"):
        Store("s3://nowhere/x").write_bytes("name", b"1")


def test_a_store_that_comes_back_is_waited_for(store: Store) -> None:
    calls = []

    def write() -> str:
        calls.append(1)
        if len(calls) < 3:
            Store("s3://nowhere/x").write_bytes("name", b"1")
        return "written"

    assert retry(write, 5) == "written"
    with pytest.raises(StoreError):
        retry(lambda: Store("s3://nowhere/x").write_bytes("name", b"1"), 0.1)


def test_one_driver_at_a_time(store: Store) -> None:
    with RunLock(store, beat=0.3), pytest.raises(LockedError, match=f"process {os.getpid()} "):
        RunLock(store, beat=0.3).__enter__()
    assert not store.exists(LOCK_NAME)
    store.write_bytes(LOCK_NAME, b'{"host": ')  # Of a driver that nobody knows and that is gone.
    with RunLock(store, beat=0.3) as lock:
        assert lock.taken_by is None


@pytest.mark.parametrize(
    "fault", ["two drivers", pytest.param("workers killed in a row", marks=pytest.mark.long)]
)
def test_nothing_is_lost_or_there_twice(
    s3: dict[str, str], nodes: Nodes, tmp_path: Path, fault: str
) -> None:
    root = f"s3://{s3_server.BUCKET}/chaos/{fault.replace(' ', '-')}"
    spec = Spec(root, str(tmp_path), records=640, seconds=0.05)
    write_records(spec)
    scene = Scene(nodes, spec, random.Random(0), s3)
    FAULTS[fault](scene)
    verdict = judge(scene)
    assert (verdict.lost, verdict.duplicated) == (0, 0)


def test_a_chain_loses_its_workers_and_its_driver(
    s3: dict[str, str], nodes: Nodes, tmp_path: Path
) -> None:
    spec = ChainSpec(f"s3://{s3_server.BUCKET}/chains", str(tmp_path))
    scene = ChainScene(nodes, spec, random.Random(0), s3)
    scene.prepare()
    inside = "scores 1 4", "batch 0 4"
    with scene.driver(dies=inside) as process:
        wait_for(lambda: all(map(spec.died, inside)) or process.poll() is not None)
        process.kill()
    assert len(list(tmp_path.glob("died *"))) == 2
    finish_here(spec)
    verdict = scene.judge()
    assert verdict == Verdict(lost=0, duplicated=0, attempts=verdict.attempts)
    assert verdict.attempts <= 3
    table = Store(spec.root).read_table("run/chains.parquet")
    assert table["edits"].to_pylist() == [4, 12]


@pytest.fixture(scope="module")
def nodes(s3: dict[str, str]) -> Iterator[Nodes]:
    nodes = Nodes(2)
    yield nodes
    nodes.shut()


def test_records_results_table_and_status_are_all_there(
    s3: dict[str, str], nodes: Nodes, tmp_path: Path
) -> None:
    root = f"s3://{s3_server.BUCKET}/whole"
    model = tiny.model("gpt2")
    tiny.save(model, tmp_path / "model")
    config = {
        "name": "tiny",
        "model": {
            "name": "tiny-gpt2",
            "source": str(tmp_path / "model"),
            "dtype": "float32",
            "second_moment": {"tokens": 2000},
        },
        "benchmark": f"{root}/records",
        "editors": {"none": {}, "rome": {"layer": 1, "value": {"steps": 2}}},
        "second_moments": f"{root}/moments",
        "scoring": {"generation": {"max_tokens": 90}},
        "lease_records": 2,
        "workers": {"num_cpus": 1, "workers": 1, "logs": "json"},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    variables = s3 | {"ROME_WORKSPACE": str(tmp_path / "own"), "RAY_ADDRESS": nodes.address}

    def job(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", f"jobs.{name}", *arguments],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done

    job("prepare", "everyday", "--out", f"{root}/records", "--limit", "6", "--shard-rows", "4")
    named = ("--set", "name=tiny")
    said = job("evaluate", str(tmp_path / "tiny.yaml"), "--out", f"{root}/run", *named).stderr
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert any(line.get("run") == "tiny" and "12/12" in line["message"] for line in lines)
    logs = Path(s3["RAY_TMPDIR"]).glob("ray/session_latest/logs/worker-*.err")
    done = [
        json.loads(line)
        for log in logs
        for line in log.read_text().splitlines()
        if '"lease done"' in line
    ]
    leases = [lease for lease in done if lease["run"] == "tiny"]
    assert sorted(case for lease in leases for case in lease["case_ids"]) == sorted([*range(6)] * 2)
    runs = {lease["run"].rpartition("-")[0] or lease["run"] for lease in done}
    assert runs == {"tiny", f"{root}/moments/tiny-gpt2/unfinished-1"}
    assert "unedited" in job("reduce", f"{root}/run").stdout
    assert "12 of 12 rows (100.0 %), 0 left" in job("status", f"{root}/run").stdout
    with pytest.MonkeyPatch.context() as patch:
        for key, value in s3.items():
            patch.setenv(key, value)
        rows = pl.read_parquet(f"{root}/run/results/**/*.parquet")
        (moment,) = Store(f"{root}/moments").list()  # And nothing of the sums.
        content = Store(f"{root}/moments").read_bytes(moment)
    assert rows["status"].to_list() == ["ok"] * 12
    # The machine's own copy, which all workers mapped.
    copies = Path(os.environ.get("ROME_CACHE", "~/.cache/rome-bench")).expanduser() / "copies"
    assert not (tmp_path / "own" / "second_moments").exists()
    copy = copies / f"{hashlib.sha256(content).hexdigest()}.safetensors"
    assert copy.read_bytes() == content
    copied = copy.stat().st_mtime_ns
    here = ("--set", "workers.workers=0")
    job("evaluate", str(tmp_path / "tiny.yaml"), "--out", f"{root}/again", *here)
    assert copy.stat().st_mtime_ns == copied
    copy.unlink()


def test_a_given_second_moment_may_lie_in_an_object_store(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROME_CACHE", str(tmp_path / "cache"))
    moment, rows = SecondMoment.zeros(4), torch.randn(40, 4, generator=torch.manual_seed(0))
    moment.add(rows)
    origin = MomentOrigin(
        model="tiny",
        model_fingerprint="a" * 64,
        layer=1,
        weight="h.1.mlp",
        corpus="texts",
        corpus_fingerprint="b" * 64,
    )
    save(tmp_path / "layer-1.safetensors", moment, origin)
    arrays: dict[str, Any] = {"mom2.mom2": moment.sum_KK.numpy(), "mom2.count": np.array(40)}
    np.savez(tmp_path / "layer-2.npz", **arrays)
    for path in tmp_path.glob("layer-*"):
        store.write_bytes(f"given/{path.name}", path.read_bytes())

    def ask(layer: int, suffix: str, folder: str = f"{store.uri}/given") -> tuple[str, bool]:
        file = f"{folder}/layer-{{layer}}.{suffix}"
        config = ModelConfig(
            name="tiny", source="tiny", dtype="float32", second_moment=CorpusConfig(file=file)
        )
        weight = moments.Weight(layer, f"h.{layer}.mlp", 4)
        return moments.given(config, weight, store.sub("made"), "a" * 64)

    assert ask(1, "safetensors") == (store.sub("given/layer-1.safetensors").uri, True)
    made, told = ask(2, "npz")
    assert not told
    assert made.startswith(f"{store.uri}/made/layer-2-")
    known = {"file": made, "sha256": manifests.file_sha256(made)}
    found, _ = load(manifests.at_hand(known, "second moment"))
    torch.testing.assert_close(found.mean(), moment.mean(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"given/layer-3.npz: no such file"):
        ask(3, "npz")
    local = ask(1, "safetensors", f"file://{tmp_path}")
    assert local == (f"file://{tmp_path}/layer-1.safetensors", True)
    known = {"file": local[0], "sha256": manifests.file_sha256(local[0])}
    assert manifests.at_hand(known, "second moment") == tmp_path / "layer-1.safetensors"


def test_a_machine_downloads_a_file_once_and_checks_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROME_CACHE", str(tmp_path))
    content = os.urandom(20 << 20)
    store.write_bytes("moment.safetensors", content)
    file = store.sub("moment.safetensors").uri
    known = {"file": file, "sha256": manifests.file_sha256(file)}
    pieces, downloads = Store.pieces, []

    def counted(self: Store, name: str) -> Iterator[bytes]:
        if "://" in self.uri:
            downloads.append(self.uri)
        return pieces(self, name)

    monkeypatch.setattr(Store, "pieces", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: manifests.at_hand(known, "second moment"), range(4)))
    assert downloads == [file]
    assert [path.read_bytes() == content for path in found] == [True] * 4

    store.write_bytes("moment.safetensors", content[:-1])
    found[0].unlink()
    with pytest.raises(ValueError, match=r"must be the copy of s3://.* that the run began with"):
        manifests.at_hand(known, "second moment")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
