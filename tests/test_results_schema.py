"""docs/results-schema.md against the tables themselves."""

import re
from pathlib import Path

import polars as pl
import pyarrow as pa

from rome.analysis.metrics import METRICS
from rome.analysis.summary import record_metrics, summarize
from rome.data.results import RESULT_SCHEMA

DOCUMENT = Path(__file__).parents[1] / "docs" / "results-schema.md"
RESULTS, SUMMARY = DOCUMENT.read_text("utf-8").split("## Summary rows")


def documented(text: str) -> dict[str, str]:
    """Column -> type of all tables of a text, none of them twice."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+?) \| ", text, re.MULTILINE)
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def types(schema: pa.Schema) -> dict[str, str]:
    return {
        field.name: str(field.type).replace("<item: ", "<").replace("large_", "")
        + ("" if field.nullable else " not null")
        for field in schema
    }


def empty() -> pl.DataFrame:
    frame = pl.from_arrow(RESULT_SCHEMA.empty_table())
    assert isinstance(frame, pl.DataFrame)
    return frame


def test_every_column_of_a_result_row_is_documented_and_no_other() -> None:
    rows = empty()
    metrics = rows.with_columns(record_metrics()).drop(rows.columns).to_arrow().schema
    derived = {name: kind.replace("_view", "") for name, kind in types(metrics).items()}
    assert documented(RESULTS) == types(RESULT_SCHEMA) | derived


def test_every_column_of_a_summary_is_documented_and_no_other() -> None:
    rows = empty().lazy()
    for name in ("benchmark", "model", "editor"):
        rows = rows.with_columns(pl.lit("x").alias(name))
    summary = summarize(rows).with_columns(pl.lit(0, pl.Int64).alias("records"))
    named = documented(SUMMARY)
    listed = re.search(r"metric M of ((?:\w+,?\s+)+)\(S is", SUMMARY)
    assert listed
    metrics = re.findall(r"\w+", listed[1])
    assert metrics == ["S", *METRICS]
    parts = {name: named.pop(name) for name in list(named) if re.fullmatch(r"M(_\w+)?", name)}
    for metric in metrics:
        named |= {re.sub("^M", metric, name): kind for name, kind in parts.items()}
    del named["S_n"]
    arrow = types(summary.to_arrow().schema)
    assert named == {name: kind.replace("_view", "") for name, kind in arrow.items()}


def test_units_and_meanings_are_said() -> None:
    for line in DOCUMENT.read_text("utf-8").splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 4, line
            numeric = re.match(r"(list<)?(double|u?int32|int64)", cells[1])
            unitless = ("case_id", "edit_divisor", "_norm`")
            assert cells[2] or not numeric or any(word in cells[0] for word in unitless), line
