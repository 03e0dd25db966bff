"""The records of a report's browser, in two layers.

The index has a few numbers of each record and editor, for filters and sorting; the details are cut
into chunks, of which the page opens those that it draws. Of a large run they are of some records.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl

from cluster.store import Store
from jobs.runs import manifests
from rome.analysis.failures import FAILURES
from rome.analysis.metrics import SUCCESSES, table_of
from rome.data.results import EXTRA_KINDS, TOLD_KINDS

CHUNK = 100
"""Records of a chunk: some hundred kilobytes to inflate for the first of them."""
MOST = 22_000
"""Rows whose details a page has by default; with two texts each they are some thirty megabytes."""

_HEALTH = ("edit_norm", "edit_divisor", "edit_loss")
_PROMPTS = ("paraphrase_prompts", "neighborhood_prompts", "generation_prompts")
_ASKED = (*TOLD_KINDS, *EXTRA_KINDS)


class Chosen(NamedTuple):
    """The records whose details a page has, and what it says of the others."""

    cases: list[int]
    note: str


def chosen(rows: pl.DataFrame, wanted: str) -> Chosen:
    """`wanted`: `failures`, `sample:N` or `all`; empty for all, or a sample of a large run.

    Raises ValueError for another word.
    """
    cases = rows["case_id"].unique().sort().to_list()
    editors = rows["label"].n_unique()
    if not wanted:
        wanted = "all" if len(rows) <= MOST else f"sample:{MOST // editors}"
    what, _, count = wanted.partition(":")
    if what == "all" and not count:
        return Chosen(cases, "")
    if what == "failures" and not count:
        failed = rows.filter(pl.any_horizontal(failure.name for failure in FAILURES))
        found, of = failed["case_id"].unique().sort().to_list(), "in which an editor failed"
    elif what == "sample" and count.isdecimal() and int(count):
        size = min(int(count), len(cases))
        found, of = sorted(random.Random(0).sample(cases, size)), "drawn at random"
    else:
        raise ValueError(f"--records must be failures, sample:N, all or a folder, got {wanted}")
    note = (
        f"Prompts, answers and texts are in this page of {len(found):,} of {len(cases):,} records, "
        f"{of}; scores are of all. jobs.report --records all has everything."
    )
    return Chosen(found, note if len(found) < len(cases) else "")


def index(
    rows: pl.DataFrame,
    texts: int,
    details: Sequence[int],
    shown: Sequence[str],
    names: Mapping[str, str],
) -> bytes:
    """JSON, a list per column: each record's words and the place of its details, and per editor its
    failures as bits, scores and health.

    `details`: the cases that have details; `shown`: the labels that are chosen at first; `names`:
    of relations. A record that an editor does not have has -1 for failures, one without details -1.
    """
    cases = _cases(rows)
    relations = cases["relation_id"].drop_nulls().unique().sort()
    places = {relation: i for i, relation in enumerate(relations)}
    bits = pl.sum_horizontal(pl.col(f.name).cast(pl.Int32) * 2**i for i, f in enumerate(FAILURES))
    # COUNTERFACT's rows have zsRE's shares of tokens as well, which would seem to contradict them.
    kinds = SUCCESSES if rows["ES"].count() else table_of("zsre")
    scores = [name for name in kinds if rows[name].count()]
    health = [name for name in _HEALTH if rows[name].count()]
    editors = []
    for label in labels(rows):
        own = rows.filter(label=label).select(
            "case_id",
            bits.alias("failures"),
            pl.col(scores).round(3),
            *(finite(pl.col(name)).round_sig_figs(3) for name in (*health, "GE")),
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
    place_of = {case: place for place, case in enumerate(details)}
    return json.dumps(
        {
            "relations": relations.to_list(),
            "names": [names.get(relation, "") for relation in relations],
            "failures": [failure.name for failure in FAILURES],
            "scores": scores,
            "health": [*health, "GE"],
            "shown": list(shown),
            "texts": texts,
            "chunk": CHUNK,
            "details": [place_of.get(case, -1) for case in cases["case_id"]],
            "relation": [places.get(relation, -1) for relation in cases["relation_id"]],
            **cases.drop("relation_id").to_dict(as_series=False),
            "editors": editors,
        },
        allow_nan=False,
    ).encode()


def chunks(
    rows: pl.DataFrame, prompts: pl.DataFrame, texts: int, details: Sequence[int]
) -> Iterator[bytes]:
    """JSON, CHUNK records each, in the order of `details`: prompts, and per editor, by its place:
    probabilities of both targets per prompt, what it said greedily and to WILD, the probes, the
    first `texts` texts, the edit's health and its error."""
    wanted = pl.DataFrame({"case_id": details}, schema={"case_id": pl.Int64})
    found = wanted.join(prompts, on="case_id", how="left", maintain_order="left")
    health = [name for name in rows.columns if name.startswith("edit_") and rows[name].count()]
    shown = [
        *(_probabilities(f"{kind}_nll_{t}") for kind in _ASKED for t in ("new", "true")),
        *(f"{kind}_{how}" for kind in TOLD_KINDS for how in ("greedy", "wild")),
        pl.col("probes").list.eval(_probe()),
        pl.col("texts").list.head(texts),
        *(finite(pl.col(name)) for name in (*health, "GE", "RS")),
        "error",
    ]
    for i, label in enumerate(labels(rows)):
        own = rows.filter(label=label).select("case_id", pl.struct(shown).alias(str(i)))
        found = found.join(own, on="case_id", how="left", maintain_order="left")
    for start in range(0, len(found), CHUNK):
        yield found.slice(start, CHUNK).write_json().encode()


def labels(rows: pl.DataFrame) -> list[str]:
    """The editors, in the order of the runs' manifests."""
    return rows["label"].unique(maintain_order=True).to_list()


def read_prompts(
    runs: Mapping[str, Mapping[str, Any]], moved: str | None = None
) -> tuple[pl.DataFrame, list[str]]:
    """`case_id` and the prompts that result rows do not hold, from the runs' record stores; and
    what a reader must know of those that are not where the runs had them.

    `moved`: where the records lie now. Raises ValueError if there are none, or others.
    """
    schema = {"case_id": pl.Int64()} | dict.fromkeys(_PROMPTS, pl.List(pl.String))
    known = {
        moved or manifest["records_store"]: manifest.get("benchmark", {}).get("fingerprint")
        for manifest in runs.values()
        if moved or "records_store" in manifest
    }
    frames, notes = [pl.DataFrame(schema=schema)], []
    for uri, fingerprint in known.items():
        try:
            frames += _prompts_of(Store(uri), fingerprint)
        except ValueError as error:
            if moved:
                raise
            notes.append(
                f"{error}: only the edited prompt of each record is shown in words. "
                "jobs.report --records FOLDER takes the place where the records lie now."
            )
    return pl.concat(frames).unique("case_id"), notes


def _prompts_of(store: Store, fingerprint: str | None) -> list[pl.DataFrame]:
    shards = store.list("shard-", ".parquet")
    if not shards:
        raise ValueError(f"{store.uri} has no records any more")
    if fingerprint and store.exists("manifest.json"):
        way_out = "Prepare the records again with jobs.prepare."
        if manifests.read(store, ("fingerprint",), way_out)["fingerprint"] != fingerprint:
            raise ValueError(f"{store.uri} has other records than the run had")
    columns = ["case_id", *_PROMPTS]
    return [pl.DataFrame(store.read_table(name, columns=columns)) for name in shards]


def _cases(rows: pl.DataFrame) -> pl.DataFrame:
    words = ("relation_id", "prompt", "subject", "target_new", "target_true")
    # A dead letter has none of them; another editor's row may.
    return rows.group_by("case_id").agg(pl.col(words).drop_nulls().first()).sort("case_id")


def _probe() -> pl.Expr:
    parts = ("set", "role", "prompt", "answers", "greedy", "wild")
    best = pl.element().struct.field("accuracy").list.max()
    shown = [pl.element().struct.field(name) for name in parts]
    return pl.struct(*shown, finite(best).alias("accuracy"))


def _probabilities(name: str) -> pl.Expr:
    probability = (-pl.element()).exp()
    return pl.col(name).list.eval(finite(probability).round_sig_figs(4))


def finite(value: pl.Expr) -> pl.Expr:
    """Null for what is no number to JSON."""
    return pl.when(value.is_finite()).then(value)
