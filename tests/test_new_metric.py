"""The metric of docs/new-metric.md, as its reader would add it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from jobs import compare, reduce
from rome.analysis import metrics
from rome.analysis.metrics import METRICS, Metric
from rome.data.results import ERROR
from tests.support.parts_of_runs import result_rows, write_part

DOC = (Path(__file__).parents[1] / "docs" / "new-metric.md").read_text("utf-8")
(ENTRY,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)


def test_the_documented_metric_is_in_the_tables_of_a_run_that_was_done_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = {"name": "demo", "records": 42, "editors": ["rome", "none"], "protocol": "paper"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    expected = {}
    for editor, skill in (("none", 0.0), ("rome", 2.0)):
        rows = result_rows(42, "demo", skill)
        rows[0]["paraphrase_nll_new"] = rows[0]["paraphrase_nll_true"] = []
        rows[1] |= {"status": ERROR, "error": "no such subject"}
        rows[2]["paraphrase_nll_new"] = [float("nan"), 1.0]
        write_part(tmp_path, editor, rows, "part-00000-000000-000042.parquet")
        verdicts = [
            all(
                n < t
                for n, t in zip(r["paraphrase_nll_new"], r["paraphrase_nll_true"], strict=True)
            )
            for r in rows[3:]
        ]
        expected[editor] = 100 * sum(verdicts) / 39

    monkeypatch.setitem(METRICS, "PS_all", METRICS["PS"])
    names: dict[str, object] = {
        "METRICS": METRICS,
        "Metric": Metric,
        "pl": pl,
        "scored": metrics.scored,
    }
    exec(compile(ENTRY, "docs/new-metric.md", "exec", dont_inherit=True), names)
    done = CliRunner().invoke(reduce.app, [str(tmp_path)])
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines()]
    assert ["Editor", "PS_all", "n", "dead"] in lines
    for editor, label in (("none", "unedited"), ("rome", "rome")):
        assert [label, f"{expected[editor]:.1f}", "41", "1"] in lines
    assert 0 < expected["none"] < expected["rome"] < 100
    assert "PS_all: records after all whose paraphrases the new object is likelier." in " ".join(
        done.output.split()
    )
    assert "PS_all over 39" in done.output
    summary = pl.read_parquet(tmp_path / "summary.parquet")
    assert {"PS_all", "PS_all_half_width", "PS_all_low", "PS_all_n"} <= set(summary.columns)
    pairs, *_ = compare.compare([str(tmp_path)], ["PS_all"])
    assert pairs.row(0, named=True)["difference"] == pytest.approx(
        expected["rome"] - expected["none"]
    )
    assert metrics.table_of(None)[-1] == "PS_all"
