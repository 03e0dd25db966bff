"""Files that somebody edited by hand, or that are damaged: each command that reads one says which
file it is, and what of it, in one sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.lock import LOCK_NAME, RunLock
from cluster.store import Store
from jobs.inputs import corpus
from jobs.inputs.record_stores import prepare
from jobs.runs import manifests
from jobs.runs.config import CorpusConfig
from jobs.runs.parts import hive_path
from jobs.study import KEY
from jobs.tasks.training import CURVE, read_curve
from rome.data.results import RESULT_SCHEMA
from tests.support import tiny
from tests.support.commands import command
from tests.support.runs_to_report import EDITORS, make_rows

NONSENSE = {
    "empty": b"",
    "cut": b'{"name": "x',
    "list": b"[]",
    "null": b"null",
    "bytes": b"\xff\xfe\x00{",
    "nested": b"[" * 200_000,
    "number": b"9" * 10_000,
}
WRONG = (None, 3, "x", ["x"], [3], {"x": 3}, {"x": "y"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with records, a run of them, a trace, a training and a study, all of them whole."""
    folder = tmp_path_factory.mktemp("whole")
    prepare("everyday", str(folder / "records"), limit=12)
    model = {"name": "m", "source": "no-such-model", "dtype": "float32"}
    run = {"name": "demo", "model": model, "benchmark": str(folder / "records")}
    run |= {"editors": {name: {"editor": "none"} for name in EDITORS}}
    configs = {
        "run": run,
        "trace": {"name": "t", "model": model, "facts": str(folder / "facts.json")},
        "train": {"name": "h", "model": model, "editor": "mend", "training": {"steps": 1}}
        | {"data": {"benchmark": str(folder / "records")}},
    }
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    fact = {"known_id": 1, "subject": "It", "attribute": "is", "prompt": "It"}
    (folder / "facts.json").write_text(json.dumps([fact]))
    store = Store(folder / "run")
    manifests.write(store, {"name": "demo", "records": 12, "editors": [*EDITORS]} | _known(store))
    for editor in EDITORS:
        path = f"results/{hive_path(benchmark='b', model='m', editor=editor)}"
        table = pa.Table.from_pylist(make_rows(12, editor), schema=RESULT_SCHEMA)
        store.write_table(f"{path}/part-00000-000000-000012.parquet", table)
    for name in ("trace", "train"):
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text("{}")
    status, text = command("study", "make", folder / "run", "--out", folder / "study", *STUDY)
    assert status == 0, text
    return folder


STUDY = ("--a", "ft<b>", "--b", "rome", "--records", "4")


def _known(store: Store) -> dict[str, Any]:
    records = {"name": "everyday", "version": "1", "fingerprint": "f"}
    return {
        "config": {"name": "demo", "scoring": {}},
        "benchmark": records,
        "protocol": "paper, strict",
        "model_fingerprint": "m",
        "context_templates": ["{}"],
        "reversed_prompts": {},
        "second_moments": {},
        "weights": {},
        "code": manifests.code(),
        "records_store": str(Path(store.uri).parent / "records"),
    }


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    for config in (tmp_path / "copy").glob("*.yaml"):
        config.write_text(config.read_text().replace(str(whole), str(tmp_path / "copy")))
    return tmp_path / "copy"


def lines(folder: Path) -> dict[str, tuple[str, ...]]:
    """Every command that reads something of a run, by what it reads first."""
    run, out = str(folder / "run"), str(folder / "out")
    return {
        "evaluate": ("evaluate", f"{folder}/run.yaml", "--out", run),
        "reduce": ("reduce", run),
        "compare": ("compare", run),
        "status": ("status", run),
        "failed": ("status", run, "--failed"),
        "report": ("report", run, "--out", f"{out}.html"),
        "study": ("study", "make", run, "--out", out, *STUDY),
    }


OF_RUNS = ("evaluate", "reduce", "compare", "status", "failed", "report", "study")


def refused(folder: Path, name: str, *says: str) -> None:
    """A command that ends without a traceback, with 1, and one sentence that says this."""
    status, text = command(*lines(folder)[name])
    assert status == 1, (name, text)
    assert text.count("error: ") == 1, text
    for words in says:
        assert words in text, (name, words, text)


@pytest.mark.parametrize("nonsense", NONSENSE)
@pytest.mark.parametrize("name", OF_RUNS)
def test_a_manifest_that_is_no_json(folder: Path, name: str, nonsense: str) -> None:
    (folder / "run" / "manifest.json").write_bytes(NONSENSE[nonsense])
    refused(folder, name, f"{folder}/run/manifest.json is damaged")


def edited(file: Path, keys: list[str]) -> Iterator[tuple[str, Any]]:
    """The file with each of its keys as something else, one after another."""
    there = json.loads(file.read_text())
    for key in keys:
        for value in WRONG:
            if type(value) is not type(there[key]):
                file.write_text(json.dumps({**there, key: value}))
                yield key, value
    file.write_text(json.dumps(there))


@pytest.mark.parametrize("name", OF_RUNS)
def test_a_manifest_of_which_a_key_was_edited(folder: Path, name: str) -> None:
    file = folder / "run" / "manifest.json"
    for key, _ in edited(file, [*json.loads(file.read_text())]):
        refused(folder, name, f"{file} is damaged: {key}")


@pytest.mark.parametrize("nonsense", NONSENSE)
@pytest.mark.parametrize("name", ["trace", "train"])
def test_the_manifest_of_a_trace_and_of_a_training(folder: Path, name: str, nonsense: str) -> None:
    file = folder / name / "manifest.json"
    file.write_bytes(NONSENSE[nonsense])
    status, text = command(name, folder / f"{name}.yaml", "--out", folder / name)
    assert (status, f"{file} is damaged" in text) == (1, True), text


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_the_manifest_of_records(folder: Path, nonsense: str) -> None:
    file = folder / "records" / "manifest.json"
    file.write_bytes(NONSENSE[nonsense])
    refused(folder, "evaluate", f"{file} is damaged")
    status, text = command("prepare", "describe", folder / "records")
    assert (status, f"{file} is damaged" in text) == (1, True), text
    line = ("prepare", "everyday", "--limit", 12, "--out", folder / "records")
    status, text = command(*line)
    assert (status, f"{file} is damaged" in text) == (1, True), text


def test_the_manifest_of_records_of_which_a_key_was_edited(folder: Path) -> None:
    file = folder / "records" / "manifest.json"
    for key, _ in edited(file, ["name", "version", "fingerprint", "rows", "shards", "skipped"]):
        status, text = command("prepare", "describe", folder / "records")
        assert (status, f"{file} is damaged: {key}" in text) == (1, True), text


def test_configs_and_facts(folder: Path) -> None:
    for nonsense in (*NONSENSE.values(), b"a: &a [*a]", b"name: [", b"- x"):
        for name in ("run", "trace", "train"):
            job = {"run": "evaluate"}.get(name, name)
            (folder / "bad.yaml").write_bytes(nonsense)
            status, text = command(job, folder / "bad.yaml", "--out", folder / "new")
            assert (status, f"{folder}/bad.yaml" in text) == (1, True), text
        (folder / "facts.json").write_bytes(nonsense)
        status, text = command("trace", folder / "trace.yaml", "--out", folder / "new")
        assert (status, f"{folder}/facts.json must be" in text) == (1, True), text
    status, text = command("sweep", folder / "run.yaml", "--layers", "1,x")
    assert (status, "--layers must be numbers" in text) == (1, True), text


@pytest.mark.parametrize("name", [name for name in OF_RUNS if name != "evaluate"])
def test_the_metadata_of_a_part(folder: Path, name: str) -> None:
    part = next((folder / "run" / "results").rglob("*rome*/*.parquet"))
    table = pq.read_table(part, partitioning=None)
    for nonsense in NONSENSE.values():
        pq.write_table(table.replace_schema_metadata({b"part": nonsense}), part)
        refused(folder, name, str(part), "the key 'part' of its metadata")
    part.write_bytes(b"PAR1" * 100)
    if name in ("status", "failed"):  # It says so, and the run goes on.
        status, text = command(*lines(folder)["status"])
        assert (status, "damaged, done again" in text) == (0, True)
    else:
        refused(folder, name, str(part), "is not a whole Parquet file")


LOCK = {"host": os.uname().nodename, "pid": 1, "since": "", "command": "x", "token": "t"}


@pytest.mark.parametrize(
    "lock",
    [
        *NONSENSE.values(),
        *(json.dumps(LOCK | {"pid": pid}).encode() for pid in (None, "x", 0, -1, 1e30, 10**30)),
        json.dumps({**LOCK, "host": 3}).encode(),
        json.dumps({**LOCK, "token": None}).encode(),
    ],
)
def test_a_lock_that_says_nothing_is_that_of_a_dead_driver(folder: Path, lock: bytes) -> None:
    results = folder / "run" / "results"
    (results / LOCK_NAME).write_bytes(lock)
    status, text = command("status", folder / "run")
    assert (status, "driver: " in text) == (0, True)
    with RunLock(Store(results), beat=0.01):
        pass
    assert not (results / LOCK_NAME).exists()


def test_answers_and_the_key_of_a_study(folder: Path) -> None:
    key = json.loads((folder / "study" / KEY).read_text())
    given = [
        {question: item.get("check", "1") for question in ("consistent", "fluent")}
        for item in key["items"]
    ]
    answer = {"study": key["study"], "rater": "r", "answers": given}
    file = folder / "answers.json"

    def said(*words: str) -> None:
        status, text = command("study", "tally", folder / "study", file)
        assert status == 1, text
        for word in words:
            assert word in text

    file.write_text(json.dumps(answer))
    assert command("study", "tally", folder / "study", file)[0] == 0
    for nonsense in NONSENSE.values():
        file.write_bytes(nonsense)
        said(str(file))
    for name, _ in edited_answers(file, answer):
        said(str(file), name)
    file.write_text(json.dumps(answer))
    for nonsense in NONSENSE.values():
        (folder / "study" / KEY).write_bytes(nonsense)
        said(f"{folder}/study/{KEY} is damaged")
    (folder / "study" / KEY).write_text(json.dumps(key))
    for name, _ in edited(folder / "study" / KEY, ["study", "a", "b", "items"]):
        said(f"{folder}/study/{KEY} is damaged", name)


def edited_answers(file: Path, answer: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    wrong: dict[str, list[Any]] = {
        "answers": [None, 3, {}, [3], [{}], [{"consistent": []}]],
        "study": [None, 3, {}, "another"],
    }
    for name, values in wrong.items():
        for value in values:
            file.write_text(json.dumps({**answer, name: value}))
            yield name, value


def test_the_curve_of_a_training_and_the_texts_of_a_corpus(folder: Path) -> None:
    store = Store(folder / "train")
    for table in (pa.table({"step": [1]}), pa.table({"x": ["y"]})):
        store.write_table(CURVE, table)
        with pytest.raises(ValueError, match=f"{CURVE} is damaged: its column"):
            read_curve(store)
    (folder / "texts.txt").write_text("One two three.\n" * 50)
    chosen = CorpusConfig(corpus=str(folder / "texts.txt"), tokens=20, passage_tokens=100)
    model = tiny.model("gpt2")
    corpus.prepare(chosen, model, store)
    for nonsense in (*NONSENSE.values(), b'{"chunks": "x"}'):
        store.write_bytes("corpus.json", nonsense)
        with pytest.raises(ValueError, match=r"corpus\.json is damaged"):
            corpus.prepare(chosen, model, store)
