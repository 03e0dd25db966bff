"""A report's first screen: what was run, who is best and what holds, and one table to sort."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlencode

import polars as pl

from cluster.progress import clock
from cluster.store import Store
from jobs.output.tables import change, is_in_bits, on_screen, published
from jobs.runs.labels import UNEDITED
from jobs.runs.manifests import rows as rows_of
from jobs.runs.parts import AT, PARTS
from rome.analysis.failures import FAILURES
from rome.analysis.metrics import METRICS, SUCCESSES, table_of
from rome.data.results import OK

ALPHA = 0.05
_SHOWN = {"counterfact": (*SUCCESSES, "GE"), "zsre": tuple(table_of("zsre"))}
_COUNTED = {
    "dead letter": "dead",
    "not learnt": "not learnt",
    "F2: bleeds over to neighbors": "bleeds over",
    "broken text": "broken text",
}


class Said(NamedTuple):
    """A piece of a sentence, and where it leads."""

    text: str
    href: str = ""
    strong: bool = False


def facts(runs: Mapping[str, Mapping[str, Any]], rows: pl.DataFrame) -> list[tuple[str, str]]:
    """What a reader has to know of the runs: name -> what it is. Left out is what no run says."""
    manifests = list(runs.values())
    config = [manifest.get("config", {}) for manifest in manifests]
    code = [manifest.get("code", {}) for manifest in manifests]
    total = sum(sum(rows_of(dict(manifest)).values()) for manifest in manifests)
    dead = len(rows.filter(pl.col("status") != OK))
    edited = rows.filter(pl.col("editor") != "none")["label"].n_unique()
    found = {
        "model": {
            f"{c['model']['name']}, {c['model'].get('dtype', '')}" for c in config if "model" in c
        },
        "benchmark": {
            f"{m['benchmark']['name']}, {_slice(m)}" for m in manifests if "benchmark" in m
        },
        "editors": {f"{edited}" + (" + unedited" if "none" in rows["editor"] else "")},
        "done": {f"{len(rows):,} of {total:,} rows, {dead} dead"},
        "last row": {when for uri in runs if (when := _when(uri))},
        "workers": {f"{rows['worker'].n_unique()}"} if rows["worker"].count() else set(),
        "code": {f"{c['rome-bench']} · {c['source'][:7]}" for c in code if "source" in c},
    }
    return [(name, " | ".join(sorted(values))) for name, values in found.items() if values]


def _slice(manifest: Mapping[str, Any]) -> str:
    chosen = manifest.get("config", {}).get("records", {})
    if below := chosen.get("case_id_below"):
        return f"{manifest['records']:,} records below case {below:,}"
    if chosen.get("limit"):
        return f"first {manifest['records']:,} records"
    return f"{manifest['records']:,} records"


def _when(uri: str) -> str:
    store = Store(uri)
    written = store.written(PARTS, ".parquet").values()
    if not written:
        return ""
    begun, last = store.committed("manifest.json"), max(written)
    return f"{last:%Y-%m-%d %H:%M} UTC, {clock((last - begun).total_seconds())} after it began"


class Board(NamedTuple):
    """The leaderboard: columns, and a row for each label, the best first."""

    score: str
    columns: list[dict[str, str]]
    counts: dict[str, str]
    """Failures that some have -> their headings."""
    rows: list[dict[str, Any]]
    unedited: float | None
    """The score of the unedited model."""


def board(rows: pl.DataFrame, summary: pl.DataFrame, order: Sequence[str], benchmark: str) -> Board:
    """`summary`: of `jobs.reduce`, with the column `label`; `order`: labels, the best first."""
    score = "S" if benchmark == "counterfact" else "efficacy"
    shown = [name for name in _SHOWN[benchmark] if summary[name].count()]
    of_label = {row["label"]: row for row in summary.to_dicts()}
    counts = rows.group_by("label").agg(pl.col([f.name for f in FAILURES]).sum())
    counted = {row["label"]: row for row in counts.to_dicts()}
    seconds = dict(
        rows.filter(status=OK).group_by("label").agg(pl.col("seconds_edit").median()).iter_rows()
    )
    before = next((row for row in of_label.values() if row["editor"] == "none"), None)
    best = {
        name: max((r[name] for r in of_label.values() if _is_edited(r, name)), default=None)
        for name in (score, *shown)
        if not is_in_bits(name)
    }
    lines = [
        _line(of_label[label], score, shown, best, before, counted.get(label, {}), seconds)
        for label in [*order, *(label for label in of_label if label not in order)]
    ]
    for rank, line in enumerate((line for line in lines if not line["unedited"]), 1):
        line["rank"] = rank
    return Board(
        score,
        [{"name": n, "meaning": METRICS[n].meaning, "unit": METRICS[n].unit} for n in shown],
        {
            name: short
            for name, short in _COUNTED.items()
            if any(line["counts"][name] for line in lines)
        },
        lines,
        before[score] if before else None,
    )


def _is_edited(row: Mapping[str, Any], name: str) -> bool:
    return row["editor"] != "none" and row[name] is not None


def _line(
    row: Mapping[str, Any],
    score: str,
    shown: Sequence[str],
    best: Mapping[str, float | None],
    before: Mapping[str, Any] | None,
    counted: Mapping[str, int],
    seconds: Mapping[str, float | None],
) -> dict[str, Any]:
    unedited = row["editor"] == "none"
    paper = published(dict(row))

    def cell(name: str) -> dict[str, Any]:
        value = row[name]
        moved = before is not None and not unedited and value is not None and before[name]
        return {
            "text": on_screen(name, value),
            "value": value,
            "share": None if value is None or is_in_bits(name) or name == score == "S" else value,
            "best": not unedited and value is not None and value == best.get(name),
            "paper": on_screen(name, paper[name]) if name in paper else "",
            "change": f"{change(value, moved):+z.0f} %" if moved and is_in_bits(name) else "",
        }

    return {
        "label": row["label"],
        "unedited": unedited,
        "rank": None,
        "score": cell(score) | {"low": row[f"{score}_low"], "high": row[f"{score}_high"]},
        "cells": {name: cell(name) for name in shown},
        "seconds": None if unedited else seconds.get(row["label"]),
        "counts": {name: counted.get(name, 0) for name in _COUNTED},
        "n": row["n"],
    }


def records_link(label: str, failure: str) -> str:
    """Where the page's browser shows the records in which an editor has a failure."""
    return "#records?" + urlencode({"editor": label, "failure": failure})


def verdict(table: Board, pairs: pl.DataFrame) -> list[list[Said]]:
    """Two sentences: who is best and what of it holds; what it writes, keeps and breaks.

    Of chains only the checkpoints after the most edits, since fewer edits are easier.
    """
    edited = [
        row for row in table.rows if not row["unedited"] and row["score"]["value"] is not None
    ]
    if not edited:
        return []
    most = max(_edits(row) for row in edited)
    first, *others = (row for row in edited if _edits(row) == most)
    after = [Said(f"After {most:,} edits ")] if most else []
    return [[*after, *_lead(table, first, others, pairs)], list(_cost(table, first))]


def _edits(row: Mapping[str, Any]) -> int:
    """The edits of a checkpoint; 0 for any other row."""
    found = re.search(AT, row["label"])
    return int(found[1]) if found else 0


def _lead(
    table: Board, first: Mapping[str, Any], others: Sequence[Mapping[str, Any]], pairs: pl.DataFrame
) -> Iterator[Said]:
    score = first["score"]
    yield Said(first["label"], strong=True)
    yield Said(f" has the best {table.score}" if others else f" has {table.score}")
    yield Said(f", {score['text']}" if others else f" {score['text']}")
    if score["low"] is not None:
        yield Said(f" (95 % {score['low']:.1f} to {score['high']:.1f})")
    against = others[0]["label"] if others else UNEDITED
    if others:
        yield Said(f"; next is {against} with {others[0]['score']['text']}")
    elif table.unedited is not None:
        yield Said(f", against {on_screen(table.score, table.unedited)} unedited")
    found = (
        pairs.filter(pl.col("a") == first["label"], pl.col("b") == against) if len(pairs) else pairs
    )
    rates = [row for row in found.to_dicts() if row["metric"] in (*SUCCESSES, *table_of("zsre"))]
    if rates:
        holds = [
            f"{row['metric']} ({on_screen(row['metric'], row['difference'], '+')})"
            for row in rates
            if row["p_holm"] < ALPHA
        ]
        yield Said(". Of the differences to it ")
        yield Said(f"{_listed(holds)} {'hold' if len(holds) > 1 else 'holds'} ")
        yield Said("after Holm's correction", "#differences")
    yield Said(".")


def _cost(table: Board, first: Mapping[str, Any]) -> Iterator[Said]:
    cells = first["cells"]
    before = next((row for row in table.rows if row["unedited"]), None)
    learnt, kept = ("ES", "NS") if "ES" in cells else ("efficacy", "specificity")
    yield Said(f"It writes {cells[learnt]['text']} % of facts ({learnt})")
    if kept in cells:
        yield Said(f" and keeps {cells[kept]['text']} % of neighbours ({kept})")
        if before is not None:
            yield Said(f" against {before['cells'][kept]['text']} % unedited")
    yield Said("; ")
    yield from _counted(first, "F2: bleeds over to neighbors")
    yield Said(" bleed over, ")
    yield from _counted(first, "broken text")
    yield Said(" break the text.")


def _counted(row: Mapping[str, Any], failure: str) -> Iterator[Said]:
    count = row["counts"][failure]
    href = records_link(row["label"], failure) if count else ""
    yield Said(f"{count or 'none'} of {row['n']} edits", href)


def _listed(words: Sequence[str]) -> str:
    if not words:
        return "none"
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else words[0]
