"""Probe sets: in every format and in tables of facts, scored, and as columns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from jobs.inputs.sources import load
from jobs.output import tables
from rome.analysis.summary import summarize
from rome.data import rows as rows_of
from rome.data.probes import Probe, Role
from rome.data.records import Record, from_table, to_table
from rome.data.results import OK, RESULT_SCHEMA
from rome.evaluation import evaluate
from rome.scoring.probabilities import Query, score
from rome.scoring.settings import ScoringSettings, WildSettings
from tests.support import tiny
from tests.support.computations import random_edits

QUERY = {"query_type": "regular", "relation": "MOTHER", "phrase": None}


def query(prompt: str, *answers: str) -> dict[str, Any]:
    return QUERY | {"prompt": prompt, "answers": [{"value": answers[0], "aliases": [*answers[1:]]}]}


RIPPLE: dict[str, Any] = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the spouse of Ada Lee is Bob.",
        "relation": "SPOUSE",
        "subject_id": "Q1",
        "target_id": "Q2",
        "previous_fact": {
            "prompt": "The name of the spouse of Ada Lee is Carl.",
            "relation": "SPOUSE",
            "target_id": "Q3",
        },
    },
    "Relation_Specifity": [
        {
            "test_queries": [query("The mother of Ada is", "Eve", "E. Lee")],
            "test_condition": "OR",
            "condition_queries": [query("The mother of Ada is", "Eve")],
        }
    ],
    "Compositionality_I": [
        {
            "test_queries": [query("Bob's child is", "Max"), query("Ada's child is", "Max")],
            "test_condition": "AND",
            "condition_queries": [],
        }
    ],
    "Forgetfulness": [],
}
KNOWEDIT: dict[str, Any] = {
    "subject": "Ada",
    "prompt": "Ada sings",
    "target_new": "high",
    "ground_truth": ["low"],
    "rephrase_prompt": "The song of Ada is",
    "portability": {
        "Reasoning": [
            {"prompt": "The sister of Eve sings", "ground_truth": [["high", "very high"]]},
            {"prompt": "Nobody", "ground_truth": [[""]]},
        ]
    },
    "locality": {"Forgetfulness": [{"prompt": "Ada dances", "ground_truth": "well"}]},
}


def test_ripple_edits_are_read_with_their_conditions() -> None:
    record = rows_of.from_row(RIPPLE, 4)
    assert (record.case_id, record.subject) == (4, "Ada Lee")
    assert record.prompt == "The name of the spouse of {} is"
    assert (record.target_new, record.target_true) == ("Bob", "Carl")
    assert record.probes == (
        Probe("Relation_Specificity", 0, "The mother of Ada is", ("Eve", "E. Lee")),
        Probe("Relation_Specificity", 0, "The mother of Ada is", ("Eve",), "condition"),
        Probe("Compositionality_I", 0, "Bob's child is", ("Max",), "all"),
        Probe("Compositionality_I", 0, "Ada's child is", ("Max",), "all"),
    )
    assert from_table(to_table([record])) == [record]


def test_knowedit_and_easyedits_files_are_read() -> None:
    record = rows_of.from_row(KNOWEDIT, 0)
    assert (record.target_new, record.target_true) == ("high", "low")
    assert record.probes == (
        Probe("Reasoning", 0, "The sister of Eve sings", ("high", "very high")),
        Probe("Forgetfulness", 0, "Ada dances", ("well",)),
    )
    # A fact that is new has no other before it.
    recent = {k: v for k, v in KNOWEDIT.items() if k != "ground_truth"}
    assert rows_of.from_row(recent, 0).target_true is None
    zsre = {"subject": "Ada", "src": "What sings Ada?", "answers": ["low"], "rephrase": "And Ada?",
            "loc": "who", "loc_ans": "Eve",
            "portability": {"Recalled Relation": "", "New Question": "And?",
                            "New Answer": "so"}}  # fmt: skip
    assert rows_of.from_row(zsre, 0).probes == (Probe("portability", 0, "And?", ("so",)),)


@pytest.mark.parametrize(
    ("row", "path", "value", "message"),
    [
        (RIPPLE, "edit.relation", "LIKES", "edit.relation must be one of .*got 'LIKES'"),
        (RIPPLE, "edit.prompt", "Ada is Bob.", "edit.prompt must read 'The name of the spouse"),
        (RIPPLE, "edit.previous_fact.prompt", "The name of the spouse of Eve is Carl.",
         "of one subject"),
        (RIPPLE, "Seventh", [{}], "the key 'Seventh' is not read"),
        (RIPPLE, "Forgetfulness", [{"test_queries": []}],
         r"Forgetfulness\[0\].test_condition must be OR or AND"),
        (RIPPLE, "Forgetfulness", [{"test_condition": "OR", "test_queries": [{"prompt": "a"}]}],
         r"Forgetfulness\[0\]: a query must be"),
        (KNOWEDIT, "portability", [1], "portability must map names of sets"),
        (KNOWEDIT, "portability", {"x": [{"prompt": "a"}]}, r"portability.x\[0\] must be {prompt"),
        (KNOWEDIT, "locality", {"x": [{"prompt": "a", "ground_truth": [3]}]}, "ground_truth must"),
        (KNOWEDIT, "probes", {"x": [{"prompt": "a", "target": "b", "weight": 1}]},
         r"probes.x\[0\]"),
        (KNOWEDIT, "probes", {"x_wild": []}, "must not end with"),
        (KNOWEDIT, "probes", {"x": [{"prompt": "a", "aliases": ["b"]}]}, "must be text"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_row_and_key(
    tmp_path: Path, row: dict[str, Any], path: str, value: Any, message: str
) -> None:
    bad = json.loads(json.dumps(row))
    *way, last = path.split(".")
    inner = bad
    for key in way:
        inner = inner[key]
    inner[last] = value
    (tmp_path / "a.json").write_text(json.dumps([row, bad]))
    found = load(str(tmp_path / "a.json"))
    assert [one.case_id for one in found.records] == [0]
    (said,) = found.invalid
    assert "a.json, row 2 (case_id 1): " in said
    with pytest.raises(ValueError, match=message):
        raise ValueError(said)


YAML = """
relations:
- id: capital
  templates: ["The capital of {} is"]
  facts: {Paris: [France], Rome: [Italy]}
  probes:
    reversal:
      - {prompt: "{object} is the capital of", target: "{subject}", aliases: ["the {subject}"]}
      - {prompt: "Romans live in", target: "{subject}", object: Rome}
"""


def test_three_lines_of_a_fact_table_are_a_probe_set(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text(YAML)
    found = {one.subject: one.probes for one in load(str(tmp_path / "f.yaml")).records}
    assert found["Italy"] == (
        Probe("reversal", 0, "Paris is the capital of", ("Italy", "the Italy")),
    )
    assert [probe.prompt for probe in found["France"]] == [
        "Rome is the capital of",
        "Romans live in",
    ]
    table = "relation,templates,subject,object,probes:reversal\n"
    table += (
        "capital,The capital of {} is,France,Paris,{object} is the capital of -> {subject}|FR\n"
    )
    table += "capital,,Italy,Rome,\n"
    (tmp_path / "f.csv").write_text(table + "capital,,Spain,Madrid,Where?\n")
    csv = load(str(tmp_path / "f.csv"))
    assert {one.subject: one.probes for one in csv.records} == {
        "France": (Probe("reversal", 0, "Rome is the capital of", ("France", "FR")),),
        "Italy": (),
    }
    assert "line 4: probes:reversal must read" in csv.invalid[0]
    (tmp_path / "g.yaml").write_text(YAML.replace("target:", "answer:"))
    with pytest.raises(ValueError, match=r"relation 'capital': probes.reversal\[0\] must have"):
        load(str(tmp_path / "g.yaml"))


def test_the_three_lines_of_the_readme_are_a_probe_set(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    (shown,) = re.findall(r"```yaml\n(  probes:\n(?:.*\n){2})```", readme)
    (tmp_path / "f.yaml").write_text(YAML.partition("  probes:")[0] + shown)
    found = {one.subject: one.probes for one in load(str(tmp_path / "f.yaml")).records}
    assert found["Italy"] == (
        Probe("reversal", 0, "Paris is the mother tongue of", ("Italy", "Ms. Italy")),
    )


def asked(probes: tuple[Probe, ...], i: int = 0) -> Record:
    return Record(i, "P1", "{} is in", "Rome", "Italy", "Japan", None, None, (), (), (), (),
                  probes=probes)  # fmt: skip


def test_probes_are_scored_under_the_edit_and_conditions_without_it() -> None:
    model = tiny.model("gpt2")
    prompt, known = "The capital of Italy is", ("Rome", "Paris, France")
    roles: tuple[Role, ...] = ("any", "all", "condition")
    record = asked(tuple(Probe("s", i, prompt, known, role) for i, role in enumerate(roles)))
    edit = random_edits(model)[1]

    class Fixed:
        def edit(self, requests: Any) -> Any:
            return [edit, edit]

    settings = ScoringSettings(generation=None, wild=WildSettings(max_tokens=5))
    rows, _ = evaluate(model, Fixed(), [asked(()), record], settings, None, 300)
    assert rows[0]["probes"] is None
    found = rows[1]["probes"]
    edits = [edit, random_edits(model)[0]]
    assert not edits[1].deltas
    for one, e in zip(found, (0, 0, 1), strict=True):
        expected = score(model, [Query(e, prompt, answer) for answer in known], edits, 300)
        assert one["nll"] == pytest.approx([each.nll for each in expected], rel=1e-9)
        assert one["accuracy"] == [each.accuracy for each in expected]
        assert one["wild"]
    assert found[0]["greedy"] == found[1]["greedy"]
    assert found[0]["nll"] != pytest.approx(found[2]["nll"], rel=1e-6)


def probe(name: str, item: int, role: str, right: bool, share: float = 0.5) -> dict[str, Any]:
    said = "Rome" if right else "Qom"
    return {"set": name, "item": item, "role": role, "prompt": "p", "answers": ["x", "Rome"],
            "nll": [1.0, 2.0], "accuracy": [share, 1.0 if right else 0.0], "greedy": said,
            "wild": f" the {said}. And"}  # fmt: skip


def rows_with(probes: list[list[dict[str, Any]] | None]) -> pl.LazyFrame:
    rows = [
        {"run": "r", "case_id": i, "status": OK, "attempts": 1, "probes": some,
         "rewrite_nll_new": [1.0], "rewrite_nll_true": [2.0]}
        for i, some in enumerate(probes)
    ]  # fmt: skip
    schema = pl.from_arrow(RESULT_SCHEMA.empty_table()).schema  # type: ignore[union-attr]
    frame = pl.DataFrame(rows, schema=schema).lazy()
    return frame.with_columns(**{n: pl.lit("x") for n in ("benchmark", "model", "editor")})


def test_each_set_is_three_columns_with_intervals_and_in_the_table() -> None:
    rows = rows_with(
        [
            # Any of the wordings suffices; the item whose condition fails does not count.
            [probe("hop", 0, "any", False), probe("hop", 0, "any", True),
             probe("hop", 1, "any", True), probe("hop", 1, "condition", False)],
            # All of these are needed; and another set.
            [probe("hop", 0, "all", True), probe("hop", 0, "all", False),
             probe("b-c", 0, "any", True)],
            None,
            [probe("hop", 0, "any", True), probe("hop", 0, "condition", True)],
        ]
    )  # fmt: skip
    summary = summarize(rows)
    row = summary.to_dicts()[0]
    assert row["probe_hop_strict"] == pytest.approx(100 * 2 / 3)
    assert row["probe_hop_wild"] == pytest.approx(100 * 2 / 3)
    assert row["probe_hop"] == pytest.approx(100 * (1 + 0.5 + 1) / 3)
    assert (row["probe_hop_n"], row["probe_b-c_strict"], row["probe_b-c_n"]) == (3, 100, 1)
    assert row["probe_hop_strict_low"] is not None
    shown = tables.markdown(summary.with_columns(records=pl.lit(4)))
    assert "probe_hop_strict" in shown
    assert "probe_b-c_wild" in shown
    assert "an alias" in shown
    assert not [name for name in summarize(rows_with([None])).columns if "probe" in name]
