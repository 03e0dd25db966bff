"""The records of a report's browser, in two layers.

The index has a few numbers of each record and editor, for filters; the details are cut into chunks,
of which the page opens those that it draws.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl

from cluster.store import Store
from rome.analysis.failures import FAILURES
from rome.data.results import TOLD_KINDS

CHUNK = 100
"""Records of a chunk: some hundred kilobytes to inflate for the first of them."""

_SHOWN = ("ES", "PS", "NS", "efficacy", "paraphrase", "specificity")


def index(rows: pl.DataFrame, texts: int) -> bytes:
    """JSON, a list per column: each record's words, and per editor its failures as bits and scores.

    A record that an editor does not have has -1 for failures.
    """
    cases = _cases(rows)
    relations = cases["relation_id"].drop_nulls().unique().sort()
    places = {relation: i for i, relation in enumerate(relations)}
    bits = pl.sum_horizontal(pl.col(f.name).cast(pl.Int32) * 2**i for i, f in enumerate(FAILURES))
    scores = [name for name in _SHOWN if rows[name].count()]
    editors = []
    for label in labels(rows):
        own = rows.filter(label=label).select(
            "case_id", bits.alias("failures"), pl.col(scores).round(3)
        )
        columns = cases.select("case_id").join(own, on="case_id", how="left", maintain_order="left")
        editors.append(
            {
                "label": label,
                "edited": rows.filter(label=label)["editor"][0] != "none",
                **columns.drop("case_id")
                .with_columns(pl.col("failures").fill_null(-1))
                .to_dict(as_series=False),
            }
        )
    return json.dumps(
        {
            "relations": relations.to_list(),
            "failures": [failure.name for failure in FAILURES],
            "scores": scores,
            "texts": texts,
            "chunk": CHUNK,
            "relation": [places.get(relation, -1) for relation in cases["relation_id"]],
            **cases.drop("relation_id").to_dict(as_series=False),
            "editors": editors,
        },
        allow_nan=False,
    ).encode()


def chunks(rows: pl.DataFrame, prompts: pl.DataFrame, texts: int) -> Iterator[bytes]:
    """JSON, CHUNK records each, in the index's order: prompts, and per editor, by its place:
    probabilities of both targets per prompt, what it said greedily and to WILD, the probes, the
    first `texts` texts, the edit's health and its error."""
    details = (
        _cases(rows)
        .select("case_id")
        .join(prompts, on="case_id", how="left", maintain_order="left")
    )
    health = [name for name in rows.columns if name.startswith("edit_") and rows[name].count()]
    shown = [
        *(_probabilities(f"{kind}_nll_{t}") for kind in TOLD_KINDS for t in ("new", "true")),
        *(f"{kind}_{how}" for kind in TOLD_KINDS for how in ("greedy", "wild")),
        pl.col("probes").list.eval(_probe()),
        pl.col("texts").list.head(texts),
        *(_finite(pl.col(name)) for name in (*health, "GE", "RS")),
        "error",
    ]
    for i, label in enumerate(labels(rows)):
        own = rows.filter(label=label).select("case_id", pl.struct(shown).alias(str(i)))
        details = details.join(own, on="case_id", how="left", maintain_order="left")
    for start in range(0, len(details), CHUNK):
        yield details.slice(start, CHUNK).write_json().encode()


def labels(rows: pl.DataFrame) -> list[str]:
    """The editors, the unedited model first."""
    unedited = rows.filter(editor="none")["label"]
    return list(dict.fromkeys([*unedited, *rows["label"].unique(maintain_order=True)]))


def read_prompts(manifests: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """`case_id` and the prompts that result rows do not hold, from the runs' record stores.

    Without rows where no store is there any more.
    """
    wanted = ("paraphrase_prompts", "neighborhood_prompts")
    schema = {"case_id": pl.Int64()} | dict.fromkeys(wanted, pl.List(pl.String))
    stores = {manifest["records_store"] for manifest in manifests if "records_store" in manifest}
    frames = [
        pl.DataFrame(store.read_table(name, columns=["case_id", *wanted]))
        for store in map(Store, sorted(stores))
        for name in store.list("shard-", ".parquet")
    ]
    return pl.concat([pl.DataFrame(schema=schema), *frames]).unique("case_id")


def _cases(rows: pl.DataFrame) -> pl.DataFrame:
    words = ("relation_id", "prompt", "subject", "target_new", "target_true")
    # A dead letter has none of them; another editor's row may.
    return rows.group_by("case_id").agg(pl.col(words).drop_nulls().first()).sort("case_id")


def _probe() -> pl.Expr:
    parts = ("set", "role", "prompt", "answers", "greedy", "wild")
    best = pl.element().struct.field("accuracy").list.max()
    shown = [pl.element().struct.field(name) for name in parts]
    return pl.struct(*shown, _finite(best).alias("accuracy"))


def _probabilities(name: str) -> pl.Expr:
    probability = (-pl.element()).exp()
    return pl.col(name).list.eval(_finite(probability).round_sig_figs(4))


def _finite(value: pl.Expr) -> pl.Expr:
    """JSON has no other numbers."""
    return pl.when(value.is_finite()).then(value)
