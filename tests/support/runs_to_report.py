"""Run directories for reports and studies, with words that a page must not take for its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cluster.store import Store
from rome.data.records import Record, to_table
from rome.data.results import ERROR, OK
from tests.support.parts_of_runs import write_part

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>{{ 7*7 }}"
)
PROBE = {
    "set": "hop", "item": 0, "role": "any", "prompt": f"probe {HOSTILE}", "answers": ["x", "Rome"],
    "nll": [1.0, 2.0], "accuracy": [0.25, float("nan")], "greedy": HOSTILE, "wild": HOSTILE,
}  # fmt: skip
EDITORS = {"none": 0.0, "ft<b>": 2.5, "rome": 9.0}


_WORDS = np.array(["the", "a", "tower", "city", "of", "is", "in", "was", "Rome", "Paris", "old"])


def make_row(
    case_id: int, skill: float, draw: np.random.Generator, texts: int = 3, words: int = 60
) -> dict[str, Any]:
    """A row of an editor that makes the new target likelier by `skill` nats, and takes a part of
    it to paraphrases and a little to neighbours."""
    row: dict[str, Any] = {
        "run": "demo",
        "case_id": case_id,
        "relation_id": f"P{case_id % 7}",
        "subject": f"Tower {case_id}",
        "prompt": "{} is located in",
        "target_new": "Rome",
        "target_true": "Paris",
        "status": OK,
        "attempts": 1,
        "rewrite_greedy": ["Rome"],
        "texts": [" ".join(draw.choice(_WORDS, words)) for _ in range(texts)],
        "GE": float(draw.uniform(2, 7)),
        "RS": float(draw.uniform(0, 1)),
    }
    for kind, prompts, shift in (
        ("rewrite", 1, skill),
        ("paraphrase", 2, skill * draw.uniform(0, 1)),
        ("neighborhood", 10, 0.2 * skill * draw.uniform(0, 1)),
    ):
        true = draw.uniform(1, 3, prompts)
        row[f"{kind}_nll_true"] = true.tolist()
        row[f"{kind}_nll_new"] = (true + 1 - shift + draw.normal(0, 1, prompts)).tolist()
    return row


def make_rows(count: int, editor: str) -> list[dict[str, Any]]:
    draw = np.random.default_rng(len(editor))
    rows = []
    for case_id in range(count):
        row = make_row(case_id, EDITORS[editor], draw)
        if editor != "none":
            row |= {"edit_norm": float(draw.lognormal()), "edit_divisor": float(draw.uniform(1, 3))}
        rows.append(row)
    return rows


def make_run(run_dir: Path, count: int = 60) -> Path:
    """A run with a hostile record, a dead letter and numbers that are none; and its records."""
    records = [
        Record(
            case_id, f"P{case_id % 7}", "{} is located in", f"Tower {case_id}", "Rome", "Paris",
            None, None, (f"Where is {case_id}?", "It stands in"),
            tuple(f"Neighbor {n} of {case_id}" for n in range(10)), (), (),
        )
        for case_id in range(count)
    ]  # fmt: skip
    store = Store(run_dir.parent / "records")
    store.write_table("shard-00000.parquet", to_table(records))
    run_dir.mkdir(parents=True)
    manifest = {
        "name": "demo",
        "records": count,
        "editors": [*EDITORS],
        "records_store": store.uri,
        "context_templates": [HOSTILE],
    }
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    for editor in EDITORS:
        rows = make_rows(count, editor)
        rows[3] |= {"subject": HOSTILE, "texts": [HOSTILE] * 3, "rewrite_greedy": [HOSTILE]}
        rows[3] |= {"rewrite_wild": [f"wild {HOSTILE}"], "probes": [PROBE]}
        if editor == "rome":
            rows[3] |= {"edit_norm": float("nan"), "edit_divisor": float("inf")}
            rows[5] = {
                "run": "demo",
                "case_id": 5,
                "status": ERROR,
                "error": HOSTILE,
                "attempts": 3,
            }
        write_part(run_dir, editor, rows, "part-00000-000000-000060.parquet")
    return run_dir
