"""QAEdit as a benchmark, and WILD: what the model says in at most so many tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cluster.store import Store
from jobs.inputs.record_stores import prepare
from jobs.inputs.sources import load
from rome.analysis.summary import summarize
from rome.data import answers
from rome.data import rows as rows_of
from rome.data.records import from_table
from rome.data.results import OK, RESULT_SCHEMA
from rome.data.wording import in_form
from rome.editors import Unedited
from rome.evaluation import evaluate
from rome.scoring.settings import ScoringSettings, WildSettings
from tests.support import oracle, tiny
from tests.support.computations import random_edits
from tests.support.oracle import changed

ROW: dict[str, Any] = {
    "id": 5,
    "source": "SQA",
    "prompt": "Which tower is the Tokyo Tower?",
    "target": " The red one ",
    "subject": "Tokyo Tower",
    "rephrase": "What is the Tokyo Tower?",
    "locality": [
        {"loc": "where is rome", "loc_ans": "Italy"},
        {"loc": "who was born in Ljubljana", "loc_ans": "Žižek"},
    ],
}


def write(path: Path, rows: list[Any]) -> str:
    path.write_text(json.dumps(rows), "utf-8")
    return str(path)


def test_ids_that_are_not_unique_are_kept_beside_ones_that_are(tmp_path: Path) -> None:
    source = write(tmp_path / "qa.json", [ROW, ROW | {"prompt": "A Tokyo Tower is?"}])
    prepare(source, str(tmp_path / "out"))
    records = from_table(Store(tmp_path / "out").read_table("shard-00000.parquet"))
    assert [(r.case_id, r.original_id) for r in records] == [(0, "5"), (1, "5")]
    assert records[0].target_new == "The red one"
    assert records[0].neighbors == (
        ("where is rome", "Italy"),
        ("who was born in Ljubljana", "Žižek"),
    )


@pytest.mark.parametrize(
    ("prompt", "subject", "found"),
    [
        ("who found cells that make cells?", "cells", "who found cells that make {}?"),
        ("'tandoori' is of a tandoor. What is a tandoor ?", "tandoor",
         "'tandoori' is of a tandoor. What is a {} ?"),
        ("A cat is no category", "cat", "A {} is no category"),
        ("The category", "cat", "The {}egory"),
    ],
)  # fmt: skip
def test_the_last_place_of_the_subject_is_edited(prompt: str, subject: str, found: str) -> None:
    record = rows_of.from_row(ROW | {"prompt": prompt, "subject": subject}, 0)
    assert record.prompt == found
    assert record.request.text == prompt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subject": "Eve"}, "prompt must contain the subject 'Eve'"),
        ({"locality": "x"}, "locality must be a list"),
        ({"locality": [{"loc": "a"}]}, r"locality\[0\] must be {loc, loc_ans}"),
        ({"locality": [{"loc": "a", "loc_ans": None}]}, r"locality\[0\].loc_ans must be text"),
        ({"target": 3}, "target must be text"),
        ({"rephrase": None}, "rephrase must be text"),
        ({"portability": [{"q": 1}]}, "the key 'portability' is not read"),
        ({"probes": {"a b": []}}, "name of a probe set"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    found = load(write(tmp_path / "qa.json", [ROW, ROW | changes]))
    assert len(found.records) == 1
    (said,) = found.invalid
    assert "qa.json, row 2 (case_id 1): " in said
    assert "(in QAEdit's format)" in said
    with pytest.raises(ValueError, match=message):
        raise ValueError(said)


@pytest.mark.parametrize(
    ("text", "target", "right"),
    [
        (" The Eiffel Tower. It is in", "eiffel tower", True),
        (" Eiffel-Tower!", "EiffelTower", True),
        (" Paris\nQ: And Rome?", "Paris", True),
        (" Paris, France.", "Paris", False),
        (" St. Louis. And so on", "St. Louis", True),
        (" St. Paul", "St. Louis", False),
        (" 16:01.73 seconds. A", "16:01.73 seconds", True),
        (" The", "A", False),
        (" !", "?", False),
        ("", "Paris", False),
        ("\n\nParis.", "Paris", True),
    ],
)
def test_wild_takes_what_comes_before_a_stop(text: str, target: str, right: bool) -> None:
    assert answers.wild(text, [target]) is right
    assert answers.wild(text, ["something else", target]) is right


@pytest.mark.parametrize("form", ["plain", "qa"])
def test_wild_keeps_the_whole_greedy_text_of_each_prompt(form: str) -> None:
    model = tiny.model("gpt2")
    records = [rows_of.from_row(ROW, i) for i in range(3)]
    edits = random_edits(model)[:3]
    settings = ScoringSettings(generation=None, wild=WildSettings(form=form, max_tokens=9))

    class Fixed:
        def edit(self, requests: Any) -> Any:
            return edits

    rows, _ = evaluate(model, Fixed(), records, settings, None, 200)
    for row, edit in zip(rows, edits, strict=True):
        for i, (prompt, _) in enumerate(records[0].neighbors):
            asked = f"Please answer the question:\n\nQ: {prompt}\nA:" if form == "qa" else prompt
            ids = list(model.encode([asked])[0].ids)
            said: list[int] = []
            with changed(model, edit):
                for _ in range(9):
                    said.append(int(oracle.log_probabilities(model, ids + said)[-1].argmax()))
            assert row["neighborhood_wild"][i] == model.tokenizer.decode(said)
        assert row["wild_form"] == form
        assert len(row["rewrite_wild"]) == len(row["paraphrase_wild"]) == 1
    assert in_form(records[0], "qa").prompt.count("{}") == 1


def test_the_table_has_three_protocols_of_one_run() -> None:
    model = tiny.model("gpt2")
    record = rows_of.from_row(ROW, 0)
    settings = ScoringSettings(generation=None, wild=WildSettings(max_tokens=4))
    rows, _ = evaluate(model, Unedited(), [record], settings, None, 500)
    rows[0] |= {
        "run": "r", "status": OK, "attempts": 1,
        "neighborhood_greedy": ["Italy.", "italy"], "neighborhood_wild": ["ITALY. So", "Žižek is"],
        "rewrite_wild": [" red one\nand"],
    }  # fmt: skip
    frame = pl.DataFrame(rows, schema=pl.from_arrow(RESULT_SCHEMA.empty_table()).schema)  # type: ignore[union-attr]
    named = {name: pl.lit(name) for name in ("benchmark", "model", "editor")}
    summary = summarize(frame.lazy().with_columns(**named)).to_dicts()[0]
    assert (summary["NS_strict"], summary["NS_wild"], summary["ES_wild"]) == (50, 50, 100)
    assert summary["PS_wild"] == 0
    assert len(rows[0]["neighborhood_accuracy"]) == 2
    assert summary["specificity"] is not None
    assert summary["ES"] is None
