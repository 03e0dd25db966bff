"""Paired comparison of editors, against scipy, plain Python and data whose answer is known."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import binomtest

from jobs.compare import app, probability, read
from jobs.reduce import app as reduce_app
from rome.analysis.comparison import compare, health
from rome.analysis.metrics import table_of
from rome.data.results import ERROR, OK
from tests.support import commands
from tests.support.parts_of_runs import result_rows, unpadded, write_part

METRICS = table_of("counterfact")

SCORING = {"generation": {"seed": 0}}


def rows(label: str, es: Sequence[float | None], **columns: list[Any]) -> pl.DataFrame:
    count = len(es)
    values = {
        "label": [label] * count,
        "case_id": list(range(count)),
        "relation_id": [f"P{i % 3}" for i in range(count)],
        "status": [OK] * count,
        "ES": es,
    }
    return pl.DataFrame({**values, **columns}, schema_overrides={"ES": pl.Float64})


def make_run(run_dir: Path, editors: dict[str, list[dict[str, Any]]], **manifest: Any) -> Path:
    run_dir.mkdir(parents=True)
    known = {
        "name": "same",
        "records": 40,
        "editors": list(editors),
        "benchmark": {"name": "facts", "fingerprint": "f0"},
        "model_fingerprint": "m0",
        "protocol": "paper",
        "config": {"scoring": SCORING},
    }
    (run_dir / "manifest.json").write_text(json.dumps(known | manifest))
    for editor, made in editors.items():
        write_part(run_dir, editor, made, "part-00000-000000-000040.parquet")
    return run_dir


invoke = partial(commands.invoke, app)


def test_mcnemar_takes_the_records_that_differ() -> None:
    # Twelve that only a gets right, three that only b does, five that both do, two that none does.
    a = [1.0] * 12 + [0.0] * 3 + [1.0] * 5 + [0.0] * 2
    b = [0.0] * 12 + [1.0] * 3 + [1.0] * 5 + [0.0] * 2
    (row,) = compare(pl.concat([rows("a", a), rows("b", b)]), ["ES"]).to_dicts()
    assert (row["metric"], row["a"], row["b"], row["n"]) == ("ES", "a", "b", 22)
    assert row["test"] == "mcnemar"
    assert row["p"] == pytest.approx(2 * sum(math.comb(15, k) for k in range(4)) / 2**15)
    assert row["p"] == pytest.approx(binomtest(3, 15).pvalue)
    assert row["p_holm"] == row["p"]
    assert row["difference"] == pytest.approx(100 * 9 / 22)
    assert row["mean_a"] - row["mean_b"] == pytest.approx(row["difference"])
    assert row["low"] < row["difference"] < row["high"]


def test_wilcoxon_ranks_the_differences_and_leaves_ties_out() -> None:
    a = [0.3, 0.5, 0.9, 0.4, 0.7, 0.6, 0.2]
    b = [0.1, 0.6, 0.5, 0.4, 0.2, 0.3, 0.2]
    (row,) = compare(pl.concat([rows("a", a), rows("b", b)]), ["ES"]).to_dicts()
    assert row["test"] == "wilcoxon"
    # Of |0.2 -0.1 0.4 0.5 0.3| the one that is negative has rank 1: 2 of 2^5 signs are as far out
    # on this side.
    assert row["p"] == pytest.approx(2 * 2 / 2**5)


def test_no_test_is_made_of_what_is_not_finite() -> None:
    a = [0.3, 0.5, 0.9, math.nan, 0.7, 0.6, math.inf]
    b = [0.1, 0.6, 0.5, 0.4, 0.2, -math.inf, 0.2]
    (row,) = compare(pl.concat([rows("a", a), rows("b", b)]), ["ES"]).to_dicts()
    (whole,) = compare(
        pl.concat([rows("a", [0.3, 0.5, 0.9, 0.7]), rows("b", [0.1, 0.6, 0.5, 0.2])]), ["ES"]
    ).to_dicts()
    assert (row["n"], row["p"], row["difference"]) == (4, whole["p"], whole["difference"])
    none = rows("c", [math.nan] * 7)
    assert compare(pl.concat([rows("a", a), none]), ["ES"]).is_empty()


def test_records_with_numbers_that_are_not_finite_are_said(tmp_path: Path) -> None:
    made = {name: result_rows(20, "r", skill) for name, skill in (("none", 0.0), ("rome", 3.0))}
    made["rome"][4]["rewrite_nll_new"] = [math.nan]
    run = make_run(tmp_path / "run", made)
    done = invoke(run, "--metric", "ES")
    assert done.exit_code == 0, done.output
    assert "nan" not in done.output
    assert "note: 1 records of rome have numbers that are not finite" in done.output
    reduced = commands.invoke(reduce_app, run)
    assert "records with numbers that are not finite (score): 1" in " ".join(reduced.output.split())


def test_editors_that_do_not_differ() -> None:
    same = [0.25, 0.5, 1.0, 0.0]
    (row,) = compare(pl.concat([rows("a", same), rows("b", same)]), ["ES"]).to_dicts()
    assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)


def test_holm_over_all_pairs_and_metrics() -> None:
    draw = np.random.default_rng(0)
    frames = [
        rows(
            label,
            (draw.uniform(size=30) < share).astype(float).tolist(),
            GE=draw.normal(6 + share, 1, 30).tolist(),
        )
        for label, share in (("a", 0.9), ("b", 0.5), ("c", 0.45))
    ]
    result = compare(pl.concat(frames), ["ES", "GE"])
    assert result.select("a", "b").unique(maintain_order=True).rows() == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    expected, highest = {}, 0.0
    for rank, (p, i) in enumerate(sorted((p, i) for i, p in enumerate(result["p"]))):
        highest = max(highest, min(1.0, (6 - rank) * p))
        expected[i] = highest
    assert result["p_holm"].to_list() == pytest.approx([expected[i] for i in range(6)])
    assert (result["p_holm"] > result["p"]).any()


def test_only_records_that_both_have_are_compared() -> None:
    a = rows("a", [1.0, 1.0, 0.0, None])
    b = rows("b", [0.0, 1.0, 1.0, 1.0]).with_columns(
        status=pl.when(case_id=1).then(pl.lit(ERROR)).otherwise("status")
    )
    (row,) = compare(pl.concat([a, b]), ["ES"]).to_dicts()
    assert (row["n"], row["mean_a"], row["mean_b"]) == (2, 50, 50)
    alone = rows("b", [1.0]).with_columns(case_id=pl.lit(99, pl.Int64))
    assert compare(pl.concat([a, alone]), ["ES"]).is_empty()


def test_the_interval_knows_that_records_of_a_relation_go_together() -> None:
    """Ten relations of twenty records which agree: there are ten observations, not 200."""
    relation = np.repeat(np.arange(10), 20)
    change = np.random.default_rng(1).normal(0.1, 0.2, 10)[relation]
    relations = {"relation_id": [f"P{r}" for r in relation]}
    together = [rows("a", change.tolist(), **relations), rows("b", [0.0] * 200, **relations)]
    (row,) = compare(pl.concat(together), ["ES"]).to_dicts()
    means = change.reshape(10, 20).mean(1)
    expected = 2 * 1.96 * means.std() / math.sqrt(10) * 100
    assert row["high"] - row["low"] == pytest.approx(expected, rel=0.15)
    apart = [frame.with_columns(relation_id=pl.lit(None, pl.String)) for frame in together]
    (loose,) = compare(pl.concat(apart), ["ES"]).to_dicts()
    assert loose["high"] - loose["low"] < 0.4 * (row["high"] - row["low"])


def test_unknown_metrics_and_one_editor_alone_are_refused() -> None:
    one = rows("a", [1.0])
    with pytest.raises(ValueError, match="at least two editors"):
        compare(one, ["ES"])
    with pytest.raises(ValueError, match=r"one of ES, .*, got EZ"):
        compare(pl.concat([one, rows("b", [0.0])]), ["EZ"])


def test_sick_edits_are_counted() -> None:
    def edits(editor: str, divisor: list[Any], norm: list[Any], ge: list[Any]) -> pl.DataFrame:
        columns = {"edit_divisor": divisor, "edit_norm": norm, "GE": ge}
        floats = {name: [x and float(x) for x in values] for name, values in columns.items()}
        return rows(editor, [1.0] * 6, editor=[editor] * 6, **floats).cast(
            dict.fromkeys(columns, pl.Float64)
        )

    nan = float("nan")
    frame = pl.concat(
        [
            edits("none", [None] * 6, [None] * 6, [6.0] * 5 + [None]),
            # Small: the third, of either sign, and what is not a number. Disabling: the third by
            # its norm, the fourth by both, the fifth by its texts.
            edits("rome", [2, 2, -0.1, nan, 2, 2], [1, 1, 20, nan, 1, 1], [6, 6, 6, 2, 2, 2]),
            edits("ft", [None] * 6, [1, 1, 1, 1, 2, 3], [None] * 6),
        ]
    )
    assert health(frame).to_dicts() == [
        {
            "label": "rome",
            "n": 6,
            "small_divisor": 2,
            "large_norm": 2,
            "low_entropy": 2,
            "disabling": 3,
        },
        {
            "label": "ft",
            "n": 6,
            "small_divisor": None,
            "large_norm": 0,
            "low_entropy": None,
            "disabling": 0,
        },
    ]


def test_the_job_compares_the_editors_of_runs(tmp_path: Path) -> None:
    weak, strong = result_rows(40, "same", 1.0), result_rows(40, "same", 9.0)
    first = make_run(tmp_path / "first", {"none": result_rows(40, "same", 0.0), "rome": weak})
    second = make_run(tmp_path / "second", {"rome": strong})
    assert "[those of the paper's table]" in " ".join(invoke("--help").stdout.split())
    out = tmp_path / "pairs.parquet"
    result = invoke(first, second, "--format", "markdown", "--out", out)
    assert result.exit_code == 0, result.stderr
    pairs = pl.read_parquet(out)
    # Edited minus unedited first, then the better minus the worse.
    assert pairs.select("a", "b").unique(maintain_order=True).rows() == [
        ("second/rome", "unedited"),
        ("first/rome", "unedited"),
        ("second/rome", "first/rome"),
    ]
    assert pairs["metric"].unique(maintain_order=True).to_list() == list(METRICS[1:])
    paraphrase = pairs.row(index=2 * (len(METRICS) - 1) + 2, named=True)
    assert (paraphrase["metric"], paraphrase["n"]) == ("PS", 40)
    assert paraphrase["difference"] > 20
    assert paraphrase["low"] > 0
    assert paraphrase["p_holm"] < 1e-3
    assert "| PS | second/rome | first/rome | 40 |" in unpadded(result.stdout)
    assert "| < 0.001 | < 0.001 | Wilcoxon |" in unpadded(result.stdout)


def test_a_block_a_pair_fits_80_columns_and_no_number_is_cut(tmp_path: Path) -> None:
    editors = {name: result_rows(40, "same", float(i)) for i, name in enumerate("abcdefghij")}
    long = {"none": result_rows(40, "same", 0.0), "rome [layer=17, mean]": editors["a"]}
    run = make_run(tmp_path / "run", long | editors)
    out = tmp_path / "pairs.parquet"
    text = invoke(run, "--out", out, COLUMNS=80).stdout
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    assert sum(line.startswith("A: ") for line in lines) == 12 * 11 // 2
    assert any(line.startswith("A: rome [layer=17, mean]   B: unedited   n: 40") for line in lines)
    ge = next(line.split() for line in lines if line[1:3] == "GE")
    assert ge[1:4] == ["6.20", "6.20", "+0.00"]
    best = pl.read_parquet(out).row(0, named=True)
    assert lines[0].rstrip() == f"A: {best['a']}   B: unedited   n: 40"
    assert f"{best['difference']:+.1f}" in next(line for line in lines if line[1:3] == "ES")


def test_editors_are_in_the_order_of_the_manifest_and_unedited_is_the_word(tmp_path: Path) -> None:
    made = {name: result_rows(40, "same", 1.0) for name in ("rome", "none", "ft", "b", "attn")}
    run = make_run(tmp_path / "run", made)
    assert read([str(run)])["label"].unique(maintain_order=True).to_list() == [
        "rome", "unedited", "ft", "b", "attn",
    ]  # fmt: skip


def test_runs_in_folders_of_one_name_are_told_apart_and_none_is_dropped(tmp_path: Path) -> None:
    weak, strong = result_rows(40, "same", 1.0), result_rows(40, "same", 9.0)
    other = {"scoring": SCORING, "model": {"dtype": "bfloat16"}}
    first = make_run(
        tmp_path / "a" / "run",
        {"rome": weak},
        config={"scoring": SCORING, "model": {"dtype": "float32"}},
    )
    second = make_run(tmp_path / "b" / "run", {"rome": strong}, config=other)
    result = invoke(first, second)
    assert "A: b/run/rome   B: a/run/rome   n: 40" in result.stdout
    assert "a/run | b/run differ in model.dtype: float32 | bfloat16." in result.stderr
    twice = invoke(first, f"{first}/")
    assert twice.exit_code == 1
    assert "each run directory must be given once" in twice.stderr


def test_no_probability_is_0() -> None:
    assert [probability(p) for p in (0.0, 1e-300, 0.0123, 1.0)] == [
        "< 0.001",
        "< 0.001",
        "0.012",
        "1",
    ]


@pytest.mark.parametrize(
    ("key", "value", "difference"),
    [
        ("benchmark", {"name": "facts", "fingerprint": "f1"}, "benchmark.fingerprint: 'f0' there"),
        ("model_fingerprint", "m1", "model_fingerprint: 'm0' there, 'm1' now"),
        ("protocol", "strict", "protocol: 'paper' there, 'strict' now"),
        (
            "config",
            {"scoring": {"generation": {"seed": 1}}},
            "scoring.generation.seed: 0 there, 1 now",
        ),
    ],
)
def test_runs_that_are_not_of_the_same_kind_are_refused(
    tmp_path: Path, key: str, value: Any, difference: str
) -> None:
    made = {"rome": result_rows(20, "same", 1.0)}
    first = make_run(tmp_path / "first", made)
    second = make_run(tmp_path / "second", made, **{key: value})
    result = invoke(first, second)
    assert result.exit_code == 1
    assert difference in result.stderr
    assert str(second) in result.stderr


def test_one_editor_is_not_enough(tmp_path: Path) -> None:
    result = invoke(make_run(tmp_path / "run", {"rome": result_rows(20, "same", 1.0)}))
    assert result.exit_code == 1
    assert "at least two editors, got ['rome']" in result.stderr
