"""Editors against each other on the records that both have, and how many of their edits are sick.

Legend: G clusters, M metrics, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import wilcoxon
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from rome.analysis.metrics import METRICS, finite
from rome.analysis.summary import cluster_of, resampled_means
from rome.data.results import OK

SMALL_DIVISOR = 0.1
"""A divisor is small below this share of the row's median. The update is as large as its inverse,
so such an edit is ten times as large as most."""
LARGE_NORM = 10.0
"""An update is an outlier above so many medians of the row."""
LOW_ENTROPY = 0.5
"""Texts have collapsed below this share of the unedited model's GE on the same record."""


def compare(rows: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    """Every pair of editors on every metric, over the records that both have, paired by `case_id`.
    Checkpoints of chains are paired after the same number of edits, and with rows of no chain.

    `rows`: one row per (`label`, `case_id`), in the order in which labels are to be named, with
    `status`, `relation_id` and the metrics as columns, all as fractions. Columns of the result:
    `metric`, `a`, `b` (labels), `n` records, and x 100 the means `mean_a`, `mean_b`, their
    `difference` (a - b), and its 95 % percentile bootstrap `low`, `high` clustered by relation as
    in `rome.analysis.summary` (null for fewer than two clusters); `test`, its two-sided `p`, and
    `p_holm`, adjusted for all rows of the result (Holm 1979). A metric without common records has
    no row; a record whose number is NaN or infinite does not have the metric.

    Tests: `mcnemar`, exact, where the metric of every record is 0 or 1; else `wilcoxon`, signed
    ranks of the differences without the zeros. Both take records as independent, the interval does
    not: relations that go together are a reason to believe the interval.

    Raises ValueError for fewer than two labels, or a metric that is no column.
    """
    labels = rows["label"].unique(maintain_order=True).to_list()
    if len(labels) < 2:
        raise ValueError(f"a comparison takes at least two editors, got {labels}")
    if unknown := [name for name in metrics if name not in rows.columns]:
        raise ValueError(f"a metric must be one of {', '.join(METRICS)}, got {', '.join(unknown)}")
    scored = rows.filter(pl.col("status") == OK).with_columns(
        finite(pl.col(name).cast(pl.Float64)).alias(name) for name in metrics
    )
    binary = {name for name in metrics if scored[name].drop_nulls().is_in([0.0, 1.0]).all()}
    found = [
        row
        for a, b in _comparable(rows, labels)
        for row in _pair(scored.filter(label=a), scored.filter(label=b), metrics, binary)
    ]
    frame = pl.DataFrame(found, schema=_SCHEMA)
    adjusted = multipletests(frame["p"].to_numpy(), method="holm")[1] if len(frame) else []
    return frame.with_columns(pl.Series("p_holm", adjusted, pl.Float64))


def _comparable(rows: pl.DataFrame, labels: Sequence[str]) -> Iterator[tuple[str, str]]:
    edits_of = dict(rows.select("label", "edits").iter_rows()) if "edits" in rows.columns else {}
    for a, b in combinations(labels, 2):
        if len({edits_of.get(a), edits_of.get(b)} - {None}) < 2:
            yield a, b


_SCHEMA = {
    **dict.fromkeys(("metric", "a", "b"), pl.String),
    "n": pl.Int64,
    **dict.fromkeys(("mean_a", "mean_b", "difference", "low", "high"), pl.Float64),
    "test": pl.String,
    "p": pl.Float64,
}


def _pair(
    a: pl.DataFrame, b: pl.DataFrame, metrics: Sequence[str], binary: set[str]
) -> list[dict[str, Any]]:
    both = a.join(b.select("case_id", *metrics), on="case_id", suffix="_b")
    rows = []
    for metric in metrics:
        paired = both.select(
            cluster_of(), pl.col(metric).alias("a"), pl.col(f"{metric}_b").alias("b")
        ).drop_nulls()
        if paired.is_empty():
            continue
        change = (paired["a"] - paired["b"]).to_numpy()
        test = "mcnemar" if metric in binary else "wilcoxon"
        rows.append(
            {
                "metric": metric,
                "a": a["label"][0],
                "b": b["label"][0],
                "n": len(paired),
                "mean_a": paired["a"].mean() * 100,  # type: ignore[operator]  # no null is left
                "mean_b": paired["b"].mean() * 100,  # type: ignore[operator]
                "difference": change.mean() * 100,
                **_interval(paired),
                "test": test,
                "p": _mcnemar(change) if metric in binary else _wilcoxon(change),
            }
        )
    return rows


def _interval(paired: pl.DataFrame) -> dict[str, float]:
    change = pl.col("a") - pl.col("b")
    clusters = paired.group_by("cluster").agg(change.sum().alias("sum"), pl.len()).sort("cluster")
    if len(clusters) < 2:
        return {}
    sums_G1, counts_G1 = (clusters.select(name).to_numpy() for name in ("sum", "len"))
    means_R1 = resampled_means(sums_G1, counts_G1.astype(float)) * 100
    low, high = np.percentile(means_R1, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def _mcnemar(change: Any) -> float:
    """From the records that only one of the two gets right."""
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    return float(mcnemar([[0, better], [worse, 0]], exact=True).pvalue)


def _wilcoxon(change: Any) -> float:
    # A difference in the last bits is a tie.
    moved = change[np.abs(change) > 1e-12]
    return float(wilcoxon(moved).pvalue) if len(moved) else 1.0


def health(rows: pl.DataFrame) -> pl.DataFrame:
    """Per label, of `n` edits: how many have small divisors, and how many break the model.

    `rows` as for `compare`, with `editor` and the health of edits. Rows of the editor `none` are
    the unedited model. Columns: `label`, `n`, `small_divisor` (SMALL_DIVISOR; null where the editor
    has no divisor), `large_norm` (LARGE_NORM; null where it tells no norm), `low_entropy`
    (LOW_ENTROPY; null where GE is not known on both sides) and `disabling`, the edits that are at
    least one of the last two.

    "Disabling" edits break the model at once (Gupta et al. 2024, "Rebuilding ROME"): they find them
    by outliers of the update's norm and by a generation entropy that drops because the texts
    repeat themselves. The thresholds are ours; the paper reads them off its plots.
    """
    # What is not a number is as bad as can be, and greater than all numbers to polars.
    divisor = pl.col("edit_divisor").abs().fill_nan(0)
    norm = pl.col("edit_norm").fill_nan(float("inf"))
    scored = rows.filter(pl.col("status") == OK)
    unedited = scored.filter(editor="none").unique("case_id").select("case_id", before="GE")
    return (
        scored.filter(pl.col("editor") != "none")
        .join(unedited, on="case_id", how="left", maintain_order="left")
        .with_columns(
            small_divisor=divisor < SMALL_DIVISOR * divisor.median().over("label"),
            large_norm=norm > LARGE_NORM * norm.median().over("label"),
            low_entropy=pl.col("GE") < LOW_ENTROPY * pl.col("before"),
        )
        # What is not known of an edit does not count against it.
        .with_columns(
            disabling=pl.max_horizontal(pl.col("large_norm", "low_entropy").cast(pl.UInt32))
        )
        .group_by("label", maintain_order=True)
        .agg(
            pl.len().alias("n"),
            *(
                pl.when(pl.col(name).is_not_null().any()).then(pl.col(name).sum()).alias(name)
                for name in ("small_divisor", "large_norm", "low_entropy", "disabling")
            ),
        )
    )
