"""jobs.status: what the store says of a run, and nothing else is asked."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.lock import LOCK_NAME, RunLock
from cluster.store import Store
from jobs.status import Status, status
from tests.support.commands import command

GROUPS = {name: f"benchmark=b/model=m/editor={name}" for name in ("none", "rome%20a")}


def part(store: Store, editor: str, cases: list[int], error: str | None, when: float) -> None:
    """A part of the run, committed `when` seconds after its begin, an hour ago."""
    name = f"results/{GROUPS[editor]}/part-00000-{cases[0]:06d}-{cases[-1] + 1:06d}.parquet"
    rows = [
        {"case_id": case, "error": error, "worker": None if error else f"node:{case % 2}"}
        for case in cases
    ]
    schema = pa.schema([("case_id", pa.int64()), ("error", pa.string()), ("worker", pa.string())])
    store.write_table(name, pa.Table.from_pylist(rows, schema=schema))
    moment = 1_700_000_000 + when
    os.utime(Path(store.uri) / name, (moment, moment))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A run of two editors over twenty records, nine of whose forty rows are there."""
    store = Store(tmp_path)
    manifest = {"name": "a run", "records": 20, "editors": ["none", "rome a"]}
    store.write_bytes("manifest.json", json.dumps(manifest).encode())
    part(store, "none", [0, 1, 2], None, when=-3000)  # Long before the others.
    part(store, "none", [3, 4], None, when=0)
    part(store, "rome%20a", [0, 1], None, when=10)
    part(store, "rome%20a", [5], "KeyError: 'x'", when=15)
    part(store, "rome%20a", [7], "KeyError: 'x'", when=20)
    return store


def test_what_is_done_how_fast_by_whom_and_what_failed(store: Store) -> None:
    assert status(store) == Status(
        name="a run",
        total=40,
        done={"none": 5, "rome a": 4},
        dead={"KeyError: 'x'": [("rome a", 5), ("rome a", 7)]},
        duplicates=0,
        damaged=[],
        rate=4 / 20,
        workers={"node:1": 2, "node:0": 2},
        driver=None,
        not_finite=0,
    )
    assert status(store).left == 31


def test_duplicates_and_damaged_parts_are_counted_and_nothing_is_touched(store: Store) -> None:
    part(store, "none", [0], None, when=20)
    damaged = f"{GROUPS['none']}/part-00000-000008-000009.parquet"
    store.write_bytes(f"results/{damaged}", b"PAR1")
    found = status(store)
    assert (found.duplicates, found.damaged) == (1, [damaged])
    assert store.exists(f"results/{damaged}")


def test_the_driver_is_named_while_it_writes_its_lock(store: Store) -> None:
    results = store.sub("results")
    with RunLock(results):
        assert f"process {os.getpid()} on " in (status(store).driver or "")
        assert (status(store).driver or "").endswith(", alive")
        hour_ago = results.committed(LOCK_NAME).timestamp() - 3600
        os.utime(Path(results.uri) / LOCK_NAME, (hour_ago, hour_ago))
        assert "silent for 1:00:0" in (status(store).driver or "")
    results.write_bytes(LOCK_NAME, b"{")
    assert "cannot be read" in (status(store).driver or "")


def test_the_command_says_it_in_words(store: Store) -> None:
    with RunLock(store.sub("results")):
        code, text = command("status", store.uri)
    assert code == 0
    assert "a run: 9 of 40 rows (22.5 %), 31 left" in text
    assert "time left: 0:02:35" in text
    assert "2 x KeyError: 'x': rome a case 5, rome a case 7" in text


def test_rows_with_numbers_that_are_not_finite_are_counted(store: Store) -> None:
    rows = [{"case_id": 10, "not_finite": 2}, {"case_id": 11, "not_finite": 0}]
    schema = pa.schema([("case_id", pa.int64()), ("not_finite", pa.uint32())])
    name = f"results/{GROUPS['none']}/part-00000-000010-000012.parquet"
    store.write_table(name, pa.Table.from_pylist(rows, schema=schema))
    _, text = command("status", store.uri)
    assert "rows with numbers that are not finite: 1" in text


@pytest.mark.parametrize(
    ("manifest", "says"), [(None, "is not a run directory"), (b'{"name', "is damaged")]
)
def test_what_is_no_run_is_said(tmp_path: Path, manifest: bytes | None, says: str) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_bytes(manifest)
    code, text = command("status", tmp_path)
    assert code == 1
    assert says in text
