"""Parts that are taken for no others, and parts of several versions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.grid import Grid
from cluster.origin import Origin
from cluster.queue import LeaseTable
from cluster.store import Store
from cluster.worker import commit
from jobs.runs import manifests
from jobs.runs.parts import hive_path
from rome.data.results import RESULT_SCHEMA
from tests.support.commands import command
from tests.support.parts_of_runs import result_rows

COMMANDS = ("reduce", "compare", "status")
EDITORS = ("none", "rome")


def group(editor: str) -> str:
    return hive_path(benchmark="facts", model="a/b", editor=editor)


def make_run(folder: Path, name: str = "one", **config: Any) -> Path:
    """A whole run of two editors over eight records, its parts written as workers do."""
    manifest = {
        "name": name,
        "records": 8,
        "editors": [*EDITORS],
        "config": {"name": name, "seed": 0, **config},
        "benchmark": {"name": "facts", "version": "1", "fingerprint": "f0"},
        "model_fingerprint": "m0",
        "protocol": "paper",
        "parts_say_it": True,
    }
    store = Store(folder)
    manifests.write(store, manifest)
    grid = Grid((tuple(range(8)),), 4, origin=manifests.origin(manifest))
    for editor in EDITORS:
        for lease in grid.leases(group(editor)):
            rows = result_rows(8, name, 2.0)[lease.start : lease.stop]
            table = pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)
            commit(store.sub("results"), grid, lease, table)
    return folder


def part(run: Path, editor: str, place: int = 0) -> Path:
    return sorted((run / "results" / group(editor)).iterdir())[place]


def refused(run: Path, *says: str) -> None:
    for name in COMMANDS:
        code, text = command(name, run)
        assert code == 1, name
        for words in says:
            assert words in text, (name, text)
    store, manifest = Store(run), manifests.read(Store(run))
    grid = Grid((tuple(range(8)),), 4, origin=manifests.origin(manifest))
    with pytest.raises(ValueError, match="something else") as caught:
        LeaseTable(store.sub("results"), [group(editor) for editor in EDITORS], grid)
    for words in says:
        assert words in str(caught.value)


def test_a_run_reads_its_own_parts_wherever_it_lies(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shutil.copytree(run, tmp_path / "moved")
    for name in COMMANDS:
        assert command(name, tmp_path / "moved")[0] == 0, name


def test_a_part_of_another_editor_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shutil.copy(part(run, "none"), part(run, "rome"))
    says = "its folder is 'benchmark=facts/model=a%2Fb/editor=none'"
    refused(run, f"{part(run, 'rome')} is of something else", says)


def test_a_part_of_a_run_with_other_settings_is_refused_with_what_differs(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", seed=1)
    shutil.copy(part(other, "rome"), part(run, "rome"))
    refused(run, str(part(run, "rome")), "its config is")


def test_a_part_of_another_run_is_refused(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", "two")
    shutil.copy(part(other, "none", 1), part(run, "none", 1))
    refused(run, "its run is 'two', and 'one' here")


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)


def test_a_part_that_does_not_say_what_it_is_of_belongs_to_a_run_of_an_earlier_version_only(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run")
    rewritten(part(run, "none"), lambda table: table.replace_schema_metadata(None))
    code, text = command("reduce", run)
    assert (code, "does not say of which run it is" in text) == (1, True)
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["parts_say_it"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert command("reduce", run)[0] == 0


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"folder": 1, "of": {}}', b"[" * 100_000])
def test_damaged_metadata_names_the_part_and_the_key(tmp_path: Path, metadata: bytes) -> None:
    run = make_run(tmp_path / "run")
    rewritten(part(run, "none"), lambda table: table.replace_schema_metadata({b"part": metadata}))
    for name in COMMANDS:
        code, text = command(name, run)
        assert code == 1
        assert str(part(run, "none")) in text
        assert "key 'part' of its metadata" in text


def test_parts_of_an_earlier_and_a_later_version_are_read_together(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    whole = command("reduce", run, "--format", "json")[1]
    rewritten(part(run, "none"), lambda table: table.drop_columns(["separator", "edit_neurons"]))
    rewritten(part(run, "none", 1), lambda table: table.append_column("later", pa.array(["x"] * 4)))
    assert command("reduce", run, "--format", "json") == (0, whole)
    assert command("compare", run)[0] == 0


def test_a_column_of_another_type_names_its_part(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rewritten(part(run, "rome"), lambda table: table.set_column(
        table.schema.get_field_index("GE"), "GE", pa.array(["high"] * 4)
    ))  # fmt: skip
    for name in ("reduce", "compare"):
        code, text = command(name, run)
        assert code == 1
        assert f"{part(run, 'rome')}: the column GE must hold Float64, but holds String" in text


def test_a_part_outside_of_the_folders_of_a_run_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shutil.copy(part(run, "none"), run / "results" / "copy.parquet")
    for name in COMMANDS:
        code, text = command(name, run)
        assert code == 1
        assert "something else" in text or "parts must lie in a folder" in text


def test_parts_say_which_code_made_them_and_the_manifest_which_went_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    store, known = Store(run), manifests.code()
    manifests.write(store, {**manifests.read(store), "code": known})
    said = json.loads(pq.read_metadata(part(run, "none")).metadata[b"part"])
    assert known["source"].startswith(said["code"])
    manifests.goes_on(store)
    assert "later_code" not in manifests.read(store)
    other = known | {"source": "0" * 64}
    monkeypatch.setattr(manifests, "code", lambda: other)
    for _ in range(2):
        manifests.goes_on(store)
        (later,) = manifests.read(store)["later_code"]
        assert {**later, **other} == later
    assert "the code is not what this run began with" in " ".join(capsys.readouterr().err.split())
    # Its parts are of the same run.
    assert command("reduce", run)[0] == 0
    assert pl.read_parquet(run / "summary.parquet")["n"].to_list() == [8, 8]


def test_the_stamp_leaves_other_metadata_alone() -> None:
    table = pa.table({"a": [1]}).replace_schema_metadata({b"mine": b"1"})
    origin = Origin({"run": "x"})
    stamped = origin.on(table, "g")
    assert stamped.schema.metadata[b"mine"] == b"1"
    origin.check("p", "g", stamped.schema)
    with pytest.raises(ValueError, match="its run is 'x', and 'y' here"):
        replace(origin, facts={"run": "y"}).check("p", "g", stamped.schema)
