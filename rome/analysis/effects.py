"""Effects of causal traces by token and layer, and the layer that they suggest."""

from __future__ import annotations

import polars as pl

ROLES = (
    "first subject",
    "middle subject",
    "last subject",
    "first subsequent",
    "further",
    "last",
)


def roles(subject: range, tokens: int) -> list[list[str]]:
    """The roles of each token of a prompt; like the released averages, a token may have several."""
    first, last, after = subject.start, subject.stop - 1, subject.stop
    members = {
        "first subject": [first],
        "middle subject": range(first + 1, last),
        "last subject": [last],
        "first subsequent": [after],
        "further": range(after + 1, tokens - 1),
        "last": [tokens - 1],
    }
    return [[role for role in ROLES if t in members[role]] for t in range(tokens)]


def not_finite() -> pl.Expr:
    """True of a trace of a known fact that has a probability which is NaN or infinite."""
    restored = pl.col("restored").list.eval(
        pl.element().list.eval(pl.element().is_finite()).list.all()
    )
    finite = pl.all_horizontal(
        pl.col("clean").is_finite(), pl.col("corrupted").is_finite(), restored.list.all()
    )
    return pl.col("known") & ~finite


def effects(rows: pl.DataFrame) -> pl.DataFrame:
    """One row per (kind, known_id, token, layer) of the known facts among `rows`; without traces
    that are `not_finite`.

    `rows`: those of a run of traces, with the column `kind`.

    `total_effect` = P[o] - P*[o] and `indirect_effect` = P*,restored[o] - P*[o], for the answer o.
    `roles` are the token's, see `roles`.
    """
    rows = rows.filter(pl.col("known") & ~not_finite())
    counted = [
        roles(range(row["subject_start"], row["subject_stop"]), len(row["tokens"]))
        for row in rows.select("subject_start", "subject_stop", "tokens").iter_rows(named=True)
    ]
    return (
        rows.with_columns(
            pl.Series("roles", counted, pl.List(pl.List(pl.String))),
            pl.int_ranges(pl.col("tokens").list.len()).alias("token"),
        )
        .select(
            "kind",
            pl.col("case_id").alias("known_id"),
            "token",
            pl.col("tokens").alias("text"),
            "roles",
            "answer",
            (pl.col("clean") - pl.col("corrupted")).alias("total_effect"),
            "corrupted",
            pl.col("restored").alias("layers"),
        )
        .explode("token", "text", "roles", "layers")
        .drop_nulls("layers")
        .with_columns(pl.int_ranges(pl.col("layers").list.len()).alias("layer"))
        .explode("layer", "layers")
        .with_columns((pl.col("layers") - pl.col("corrupted")).alias("indirect_effect"))
        .drop("layers", "corrupted")
        .sort("kind", "known_id", "token", "layer")
    )


def averages(frame: pl.DataFrame) -> pl.DataFrame:
    """Average indirect effect by kind, role and layer, over all tokens of a role as the released
    `average_causal_effects` has it; `half_width` is 1.96 * std / sqrt(facts)."""
    effect = pl.col("indirect_effect")
    return (
        frame.explode("roles")
        .drop_nulls("roles")
        .group_by("kind", pl.col("roles").alias("role"), "layer")
        .agg(
            effect.mean().alias("indirect_effect"),
            (1.96 * effect.std(ddof=0) / pl.col("known_id").n_unique().sqrt()).alias("half_width"),
            pl.col("known_id").n_unique().alias("facts"),
        )
        .sort("kind", pl.col("role").cast(pl.Enum(ROLES)), "layer")
    )


def suggested_layer(average: pl.DataFrame) -> int | None:
    """The layer with the largest average indirect effect of MLPs at the subject's last token."""
    found = average.filter(kind="mlp", role="last subject").sort("indirect_effect")
    return None if found.is_empty() else int(found["layer"][-1])
