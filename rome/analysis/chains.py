"""Chains by checkpoint: what their orders have in common, what is left of facts as they age."""

from __future__ import annotations

import polars as pl

from rome.analysis.metrics import METRICS, SUCCESSES, harmonic_mean, table_of
from rome.analysis.summary import with_metrics
from rome.data.results import OK

AGES = 10
"""The facts of a checkpoint are shown in so many parts, from the last edited to the first."""
_KEYS = ("benchmark", "model", "editor", "edits")


def by_order(rows: pl.LazyFrame) -> pl.DataFrame:
    """One row per (benchmark, model, editor, edits, order) of a run's chains: S and each metric as
    `summarize` has them, x 100, over the facts edited so far. Empty where there are no chains."""
    means = _scored(rows).group_by(*_KEYS, "order").agg(pl.col(*METRICS).mean() * 100)
    return means.with_columns(harmonic_mean().alias("S")).sort(*_KEYS, "order").collect()


def over_orders(orders: pl.DataFrame) -> pl.DataFrame:
    """`by_order` over orders: `orders`, how many, and of S and each metric M its mean, and `M_std`,
    the deviation between orders (of a sample, so null for one)."""
    names = ("S", *METRICS)
    return (
        orders.group_by(*_KEYS)
        .agg(
            pl.len().alias("orders"),
            pl.col(*names).mean(),
            pl.col(*names).std().name.suffix("_std"),
        )
        .sort(*_KEYS)
    )


def by_age(rows: pl.LazyFrame) -> pl.DataFrame:
    """ES, PS, NS and the scores of zsRE x 100 by (benchmark, model, editor, edits, part): the facts
    of a checkpoint in AGES parts by `age`, the edits since their own, of which `age` is the part's
    mean."""
    part = (pl.col("age") * AGES // pl.col("edits")).clip(0, AGES - 1).alias("part")
    return (
        _scored(rows)
        .group_by(*_KEYS, part)
        .agg(
            pl.col("age").mean(),
            pl.len().alias("n"),
            pl.col(*SUCCESSES, *table_of("zsre")).mean() * 100,
        )
        .sort(*_KEYS, "part")
        .collect()
    )


def _scored(rows: pl.LazyFrame) -> pl.LazyFrame:
    present = with_metrics(rows)
    chained = pl.col("edits").is_not_null() & (pl.col("status") == OK)
    return present.filter(chained).unique((*_KEYS, "order", "case_id"))
