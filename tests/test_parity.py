"""Parity with the released code of the ROME paper, run on SmolLM2-135M in float32.

Its inputs and outputs lie beside the repository; see the README there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from rome import second_moment
from rome.analysis.summary import summarize
from rome.data import rows as rows_of
from rome.data.records import Record, Request
from rome.data.results import OK, RESULT_SCHEMA
from rome.editors import values
from rome.editors.rome import Rome, RomeSettings
from rome.editors.values import Value
from rome.edits.deltas import Edit
from rome.scoring.probabilities import score_records
from tests.support import oracle, tiny
from tests.support.hyperparameters import value_settings
from tests.support.tiny import relative

REFERENCE = Path(__file__).parents[2] / "shared" / "data" / "reference"
LAYER = 6
BUDGET = 1000

pytestmark = [
    pytest.mark.skipif(
        not REFERENCE.is_dir(), reason="the reference's outputs are not beside the repository"
    ),
    pytest.mark.model,
]


def read(name: str) -> Any:
    return json.loads((REFERENCE / name).read_text())


@dataclass
class Ours:
    """What this project computes for one record; `post` are its scores after the edit."""

    record: Record
    edit: Edit
    value: Value
    post: Mapping[str, list[float]]


Outcomes = dict[str, dict[int, Ours]]  # By folder and case.
Scores = Mapping[str, list[float]]
Before = dict[int, Scores]


def compute(records: list[Record], settings: RomeSettings) -> dict[int, Ours]:
    model = tiny.smollm2()
    solver = second_moment.load(REFERENCE / "second_moment_layer6.safetensors")[0].solver()
    order: list[Request] = []
    found: list[Value] = []
    edit_batch, optimise = Rome._edit, values.optimise

    def ordered(self: Rome, requests: Sequence[Request], *args: Any) -> list[Edit]:
        order.extend(requests)
        return edit_batch(self, requests, *args)

    def remembered(*args: Any) -> list[Value]:
        batch = optimise(*args)
        found.extend(batch)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rome, "_edit", ordered)
        patch.setattr(values, "optimise", remembered)
        editor = Rome(model, settings, read("context_templates.json"), solver, BUDGET)
        edits = editor.edit([record.request for record in records])
    post = score_records(model, records, edits, BUDGET)
    value_of = dict(zip(order, found, strict=True))
    rows = zip(records, edits, (value_of[r.request] for r in records), post, strict=True)
    return {row[0].case_id: Ours(*row) for row in rows}


@pytest.fixture(scope="module")
def pre() -> Before:
    """Scores of the unedited model on all records."""
    records = [rows_of.from_counterfact(row) for row in read("ten_records.json")["records"]]
    edits = [Edit(record.request) for record in records]
    columns = score_records(tiny.smollm2(), records, edits, BUDGET)
    return {record.case_id: row for record, row in zip(records, columns, strict=True)}


@pytest.fixture(scope="module")
def ours() -> Iterator[Outcomes]:
    """Our outcomes for each folder of cases; `default` has all records of ten_records.json too."""
    outcomes = {}
    for folder in ("default", "early_stop", "clamped"):
        settings = read(f"{folder}/cases.json")["hparams"]
        rows = {row["case_id"]: row for row in read(f"{folder}/records.json")}
        if folder == "default":
            rows |= {row["case_id"]: row for row in read("ten_records.json")["records"]}
        value = value_settings(settings)
        records = [rows_of.from_counterfact(row) for row in rows.values()]
        outcomes[folder] = compute(records, RomeSettings(LAYER, value))
    yield outcomes
    tiny.smollm2.cache_clear()


CASES = pytest.mark.parametrize(
    ("folder", "case_id"),
    [("default", case_id) for case_id in (0, 3, 5, 13, 18)]
    + [("early_stop", 0), ("early_stop", 3), ("clamped", 0)],
)


def case(folder: str, case_id: int) -> dict[str, Any]:
    (found,) = [c for c in read(f"{folder}/cases.json")["cases"] if c["case_id"] == case_id]
    return dict(found)


@CASES
def test_vectors(ours: Outcomes, folder: str, case_id: int) -> None:
    one = ours[folder][case_id]
    theirs = load_file(REFERENCE / folder / f"case_{case_id}.safetensors")
    delta = oracle.rank_one(one.edit)
    left_D, right_K = delta.left_DR[:, 0], delta.right_KR[:, 0]
    pairs = {
        "u": (right_K, theirs["u"]),
        "delta": (one.value.delta_D, theirs["delta"]),
        "target_init": (one.value.initial_D, theirs["target_init"]),
        "target": (one.value.initial_D + one.value.delta_D, theirs["target"]),
        "update": (
            torch.outer(left_D, right_K),
            torch.outer(theirs["right_vector"], theirs["u"]),
        ),
    }
    errors = {name: relative(mine, other) for name, (mine, other) in pairs.items()}
    assert max(errors.values()) < 1e-4, errors


@CASES
def test_steps(ours: Outcomes, folder: str, case_id: int) -> None:
    one, theirs = ours[folder][case_id], case(folder, case_id)
    losses = [step["loss"] for step in theirs["steps"]]
    assert len(losses) == theirs["n_steps"]
    assert one.edit.health["steps"] == theirs["n_steps"]
    assert one.value.losses == pytest.approx(losses, abs=1e-3)
    assert one.edit.health["divisor"] == pytest.approx(theirs["division_factor"], rel=1e-4)
    assert (one.edit.health["clamp_hits"] > 0) == (folder == "clamped")


@CASES
def test_probabilities_of_cases(ours: Outcomes, pre: Before, folder: str, case_id: int) -> None:
    one, theirs = ours[folder][case_id], case(folder, case_id)
    for mine, phase in ((pre[case_id], "pre"), (one.post, "post")):
        checked = 0
        for kind in ("rewrite", "paraphrase", "neighborhood", "attribute"):
            for target in ("new", "true"):
                rows = theirs[phase].get(f"{kind}_prompts_probs", [])
                expected = [row[f"target_{target}"] for row in rows]
                if expected:
                    assert mine[f"{kind}_nll_{target}"] == pytest.approx(expected, abs=1e-3)
                checked += len(expected)
        assert checked >= 2 * (1 + 2 + 10)


def test_probabilities_of_ten_records(ours: Outcomes, pre: Before) -> None:
    for row in read("ten_records.json")["rows"]:
        case_id = row["case_id"]
        after = ours["default"][case_id].post
        for mine, phase in ((pre[case_id], "pre"), (after, "post")):
            for kind in ("rewrite", "paraphrase", "neighborhood", "attribute"):
                pairs = row[phase][f"{kind}_prompts_probs"]
                for target, expected in zip(("new", "true"), zip(*pairs, strict=True), strict=True):
                    assert mine[f"{kind}_nll_{target}"] == pytest.approx(list(expected), abs=1e-3)


@pytest.mark.parametrize("phase", ["pre", "post"])
def test_summary_of_ten_records(ours: Outcomes, pre: Before, phase: str) -> None:
    theirs = read("ten_records.json")
    ids = [row["case_id"] for row in theirs["records"]]
    scores = pre if phase == "pre" else {i: ours["default"][i].post for i in ids}
    rows = pl.DataFrame(
        [{"run": "r", "case_id": i, "status": OK, **scores[i]} for i in ids]
    ).with_columns(
        *(pl.lit(None, pl.Float64).alias(name) for name in ("GE", "RS")),
        *(pl.lit("-").alias(name) for name in ("benchmark", "model", "editor")),
        pl.lit(None, pl.String).alias("relation_id"),
    )
    assert set(rows.columns) - {"benchmark", "model", "editor"} <= set(RESULT_SCHEMA.names)
    (summary,) = summarize(rows.lazy()).to_dicts()
    assert summary["n"] == len(ids) == 10
    for name, expected in theirs["summary"][phase].items():
        # The reference prints magnitudes with one digit.
        tolerance = 0.05 if name in ("EM", "PM", "NM") else 0.005
        assert summary[name] == pytest.approx(expected, abs=tolerance + 1e-9), name
