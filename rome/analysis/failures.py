"""Ways in which an edit fails, each as an expression over result rows."""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from rome.analysis.comparison import LOW_ENTROPY
from rome.data.results import ERROR

LOST_NEIGHBORS = 0.5
"""An edit bleeds when it takes this share of the neighborhood that the unedited model had right."""

_BEFORE = ("GE", "specificity", "neighborhood_nll_new", "neighborhood_nll_true")


class Failure(NamedTuple):
    name: str
    meaning: str
    found: pl.Expr
    """Over the metrics of a row and, as `before_NAME`, those of the unedited model's row."""


def _kept(prefix: str) -> pl.Expr:
    """Per neighborhood prompt, 1 where the true target is the likelier."""
    true, new = (pl.col(f"{prefix}neighborhood_nll_{target}") for target in ("true", "new"))
    return (true - new).list.eval((pl.element() < 0).cast(pl.Float64))


_had = _kept("before_").list.sum()
_lost = _had - (_kept("before_") * _kept("")).list.sum()

FAILURES = (
    Failure("dead letter", "The record has no result, but an error.", pl.col("status") == ERROR),
    Failure(
        "not learnt",
        "The new object is not the likelier one after every rewrite prompt (of zsRE: not all of "
        "the target's tokens are the likeliest).",
        pl.coalesce("ES", "efficacy") < 1,
    ),
    Failure(
        "F1: rewrite prompt only",
        "The new object is the likelier one after the rewrite prompt, and after no paraphrase "
        "(of zsRE: all of the target's tokens are the likeliest there, but not in the paraphrase).",
        pl.when(pl.col("ES").is_not_null())
        .then((pl.col("ES") == 1) & (pl.col("PS") == 0))
        .otherwise((pl.col("efficacy") == 1) & (pl.col("paraphrase") < 1)),
    ),
    Failure(
        "F2: bleeds over to neighbors",
        f"Of the neighborhood prompts that the unedited model had right, the new object is now the "
        f"likelier one in at least {LOST_NEIGHBORS:.0%} (of zsRE: so much of its specificity is "
        "gone).",
        pl.when(pl.col("NS").is_not_null())
        .then((_had > 0) & (_lost >= LOST_NEIGHBORS * _had))
        .otherwise(
            (pl.col("before_specificity") > 0)
            & (pl.col("specificity") <= (1 - LOST_NEIGHBORS) * pl.col("before_specificity"))
        ),
    ),
    Failure(
        "broken text",
        f"GE of its texts is below {LOW_ENTROPY:g} of the unedited model's on the same record: "
        "they repeat themselves.",
        pl.col("GE") < LOW_ENTROPY * pl.col("before_GE"),
    ),
    Failure(
        "not finite",
        "Numbers of the row are NaN or infinite; metrics are made without them.",
        pl.col("not_finite") > 0,
    ),
)


def with_failures(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows with one Boolean column per failure, named as it is.

    `rows`: as `jobs.compare.read` gives them. What cannot be known, as bleeding without rows of
    the editor `none`, is false; so is every failure but the dead letter of the unedited model.
    """
    unedited = (
        rows.filter(editor="none")
        .unique("case_id", maintain_order=True)
        .select("case_id", pl.col(_BEFORE).name.prefix("before_"))
    )
    edited = pl.col("editor") != "none"
    return (
        rows.join(unedited, on="case_id", how="left", maintain_order="left")
        .with_columns(
            (failure.found if i == 0 else failure.found & edited)
            .fill_null(False)
            .alias(failure.name)
            for i, failure in enumerate(FAILURES)
        )
        .drop("^before_.*$")
    )


def failure_counts(rows: pl.DataFrame) -> pl.DataFrame:
    """Per label, how many of its `n` rows have each failure."""
    names = [failure.name for failure in FAILURES]
    return rows.group_by("label", maintain_order=True).agg(pl.len().alias("n"), pl.col(names).sum())
