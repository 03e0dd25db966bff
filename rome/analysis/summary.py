"""Result rows to the paper's table: ES..NM per record, then S and intervals per editor.

Two protocols stand side by side, named in the column `protocol`:
- paper: what the released code of the ROME paper computes (`experiments/summarize.py`) from
  probabilities under teacher forcing. It has all metrics but those of
- strict: names end in `_strict`. The model speaks greedily until a natural stop (see
  `rome.scoring.greedy`) and must say the target and nothing else. Case counts; white space at
  either end and in runs, and a full stop at the end, do not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import polars as pl

from rome.data.results import ERROR, OK, RESULT_SCHEMA

PROTOCOL = "paper, strict"

GROUP = ("run", "benchmark", "model", "editor")
# The columns of the paper's Table 4 (COUNTERFACT) and Table 1 (zsRE), and what it does not have.
METRICS = ("S", "ES", "EM", "PS", "PM", "NS", "NM", "GE", "RS")
ZSRE_METRICS = ("efficacy", "paraphrase", "specificity")
EXTRA_METRICS = ("ES_strict", "PS_strict", "NS_strict", "NS_plus", "RVS")

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
_TOLD = (("efficacy", "rewrite"), ("paraphrase", "paraphrase"), ("specificity", "neighborhood"))
_STRICT = (("ES_strict", "rewrite"), ("PS_strict", "paraphrase"), ("NS_strict", "neighborhood"))
_MEANS = [*METRICS[1:], *ZSRE_METRICS, *EXTRA_METRICS]
# What the metrics of a record are made of.
_READ = {
    name: pl.List(pl.String if name.endswith("_greedy") else pl.Float64)
    for name in RESULT_SCHEMA.names
    if name.endswith(("_nll_new", "_nll_true", "_accuracy", "_greedy"))
} | dict.fromkeys(("target_new", "target_true", "neighborhood_target"), pl.String())


def record_metrics() -> list[pl.Expr]:
    """All metrics of METRICS, ZSRE_METRICS and EXTRA_METRICS but S, GE and RS, and `protocol`, of
    each result row, for `with_columns`.

    Fractions, means over the record's prompts, null where the record has no such prompts or is a
    dead letter:
    - ES, PS, NS: the target that should be likelier is; a tie, or a likelihood that is not a
      number, is a failure on either side. EM, PM, NM: the difference of probabilities exp(-nll);
    - efficacy, paraphrase, specificity (of zsRE, and computed for all): of the target's tokens, the
      share that is the likeliest (reference code: `eval_utils_zsre.py`);
    - ES_strict, PS_strict, NS_strict: the model says the target, in NS the true one;
    - NS_plus: NS with the edited sentence before each neighborhood prompt. RVS: after the reversed
      prompt the subject is likelier with the new object than with the true one.
    """
    metrics = {rule.success: _success(rule.kind, rule.better, rule.worse) for rule in _RULES}
    metrics |= {rule.magnitude: _magnitude(rule) for rule in _RULES}
    metrics |= {name: pl.col(f"{kind}_accuracy").list.mean() for name, kind in _TOLD}
    metrics |= {name: _said(kind) for name, kind in _STRICT}
    metrics["NS_plus"] = _success("neighborhood_plus", "true", "new")
    metrics["RVS"] = _success("reversed", "new", "true")
    ok = pl.when(pl.col("status") == OK)
    scored = [ok.then(metrics[name]).alias(name) for name in _MEANS if name in metrics]
    return [*scored, pl.lit(PROTOCOL).alias("protocol")]


def _success(kind: str, better: str, worse: str) -> pl.Expr:
    # A difference below zero, since NaN is greater than all numbers to polars, but is not here.
    difference = pl.col(f"{kind}_nll_{better}") - pl.col(f"{kind}_nll_{worse}")
    return difference.list.eval(pl.element() < 0).list.mean()


def _magnitude(rule: _Rule) -> pl.Expr:
    better, worse = (pl.col(f"{rule.kind}_nll_{target}") for target in (rule.better, rule.worse))
    return (_probabilities(better) - _probabilities(worse)).list.mean()


def _said(kind: str) -> pl.Expr:
    true = pl.coalesce("neighborhood_target", "target_true")
    target = true if kind == "neighborhood" else pl.col("target_new")
    texts = pl.col(f"{kind}_greedy")
    # Inside a list no other column can be seen, so fenced texts are joined and the target sought.
    fenced = texts.list.eval(_fenced(pl.element())).list.join("")
    count = fenced.str.count_matches(_fenced(target), literal=True)
    return pl.when(texts.list.len() > 0).then(count / texts.list.len())


def _fenced(text: pl.Expr) -> pl.Expr:
    """The words of a text, between characters that no text has."""
    words = text.str.replace_all(r"\s+", " ").str.strip_chars().str.strip_suffix(".")
    return pl.concat_str(pl.lit("\x02"), words.str.strip_chars(), pl.lit("\x03"))


def _probabilities(nll: pl.Expr) -> pl.Expr:
    return nll.list.eval((-pl.element()).exp())


def summarize(rows: pl.LazyFrame) -> pl.DataFrame:
    """One row per (run, benchmark, model, editor), in the order of these names.

    `rows` holds the columns of RESULT_SCHEMA and of GROUP; those of its lists that an earlier
    version did not write may be missing. Each metric M of METRICS, ZSRE_METRICS and EXTRA_METRICS
    is there x 100 as in the paper's tables, null where no record has it, with
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
        with_metrics(rows).select(*GROUP, "case_id", "relation_id", "status", *_MEANS).collect()
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


def with_metrics(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Result rows with their metrics; lists that an earlier version did not write are null."""
    present = rows.collect_schema().names()
    missing = {name: pl.lit(None, kind) for name, kind in _READ.items() if name not in present}
    return rows.with_columns(**missing).with_columns(record_metrics())


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
    clusters = (
        group.filter(pl.col("status") == OK)
        .group_by(cluster_of())
        .agg(pl.col(_MEANS).sum().name.suffix("_sum"), pl.col(_MEANS).count().name.suffix("_n"))
        .sort("cluster")
    )
    if len(clusters) < 2:
        return {}
    sums_GM = clusters.select(f"{name}_sum" for name in _MEANS).to_numpy()
    counts_GM = clusters.select(f"{name}_n" for name in _MEANS).to_numpy().astype(float)

    means_RM = resampled_means(sums_GM, counts_GM)
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


def _metric_columns() -> list[str]:
    parts = ("", "_half_width", "_low", "_high", "_n")
    return [name + part for name in ("S", *_MEANS) for part in parts if name + part != "S_n"]


def _interval_schema() -> dict[str, Any]:
    ends = {f"{name}_{end}": pl.Float64 for name in ("S", *_MEANS) for end in ("low", "high")}
    return dict.fromkeys(GROUP, pl.String) | ends
