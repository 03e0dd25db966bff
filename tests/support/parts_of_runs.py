"""Parts of runs, made up: rows of editors of a known skill, as workers would have written them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from rome.analysis.summary import record_metrics
from rome.data.results import OK, RESULT_SCHEMA


def result_rows(count: int, run: str, skill: float) -> list[dict[str, Any]]:
    """Rows of an editor that makes the new target likelier by `skill` nats."""
    draw = np.random.default_rng(0)
    rows = []
    for case_id in range(count):
        row: dict[str, Any] = {"run": run, "case_id": case_id, "relation_id": f"P{case_id % 4}"}
        for kind, prompts, shift in (
            ("rewrite", 1, skill),
            ("paraphrase", 2, skill),
            ("neighborhood", 10, 0.0),
        ):
            true = draw.uniform(8, 12, prompts)
            row[f"{kind}_nll_true"] = true.tolist()
            row[f"{kind}_nll_new"] = (true + 1 - shift + draw.normal(0, 1, prompts)).tolist()
        rows.append(row | {"status": OK, "attempts": 1, "GE": 6.2, "RS": 0.3 + case_id / 1000})
    return rows


def write_part(run_dir: Path, editor: str, rows: list[dict[str, Any]], name: str) -> Path:
    table = pl.from_arrow(pa.Table.from_pylist(rows, schema=RESULT_SCHEMA))
    assert isinstance(table, pl.DataFrame)
    path = run_dir / "results" / "benchmark=facts" / "model=a%2Fb" / f"editor={editor}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.with_columns(record_metrics()).to_arrow(), path)
    return path


def unpadded(table: str) -> str:
    """A table without the spaces that align its columns."""
    return re.sub(" +", " ", table)
