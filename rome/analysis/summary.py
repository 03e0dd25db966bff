"""Result rows to the paper's table: metrics per record, then S and intervals per editor.

Legend: G clusters, M metrics, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from rome.analysis.metrics import (
    METRICS,
    PROTOCOL,
    SUCCESSES,
    Metric,
    finite,
    harmonic_mean,
    not_finite,
    scored,
)
from rome.analysis.own_metrics import metrics_in
from rome.data.results import ERROR, OK, RESULT_SCHEMA

GROUP = ("run", "benchmark", "model", "editor")

_COUNTS = ("n", "dead", "duplicates", "not_finite", "not_finite_in")

_Z = 1.96
_RESAMPLES = 1000
_RESAMPLES_AT_ONCE = 100
_SEED = 0


# The columns of RESULT_SCHEMA and their types, which an earlier version may not have written.
_READ = dict(pl.from_arrow(RESULT_SCHEMA.empty_table()).schema)  # type: ignore[union-attr]


def record_metrics(metrics: Mapping[str, Metric] = METRICS) -> list[pl.Expr]:
    """All metrics that a result row has not, those of `not_finite`, and `protocol`, for
    `with_columns`.

    Null where the record has no such number, where it is not finite, or of a dead letter.
    """
    ok = pl.when(pl.col("status") == OK)
    values = {name: metric.value for name, metric in metrics.items() if metric.value is not None}
    made = [ok.then(finite(value)).alias(name) for name, value in values.items()]
    return [*made, *not_finite(), pl.lit(PROTOCOL).alias("protocol")]


def summarize(rows: pl.LazyFrame) -> pl.DataFrame:
    """One row per (run, benchmark, model, editor), in the order of these names.

    `rows` holds the columns of RESULT_SCHEMA and of GROUP; those of its lists that an earlier
    version did not write may be missing. S and each metric M of METRICS, and of those that the rows
    bring with them (`rome.analysis.own_metrics`), is there x 100 as in the paper's tables, null
    where no record has it, with
    - `M_half_width`: 1.96 * population std / sqrt(M_n) over records, the paper's interval; null
      for S, which is not a mean over records, and for fewer than two records;
    - `M_low`, `M_high`: the 95 % percentile bootstrap clustered by relation; null for fewer than
      two relations. A record without a relation is a cluster of its own;
    - `M_n`: the records that have it (not for S).
    S is the harmonic mean of the unrounded ES, PS and NS; a zero makes it 0.

    `n` counts the scored records, `dead` the dead letters, `duplicates` the rows dropped because
    (run, editor, order, case_id) was there already; a scored row is kept in preference to a dead
    letter. A checkpoint of a chain is an editor of its own here, over all orders together.
    `not_finite` counts the records with numbers that are NaN or infinite, which the metrics made of
    them are without, and `not_finite_in` says what these are of, see `metrics.not_finite`.
    """
    others = ("order", "case_id", "relation_id", "status", "not_finite", "not_finite_in")
    metrics = list(metrics_in(rows))
    records, duplicates = _deduplicate(
        with_metrics(rows).select(*GROUP, *others, *metrics).collect()
    )
    summary = records.group_by(*GROUP).agg(
        (pl.col("status") == OK).sum().alias("n"),
        (pl.col("status") == ERROR).sum().alias("dead"),
        (pl.col("not_finite") > 0).sum(),
        pl.col("not_finite_in").str.split(", ").explode().unique().sort().drop_nulls(),
        *(pl.col(name).mean() * 100 for name in metrics),
        *(_half_width(name) for name in metrics),
        *(pl.col(name).count().alias(f"{name}_n") for name in metrics),
    )
    intervals = [
        dict(zip(GROUP, key, strict=True)) | _bootstrap(group, metrics)
        for key, group in records.group_by(*GROUP)
    ]
    return (
        summary.join(duplicates, on=GROUP, how="left")
        .join(pl.DataFrame(intervals, schema=_interval_schema(metrics)), on=GROUP)
        .with_columns(
            harmonic_mean().alias("S"),
            pl.lit(None, pl.Float64).alias("S_half_width"),
            pl.col("duplicates").fill_null(0),
            pl.col("not_finite_in").list.join(", "),
            pl.lit(PROTOCOL).alias("protocol"),
        )
        .select(*GROUP, "protocol", *_COUNTS, *_metric_columns(metrics))
        .sort(*GROUP)
    )


def with_metrics(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Result rows with their metrics, those that they bring with them too; columns that an earlier
    version did not write are null.

    What is not finite in GE and RS is null as well, and so are they where the edited fact has no
    likelihood: then their texts are of no model.
    """
    present = rows.collect_schema().names()
    missing = {name: pl.lit(None, kind) for name, kind in _READ.items() if name not in present}
    there = [name for name, metric in METRICS.items() if metric.value is None]
    rows = rows.with_columns(**missing)
    if "neighborhood_target" in present:
        # Once all neighborhood prompts, of which there was one, had one target.
        former = pl.coalesce("neighborhood_targets", _one_of_each("neighborhood_target"))
        rows = rows.with_columns(neighborhood_targets=former)
    return rows.with_columns(
        *record_metrics(metrics_in(rows)),
        *(scored("rewrite", finite(pl.col(name))).alias(name) for name in there),
    )


def _one_of_each(name: str) -> pl.Expr:
    number = pl.col("neighborhood_nll_true").list.len()
    return pl.when(pl.col(name).is_not_null()).then(pl.col(name).repeat_by(number))


def _half_width(name: str) -> pl.Expr:
    column = pl.col(name)
    width = _Z * column.std(ddof=0) / column.count().sqrt() * 100
    return pl.when(column.count() > 1).then(width).alias(f"{name}_half_width")


def _deduplicate(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows in the order of their keys, each key once; and per group how many went."""
    key = ("order", "case_id")
    records = rows.sort(*GROUP, *key, pl.col("status") != OK).unique(
        (*GROUP, *key), keep="first", maintain_order=True
    )
    dropped = rows.group_by(*GROUP).agg(
        (pl.len() - pl.struct(key).n_unique()).cast(pl.Int64).alias("duplicates")
    )
    return records, dropped


def _bootstrap(group: pl.DataFrame, metrics: list[str]) -> dict[str, float | None]:
    """`M_low` and `M_high` of each metric of one editor.

    Relations are drawn with replacement, as many as there are, and each brings all its records.
    The same draws for every editor, so that intervals of editors can be compared.
    """
    clusters = (
        group.filter(pl.col("status") == OK)
        .group_by(cluster_of())
        .agg(pl.col(*metrics).sum().name.suffix("_sum"), pl.col(*metrics).count().name.suffix("_n"))
        .sort("cluster")
    )
    if len(clusters) < 2:
        return {}
    sums_GM = clusters.select(f"{name}_sum" for name in metrics).to_numpy()
    counts_GM = clusters.select(f"{name}_n" for name in metrics).to_numpy().astype(float)
    means_RM = resampled_means(sums_GM, counts_GM)
    with np.errstate(divide="ignore"):
        successes_R3 = means_RM[:, [metrics.index(name) for name in SUCCESSES]]
        s_R1 = len(SUCCESSES) / (1 / successes_R3).sum(axis=1, keepdims=True)
    samples = np.concatenate([s_R1, means_RM], axis=1) * 100
    return {
        f"{name}_{end}": float(np.nanpercentile(sample, percent))
        for name, sample in zip(("S", *metrics), samples.T, strict=True)
        for end, percent in (("low", 2.5), ("high", 97.5))
        if not np.isnan(sample).all()
    }


def cluster_of() -> pl.Expr:
    """The relation of a record; one without is a cluster of its own."""
    return pl.coalesce("relation_id", pl.format("case {}", "case_id")).alias("cluster")


def resampled_means(sums_GM: Any, counts_GM: Any) -> Any:
    """Means [R, M] of the resampled clusters; NaN where a sample has no record with the metric."""
    generator = np.random.default_rng(_SEED)
    shares_G = np.full(len(sums_GM), 1 / len(sums_GM))
    blocks = []
    for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE):
        draws_BG = generator.multinomial(len(shares_G), shares_G, _RESAMPLES_AT_ONCE).astype(float)
        with np.errstate(invalid="ignore"):
            blocks.append((draws_BG @ sums_GM) / (draws_BG @ counts_GM))
    return np.concatenate(blocks)


def _metric_columns(metrics: list[str]) -> list[str]:
    parts = ("", "_half_width", "_low", "_high", "_n")
    return [name + part for name in ("S", *metrics) for part in parts if name + part != "S_n"]


def _interval_schema(metrics: list[str]) -> dict[str, Any]:
    ends = {f"{name}_{end}": pl.Float64 for name in ("S", *metrics) for end in ("low", "high")}
    return dict.fromkeys(GROUP, pl.String) | ends
