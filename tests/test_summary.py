"""The metrics of records and editors against the reference's summary and plain Python."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from rome.analysis.metrics import table_of
from rome.analysis.summary import record_metrics, summarize
from rome.data.results import ERROR, OK, RESULT_SCHEMA

METRICS = table_of("counterfact")

DATA = Path(__file__).parents[2] / "shared" / "data"
TEN_RECORDS = DATA / "reference" / "ten_records.json"

KINDS = ("rewrite", "paraphrase", "neighborhood")

Row = dict[str, Any]


def row(case_id: int, relation_id: str | None = "P1", **values: Any) -> Row:
    """One result row; prompt kinds are given as lists of (nll_new, nll_true)."""
    lists = {
        f"{kind}_nll_{target}": [pair[i] for pair in values[kind]]
        for kind in KINDS
        if kind in values
        for i, target in enumerate(("new", "true"))
    }
    others = {name: value for name, value in values.items() if name not in KINDS}
    defaults = {"run": "r", "status": OK, "attempts": 1}
    return defaults | {"case_id": case_id, "relation_id": relation_id} | lists | others


def frame(rows: list[Row], editor: str = "rome") -> pl.LazyFrame:
    table = pl.from_arrow(pa.Table.from_pylist(rows, schema=RESULT_SCHEMA))
    assert isinstance(table, pl.DataFrame)
    return table.lazy().with_columns(
        benchmark=pl.lit("b"), model=pl.lit("m"), editor=pl.lit(editor)
    )


def random_rows(count: int, seed: int = 0) -> list[Row]:
    draw = np.random.default_rng(seed)
    return [
        row(
            case_id,
            f"P{case_id % 5}",
            rewrite=draw.exponential(3, (1, 2)).tolist(),
            paraphrase=draw.exponential(3, (2, 2)).tolist(),
            neighborhood=draw.exponential(3, (10, 2)).tolist(),
            GE=draw.normal(6, 0.3),
            RS=draw.uniform(),
        )
        for case_id in range(count)
    ]


@pytest.mark.skipif(not TEN_RECORDS.exists(), reason="the reference's results are not here")
@pytest.mark.parametrize("when", ["pre", "post"])
def test_the_references_table_of_ten_records(when: str) -> None:
    reference = json.loads(TEN_RECORDS.read_text())
    rows = [
        row(
            case["case_id"],
            record["requested_rewrite"]["relation_id"],
            **{kind: case[when][f"{kind}_prompts_probs"] for kind in KINDS},
        )
        for case, record in zip(reference["rows"], reference["records"], strict=True)
    ]
    summary = summarize(frame(rows)).to_dicts()[0]
    assert summary["n"] == 10
    for name, value in reference["summary"][when].items():
        assert round(summary[name], 1) == value, name


def test_success_is_strict_and_magnitude_signed() -> None:
    rows = [
        row(0, rewrite=[(1.0, 2.0)], paraphrase=[(2.0, 1.0), (1.0, 2.0)], neighborhood=[(2, 1)]),
        row(1, rewrite=[(1.0, 1.0)], paraphrase=[(1.0, 1.0)], neighborhood=[(1.0, 1.0)]),
        row(2, rewrite=[(math.nan, 1.0)], neighborhood=[(math.nan, 1.0), (1.0, math.nan)]),
    ]
    metrics = frame(rows).with_columns(record_metrics()).collect()
    assert metrics["ES"].to_list() == [1.0, 0.0, None]
    assert metrics["PS"].to_list() == [0.5, 0.0, None]
    assert metrics["NS"].to_list() == [1.0, 0.0, None]
    gap = math.exp(-1) - math.exp(-2)
    assert metrics["EM"].to_list()[:2] == pytest.approx([gap, 0.0])
    assert metrics["PM"].to_list()[:2] == pytest.approx([0.0, 0.0])
    assert metrics["NM"].to_list()[:2] == pytest.approx([gap, 0.0])
    assert metrics["protocol"].unique().to_list() == ["paper, strict, wild"]


def test_a_record_without_prompts_and_a_dead_letter_have_no_metrics() -> None:
    rows = [
        row(0, rewrite=[(1.0, 2.0)], paraphrase=[]),
        row(1, status=ERROR, error="it failed", rewrite=[(1.0, 2.0)]),
    ]
    metrics = frame(rows).with_columns(record_metrics()).collect()
    assert metrics["ES"].to_list() == [1.0, None]
    assert metrics["PS"].to_list() == [None, None]
    assert metrics["NM"].to_list() == [None, None]


def test_strict_is_the_target_and_nothing_else() -> None:
    targets = {"target_new": "St. Louis", "target_true": "Paris"}
    rows = [
        row(
            0,
            **targets,
            rewrite_greedy=["St.  Louis."],
            paraphrase_greedy=["St. Louis, and", "St. Louis"],
            neighborhood_greedy=["Paris", "paris", "St. Louis", "Paris.", "In Paris"],
        ),
        row(1, **targets, rewrite_greedy=[""], paraphrase_greedy=[]),
        row(
            2,
            target_new="a.b",
            neighborhood_targets=["No.", "No."],
            neighborhood_greedy=["No", "No."],
        ),
        row(3, **targets, rewrite_greedy=["St. Louis St. Louis"], paraphrase_greedy=["aSt. Louis"]),
        row(4, target_new="a.b", rewrite_greedy=["axb"]),
    ]
    metrics = frame(rows).with_columns(record_metrics()).collect()
    assert metrics["ES_strict"].to_list() == [1.0, 0.0, None, 0.0, 0.0]
    assert metrics["PS_strict"].to_list() == [0.5, None, None, 0.0, None]
    assert metrics["NS_strict"].to_list() == [0.4, None, 1.0, None, None]


def test_accuracies_the_reversed_fact_and_neighbors_after_the_edited_sentence() -> None:
    rows = [
        row(
            0,
            rewrite_accuracy=[0.5],
            paraphrase_accuracy=[0.0, 1.0],
            neighborhood_accuracy=[0.25],
            reversed_nll_new=[1.0],
            reversed_nll_true=[2.0],
            neighborhood_plus_nll_new=[1.0, 3.0, 1.0, 1.0],
            neighborhood_plus_nll_true=[2.0, 2.0, 2.0, 1.0],
        ),
        row(1, reversed_nll_new=[2.0], reversed_nll_true=[2.0]),
        row(2, status=ERROR, error="it failed", rewrite_accuracy=[1.0]),
    ]
    metrics = frame(rows).with_columns(record_metrics()).collect()
    for name, values in {
        "efficacy": [0.5, None, None],
        "paraphrase": [0.5, None, None],
        "specificity": [0.25, None, None],
        "RVS": [1.0, 0.0, None],
        "NS_plus": [0.25, None, None],
    }.items():
        assert metrics[name].to_list() == values, name
    summary = summarize(frame(rows)).to_dicts()[0]
    assert (summary["RVS"], summary["RVS_n"], summary["efficacy"]) == (50.0, 2, 50.0)
    assert summary["RVS_half_width"] == pytest.approx(100 * 1.96 * 0.5 / 2**0.5)


def test_rows_of_an_earlier_version_are_summarized() -> None:
    rows = random_rows(5)
    late = [
        name for name in RESULT_SCHEMA.names if name.endswith(("_accuracy", "_greedy", "_wild"))
    ]
    late += [
        name for name in RESULT_SCHEMA.names if name.startswith(("reversed", "neighborhood_p"))
    ]
    early = frame(rows).drop(*late, "neighborhood_targets")
    assert summarize(early).equals(summarize(frame(rows)))


def test_means_and_the_papers_half_width() -> None:
    rows = random_rows(40)
    summary = summarize(frame(rows)).to_dicts()[0]
    for name in ("GE", "RS"):
        values = np.array([r[name] for r in rows])
        assert summary[name] == pytest.approx(100 * values.mean())
        assert summary[f"{name}_half_width"] == pytest.approx(100 * 1.96 * values.std() / 40**0.5)
        assert summary[f"{name}_n"] == 40
    rates = [np.mean([new < true for new, true in pairs(r, "paraphrase")]) for r in rows]
    assert summary["PS"] == pytest.approx(100 * np.mean(rates))
    assert summary["S"] == pytest.approx(3 / sum(1 / summary[m] for m in ("ES", "PS", "NS")))
    assert summary["S_half_width"] is None


def pairs(r: Row, kind: str) -> list[tuple[float, float]]:
    return list(zip(r[f"{kind}_nll_new"], r[f"{kind}_nll_true"], strict=True))


def test_bootstrap_resamples_whole_relations() -> None:
    rows = [r | {"GE": 6 + 0.1 * int(r["relation_id"][1:])} for r in random_rows(53)]
    summary = summarize(frame(rows)).to_dicts()[0]
    clusters = defaultdict(list)
    for r in rows:
        clusters[r["relation_id"]].append(r["GE"])
    draw = np.random.default_rng(1)
    groups = list(clusters.values())
    means = [
        np.mean(np.concatenate([groups[i] for i in draw.integers(0, 5, 5)])) for _ in range(4000)
    ]
    low, high = np.percentile(means, [2.5, 97.5]) * 100
    assert summary["GE_low"] == pytest.approx(low, abs=1.5)
    assert summary["GE_high"] == pytest.approx(high, abs=1.5)
    # Records of a relation are alike here, so the paper's interval is too narrow.
    assert summary["GE_high"] - summary["GE_low"] > 3 * summary["GE_half_width"]
    assert summary["S_low"] < summary["S"] < summary["S_high"]


def test_intervals_depend_on_nothing_but_the_rows() -> None:
    rows = random_rows(30)
    assert summarize(frame(rows)).equals(summarize(frame(rows[::-1])))


def test_an_editor_that_fails_everywhere_scores_zero() -> None:
    rows = [r | {"rewrite_nll_new": [9.0], "rewrite_nll_true": [1.0]} for r in random_rows(20)]
    summary = summarize(frame(rows)).to_dicts()[0]
    assert (summary["S"], summary["S_low"], summary["S_high"], summary["ES"]) == (0, 0, 0, 0)
    assert summary["PS"] > 0


def test_numbers_that_are_not_finite_are_counted_and_no_mean_holds_them() -> None:
    rows = random_rows(12)
    whole = summarize(frame(rows[2:])).to_dicts()[0]
    rows[0] |= {"GE": math.inf, "edit_norm": math.nan, "rewrite_nll_new": [math.nan]}
    rows[0]["neighborhood_nll_true"] = [math.inf, *rows[0]["neighborhood_nll_true"][1:]]
    rows[1] |= {"RS": math.nan}
    metrics = frame(rows).with_columns(record_metrics()).collect()
    assert metrics["not_finite"].to_list() == [4, 1] + [0] * 10
    assert metrics["not_finite_in"].to_list() == ["edit, score, text", "text"] + [None] * 10
    summary = summarize(frame(rows)).to_dicts()[0]
    assert (summary["n"], summary["not_finite"]) == (12, 2)
    assert summary["not_finite_in"] == "edit, score, text"
    assert [summary[f"{name}_n"] for name in ("ES", "PS", "NS", "GE", "RS")] == [11, 12, 11, 11, 10]
    assert all(math.isfinite(summary[name]) for name in METRICS)
    assert summary["RS"] == pytest.approx(whole["RS"])
    assert math.isfinite(summary["S_low"])


def test_a_model_that_has_no_likelihoods_neither_succeeds_nor_fails() -> None:
    rows = [
        row(
            0,
            "P1",
            **{kind: [(math.nan, math.nan)] for kind in KINDS},
            target_new="Rome",
            rewrite_greedy=["Rome"],
            rewrite_accuracy=[0.0],
            GE=6.0,
        )
    ]
    summary = summarize(frame(rows)).to_dicts()[0]
    assert (summary["n"], summary["not_finite"]) == (1, 1)
    names = [*METRICS, "ES_strict", "efficacy"]
    assert {name: summary[name] for name in names} == dict.fromkeys(names)


def test_missing_kinds_are_null() -> None:
    rows = [row(0, None, rewrite=[(1.0, 2.0)]), row(1, None, rewrite=[(2.0, 1.0)])]
    summary = summarize(frame(rows)).to_dicts()[0]
    assert summary["ES"] == 50.0
    assert summary["ES_low"] == 0.0
    assert all(
        summary[f"{name}{part}"] is None
        for name in ("S", "PS", "PM", "NS", "NM", "GE", "RS")
        for part in ("", "_half_width", "_low", "_high")
    )
    assert summary["PS_n"] == 0


def test_one_record_has_no_interval() -> None:
    summary = summarize(frame(random_rows(1))).to_dicts()[0]
    assert summary["GE"] is not None
    assert all(summary[f"{m}_{part}"] is None for m in METRICS for part in ("half_width", "low"))
    assert summarize(frame([])).is_empty()


def test_duplicates_are_dropped_and_counted_and_a_scored_row_wins() -> None:
    rows = random_rows(10)
    dead = row(3, "P3", status=ERROR, error="late")
    extra = [dead, rows[4], row(11, "P1", status=ERROR, error="poison")]
    both = pl.concat([frame(rows + extra), frame(rows, "none")])
    none, rome = summarize(both).to_dicts()
    assert (none["editor"], none["n"], none["dead"], none["duplicates"]) == ("none", 10, 0, 0)
    assert (rome["editor"], rome["n"], rome["dead"], rome["duplicates"]) == ("rome", 10, 1, 2)
    assert [rome[m] for m in METRICS] == [none[m] for m in METRICS]
    assert [rome[f"{m}_low"] for m in METRICS] == [none[f"{m}_low"] for m in METRICS]
