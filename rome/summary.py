"""Result rows to the paper's table: ES..NM per record, then S and intervals per editor.

All numbers follow the protocol of the released code of the ROME paper
(`experiments/summarize.py`), named "paper" in the column `protocol`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import polars as pl

from rome.results import ERROR, OK

PROTOCOL = "paper"

GROUP = ("run", "benchmark", "model", "editor")
METRICS = ("S", "ES", "EM", "PS", "PM", "NS", "NM", "GE", "RS")

_Z = 1.96
_RESAMPLES = 1000
_RESAMPLES_AT_ONCE = 100
_SEED = 0


class _Rule(NamedTuple):
    """A prompt kind's success is `better` being strictly likelier than `worse`."""

    success: str
    magnitude: str
    kind: str
    better: str
    worse: str


_RULES = (
    _Rule("ES", "EM", "rewrite", "new", "true"),
    _Rule("PS", "PM", "paraphrase", "new", "true"),
    _Rule("NS", "NM", "neighborhood", "true", "new"),
)
# S is their harmonic mean.
_SUCCESSES = [rule.success for rule in _RULES]
_RECORD_METRICS = [name for rule in _RULES for name in (rule.success, rule.magnitude)]
_MEANS = [*_RECORD_METRICS, "GE", "RS"]


def record_metrics() -> list[pl.Expr]:
    """ES EM PS PM NS NM and `protocol` of each result row, for `with_columns`.

    Fractions: means over the record's prompts of success and of the difference of probabilities
    exp(-nll). A tie, or a likelihood that is not a number, is a failure on either side. Null where
    the record has no such prompts or is a dead letter.
    """
    metrics = [expr for rule in _RULES for expr in _rule_metrics(rule)]
    return [*metrics, pl.lit(PROTOCOL).alias("protocol")]


def _rule_metrics(rule: _Rule) -> tuple[pl.Expr, pl.Expr]:
    better, worse = (pl.col(f"{rule.kind}_nll_{target}") for target in (rule.better, rule.worse))
    # A difference below zero, since NaN is greater than all numbers to polars, but is not here.
    success = (better - worse).list.eval(pl.element() < 0).list.mean()
    magnitude = (_probabilities(better) - _probabilities(worse)).list.mean()
    ok = pl.when(pl.col("status") == OK)
    return ok.then(success).alias(rule.success), ok.then(magnitude).alias(rule.magnitude)


def _probabilities(nll: pl.Expr) -> pl.Expr:
    return nll.list.eval((-pl.element()).exp())


def summarize(rows: pl.LazyFrame) -> pl.DataFrame:
    """One row per (run, benchmark, model, editor), in the order of these names.

    `rows` holds the columns of RESULT_SCHEMA and of GROUP. Each metric M of METRICS is there x 100
    as in the paper's tables, null where no record has it, with
    - `M_half_width`: 1.96 * population std / sqrt(M_n) over records, the paper's interval; null
      for S, which is not a mean over records, and for fewer than two records;
    - `M_low`, `M_high`: the 95 % percentile bootstrap clustered by relation; null for fewer than
      two relations. A record without a relation is a cluster of its own;
    - `M_n`: the records that have it (not for S).
    S is the harmonic mean of the unrounded ES, PS and NS; a zero makes it 0.

    `n` counts the scored records, `dead` the dead letters, `duplicates` the rows dropped because
    (run, editor, case_id) was there already; a scored row is kept in preference to a dead letter.
    """
    records, duplicates = _deduplicate(
        rows.with_columns(record_metrics())
        .select(*GROUP, "case_id", "relation_id", "status", *_MEANS)
        .collect()
    )
    summary = records.group_by(*GROUP).agg(
        (pl.col("status") == OK).sum().alias("n"),
        (pl.col("status") == ERROR).sum().alias("dead"),
        *(pl.col(name).mean() * 100 for name in _MEANS),
        *(_half_width(name) for name in _MEANS),
        *(pl.col(name).count().alias(f"{name}_n") for name in _MEANS),
    )
    intervals = [
        dict(zip(GROUP, key, strict=True)) | _bootstrap(group)
        for key, group in records.group_by(*GROUP)
    ]
    return (
        summary.join(duplicates, on=GROUP, how="left")
        .join(pl.DataFrame(intervals, schema=_interval_schema()), on=GROUP)
        .with_columns(
            harmonic_mean().alias("S"),
            pl.lit(None, pl.Float64).alias("S_half_width"),
            pl.col("duplicates").fill_null(0),
            pl.lit(PROTOCOL).alias("protocol"),
        )
        .select(*GROUP, "protocol", "n", "dead", "duplicates", *_metric_columns())
        .sort(*GROUP)
    )


def harmonic_mean() -> pl.Expr:
    """S from the columns ES, PS and NS: null if one of them is null, 0 if one of them is 0."""
    inverses = [1 / pl.col(name) for name in _SUCCESSES]
    return len(inverses) / pl.sum_horizontal(inverses, ignore_nulls=False)


def _half_width(name: str) -> pl.Expr:
    column = pl.col(name)
    width = _Z * column.std(ddof=0) / column.count().sqrt() * 100
    return pl.when(column.count() > 1).then(width).alias(f"{name}_half_width")


def _deduplicate(rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows in the order of their keys, each key once; and per group how many went."""
    records = rows.sort(*GROUP, "case_id", pl.col("status") != OK).unique(
        (*GROUP, "case_id"), keep="first", maintain_order=True
    )
    dropped = rows.group_by(*GROUP).agg(
        (pl.len() - pl.col("case_id").n_unique()).cast(pl.Int64).alias("duplicates")
    )
    return records, dropped


def _bootstrap(group: pl.DataFrame) -> dict[str, float | None]:
    """`M_low` and `M_high` of each metric of one editor.

    Relations are drawn with replacement, as many as there are, and each brings all its records.
    The same draws for every editor, so that intervals of editors can be compared.
    """
    alone = pl.format("case {}", "case_id")
    clusters = (
        group.filter(pl.col("status") == OK)
        .group_by(pl.coalesce("relation_id", alone).alias("cluster"))
        .agg(pl.col(_MEANS).sum().name.suffix("_sum"), pl.col(_MEANS).count().name.suffix("_n"))
        .sort("cluster")
    )
    if len(clusters) < 2:
        return {}
    sums_GM = clusters.select(f"{name}_sum" for name in _MEANS).to_numpy()
    counts_GM = clusters.select(f"{name}_n" for name in _MEANS).to_numpy().astype(float)

    means_RM = _resampled_means(sums_GM, counts_GM)
    with np.errstate(divide="ignore"):
        successes_R3 = means_RM[:, [_MEANS.index(name) for name in _SUCCESSES]]
        s_R1 = len(_SUCCESSES) / (1 / successes_R3).sum(axis=1, keepdims=True)
    samples = np.concatenate([s_R1, means_RM], axis=1) * 100
    return {
        f"{name}_{end}": float(np.nanpercentile(sample, percent))
        for name, sample in zip(("S", *_MEANS), samples.T, strict=True)
        for end, percent in (("low", 2.5), ("high", 97.5))
        if not np.isnan(sample).all()
    }


def _resampled_means(sums_GM: Any, counts_GM: Any) -> Any:
    """Means [R, M] of the resampled clusters; NaN where a sample has no record with the metric."""
    generator = np.random.default_rng(_SEED)
    shares_G = np.full(len(sums_GM), 1 / len(sums_GM))
    blocks = []
    for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE):
        draws_BG = generator.multinomial(len(shares_G), shares_G, _RESAMPLES_AT_ONCE).astype(float)
        with np.errstate(invalid="ignore"):
            blocks.append((draws_BG @ sums_GM) / (draws_BG @ counts_GM))
    return np.concatenate(blocks)


def _metric_columns() -> list[str]:
    parts = ("", "_half_width", "_low", "_high", "_n")
    return [name + part for name in METRICS for part in parts if name + part != "S_n"]


def _interval_schema() -> dict[str, Any]:
    ends = {f"{name}_{end}": pl.Float64 for name in METRICS for end in ("low", "high")}
    return dict.fromkeys(GROUP, pl.String) | ends
