"""The values of large batches, which workers share: the chain is that of a worker alone."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import yaml

from cluster.store import Store, StoreError
from jobs.evaluate import evaluate
from jobs.inputs.record_stores import prepare
from jobs.runs import config as configs
from jobs.runs.chains import Chain
from jobs.runs.parts import collect
from jobs.tasks import values
from rome.data.records import RecordError
from rome.editors.spreading import Spreading
from rome.edits.grouping import Grouping
from tests.support import tiny
from tests.support.tiny import TEMPLATES

MEMIT: dict[str, Any] = {"layers": [0, 1], "value": {"steps": 3}}
EDITORS: dict[str, dict[str, Any]] = {
    "memit": MEMIT | {"second_moment_weight": 10},
    "history": MEMIT | {"editor": "memit", "second_moment_weight": 10, "history": True},
    "alphaedit": MEMIT | {"relative": True, "threshold": 2},
}
TWO = {"edits_per_model": 3, "sequence": 2, "checkpoints": [3, 6]}


@pytest.fixture(autouse=True)
def batches_of_three_are_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("jobs.runs.chains.SHARED_FROM", 3)
    monkeypatch.setenv("ROME_WORKSPACE", str(tmp_path))


def run(folder: Path, name: str, *overrides: str, **grouping: Any) -> int:
    """Six everyday facts by each editor, in leases of two."""
    model = tiny.model("gpt2")
    if not (folder / "model").exists():
        tiny.save(model, folder / "model")
        prepare("everyday", str(folder / "records"), limit=6, shard_rows=4)
    config = {
        "name": "values",
        "model": {
            "name": "tiny",
            "source": str(folder / "model"),
            "dtype": "float64",
            "second_moment": {"corpus": "self", "tokens": 2000},
        },
        "benchmark": str(folder / "records"),
        "editors": {name: row | (grouping or TWO) for name, row in EDITORS.items()},
        "scoring": {"generation": None, "strict": False},
        "templates": {"texts": TEMPLATES},
        "lease_records": 2,
        "workers": {"workers": 0},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return evaluate(configs.load(path, overrides), str(folder / name))


def scores_of(folder: Path) -> dict[tuple[Any, ...], Any]:
    rows = collect(Store(str(folder)), lambda rows: rows.collect())
    keys = ("editor", "order", "case_id")
    return {
        tuple(row[key] for key in keys): row["rewrite_nll_new"] + row["neighborhood_nll_true"]
        for row in rows.iter_rows(named=True)
    }


def same(found: Path, expected: Path) -> None:
    """Values of other batches round otherwise, and so do their scores."""
    a, b = scores_of(found), scores_of(expected)
    assert a.keys() == b.keys()
    for key, scores in b.items():
        assert a[key] == pytest.approx(scores, rel=1e-9), key


def table_of(folder: Path, kind: str) -> pl.DataFrame:
    store = Store(str(folder / "results"))
    return pl.concat([pl.DataFrame(store.read_table(name)) for name in store.list(f"{kind}/")])


def test_a_chain_is_the_same_whoever_finds_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each value is found once, on the model that has the batch before."""
    assert run(tmp_path, "shared") == 0
    found = table_of(tmp_path / "shared", "values")
    assert found.height == 3 * 6
    assert found["edit_steps"].to_list() == [3] * 18
    monkeypatch.setattr(Spreading, "with_values", None)
    monkeypatch.setattr("jobs.runs.chains.SHARED_FROM", 4)
    assert run(tmp_path, "alone") == 0
    assert not (tmp_path / "alone" / "results" / "values").exists()
    assert len(scores_of(tmp_path / "shared")) == 3 * (3 + 6)
    same(tmp_path / "shared", tmp_path / "alone")
    norms = [table_of(tmp_path / name, "batches")["change_norms"] for name in ("shared", "alone")]
    shared_norms, alone_norms = (np.array(column.to_list()) for column in norms)
    np.testing.assert_allclose(shared_norms, alone_norms, rtol=1e-9)


@pytest.mark.ray
def test_workers_share_the_values_of_one_batch(tmp_path: Path) -> None:
    one = {"edits_per_model": 6, "sequence": 1, "checkpoints": [6]}
    assert run(tmp_path, "here", **one) == 0
    assert run(tmp_path, "ray", "workers.workers=2", "lease_records=1", **one) == 0
    found = table_of(tmp_path / "ray", "values")
    assert found["worker"].n_unique() == 2
    same(tmp_path / "ray", tmp_path / "here")


def test_a_record_without_a_value_ends_its_chain_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Spreading.values

    def refuses(self: Spreading, requests: Any) -> Any:
        if any(request.subject == refused for request in requests):
            raise RecordError("no such key")
        return asked(self, requests)

    prepare("everyday", str(tmp_path / "records"), limit=6, shard_rows=4)
    records = Store(str(tmp_path / "records")).read_table("shard-00000.parquet").to_pylist()
    refused = records[3]["subject"]  # Of the second batch.
    monkeypatch.setattr(Spreading, "values", refuses)
    assert run(tmp_path, "run") != 0
    values_of, batches = (table_of(tmp_path / "run", kind) for kind in ("values", "batches"))
    assert values_of.filter(pl.col("error").is_not_null())["error"].to_list() == ["no such key"] * 3
    ended = batches.filter(pl.col("error").is_not_null())
    assert ended["case_id"].to_list() == [1] * 3
    assert all("ended in batch 1" in error and "no such key" in error for error in ended["error"])
    monkeypatch.setattr(Spreading, "values", asked)
    assert run(tmp_path, "run", "workers.retry_dead=true") == 0
    assert run(tmp_path, "whole") == 0
    same(tmp_path / "run", tmp_path / "whole")


def test_values_that_are_not_seen_blame_the_store(tmp_path: Path) -> None:
    chain = Chain("memit", 0, (3, 4), Grouping(2, 1, checkpoints=(2,)), "editor=memit", True)
    run = Store(str(tmp_path))
    assert values.known(run, chain, 0) is None
    row = {"run": "r", "case_id": 4, "status": "ok", "attempts": 1, "value": [1.0]}
    table = pa.Table.from_pylist([row | {"edit_skipped": 0}], values.VALUE_SCHEMA)
    run.write_table(f"results/{chain.values}/part-00000-000001-000002.parquet", table)
    with pytest.raises(StoreError, match=re.escape("must hold the value of case 3")):
        values.known(run, chain, 0)
