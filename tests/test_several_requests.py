"""Records of several requests, as MQuAKE has them: one model with all of their edits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.store import Store
from jobs.inputs.record_stores import prepare
from jobs.inputs.sources import load
from jobs.tasks.training import examples_of
from rome.data import rows as rows_of
from rome.data.probes import Probe
from rome.data.records import from_table, to_table
from rome.edits.deltas import DenseDelta, Edit, written
from rome.edits.grouping import Grouping
from rome.edits.sequences import grouped
from rome.edits.several import edit_records
from rome.evaluation import evaluate
from rome.models import EditableModel
from rome.scoring.settings import ScoringSettings
from tests.support import tiny
from tests.support.commands import command
from tests.support.computations import few_steps_editor


def request(subject: str, new: str, true: str) -> dict[str, Any]:
    return {"prompt": "{} is in", "subject": subject, "relation_id": "P1",
            "target_new": {"str": new, "id": "Q1"}, "target_true": {"str": true, "id": "Q2"},
            "question": f"Where is {subject}?"}  # fmt: skip


def hop(question: str, answer: str, *aliases: str) -> dict[str, Any]:
    return {"question": question, "cloze": "", "answer": answer, "answer_alias": [*aliases]}


ROW: dict[str, Any] = {
    "case_id": 7,
    "requested_rewrite": [request("Rome", "Japan", "Italy"), request("Paris", "Italy", "France")],
    "questions": ["Where is it?", "It is where?", "And where?"],
    "answer": "Italy",
    "answer_alias": [],
    "new_answer": "Japan",
    "new_answer_alias": ["Nippon"],
    "single_hops": [hop("Where is Rome?", "Italy")],
    "new_single_hops": [hop("Where is Rome?", "Japan", "Nippon"), hop("Where is Paris?", "Italy")],
    "orig": {"triples": [["Q1", "P1", "Q2"]]},
}


def test_mquake_is_read_with_the_papers_three_accuracies() -> None:
    record = rows_of.from_row(ROW, 0)
    assert [(one.subject, one.target) for one in record.requests] == [
        ("Rome", "Japan"),
        ("Paris", "Italy"),
    ]
    assert record.probes == (
        Probe("edit_wise", 0, "Rome is in", ("Japan",)),
        Probe("edit_wise", 1, "Paris is in", ("Italy",)),
        Probe("instance_wise", 0, "Where is Rome?", ("Japan", "Nippon"), "all"),
        Probe("instance_wise", 0, "Where is Paris?", ("Italy",), "all"),
        *(Probe("multi_hop", 0, text, ("Japan", "Nippon")) for text in ROW["questions"]),
    )
    assert from_table(to_table([record])) == [record]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requested_rewrite": []}, "at least one request"),
        ({"requested_rewrite": [request("Rome", "a", "b"), 3]}, r"requested_rewrite\[1\] must be"),
        ({"requested_rewrite": [request("Rome", "a", "b") | {"target_new": "a"}]},
         r"requested_rewrite\[0\].target_new must be a mapping"),
        ({"questions": "Where?"}, "questions must be a list"),
        ({"new_answer": None}, "new_answer must be a text"),
        ({"new_single_hops": [{"question": ""}]}, r"new_single_hops\[0\].question must be text"),
        ({"fifth": ["x"]}, "the key 'fifth' is not read"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "m.json").write_text(json.dumps([ROW | {"case_id": 8} | changes]))
    (said,) = load(str(tmp_path / "m.json")).invalid
    assert "m.json, row 1 (case_id 8): " in said
    assert "(in MQuAKE's format)" in said
    with pytest.raises(ValueError, match=message):
        raise ValueError(said)


def logits(model: EditableModel, edit: Edit) -> torch.Tensor:
    with written(model, edit):
        return model.hf(torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize("kind", ["memit", "rome", "ft"])
def test_the_requests_of_a_record_edit_one_model(kind: str) -> None:
    """Together where the editor can, else one after another."""
    model = tiny.model("gpt2")
    editor = few_steps_editor(model, kind)
    several = rows_of.from_row(ROW, 0)
    single = replace(several, further=(), probes=())
    first, both, again = edit_records(model, editor, [single, several, single])
    (alone,) = editor.edit([several.request])
    assert torch.equal(logits(model, first), logits(model, again))
    assert tiny.close(logits(model, first), logits(model, alone))
    if kind == "memit":
        expected = editor.edit_together(several.requests)
    else:
        expected = grouped(model, editor, Grouping(sequence=2)).edit(several.requests)[-1]
    assert tiny.close(logits(model, both), logits(model, expected))
    assert not tiny.close(logits(model, both), logits(model, first))
    assert both.request == several.requests[-1]


def test_in_a_group_all_requests_of_all_records_are_the_groups() -> None:
    model = tiny.model("gpt2")
    editor = few_steps_editor(model, "ft")
    several = rows_of.from_row(ROW, 0)
    records = [several, replace(several, further=())]
    found = edit_records(model, grouped(model, editor, Grouping(sequence=2)), records)
    requests = [*several.requests, several.request]
    expected = grouped(model, editor, Grouping(sequence=3)).edit(requests)
    assert tiny.close(logits(model, found[0]), logits(model, expected[-1]))
    assert found[0].request == several.requests[-1]
    assert {type(d) for d in found[1].deltas.values()} == {DenseDelta}


def test_each_request_is_scored_with_its_own_targets() -> None:
    model = tiny.model("gpt2")
    record = rows_of.from_row(ROW, 0)
    turned = replace(record, prompt="{} is in", subject="Paris", target_new="Italy",
                     target_true="France", further=(record.request,))  # fmt: skip

    class Nothing:
        def edit(self, requests: Any) -> Any:
            return [Edit(one) for one in requests]

    settings = ScoringSettings(generation=None)
    rows, _ = evaluate(model, Nothing(), [record, turned], settings, None, 300)
    for name in ("rewrite_nll_new", "rewrite_nll_true", "rewrite_accuracy"):
        assert rows[0][name] == pytest.approx(rows[1][name][::-1], rel=1e-9)
        assert len(rows[0][name]) == 2
    assert [one["subject"] for one in rows[0]["further"]] == ["Paris"]
    assert len(rows[0]["probes"]) == 7


def test_examples_of_ones_own_stand_before_the_questions_of_a_set(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps([ROW]))
    shots = tmp_path / "shots.yaml"
    shots.write_text('multi_hop: "Q: Who?\\nA: He\\n\\nQ: {}\\nA:"\n')
    prepare(str(tmp_path / "m.json"), str(tmp_path / "out"), probe_templates=str(shots))
    (record,) = from_table(Store(tmp_path / "out").read_table("shard-00000.parquet"))
    plain = rows_of.from_row(ROW, 0)
    assert record.probes[:4] == plain.probes[:4]
    assert [one.prompt for one in record.probes[4:]] == [
        f"Q: Who?\nA: He\n\nQ: {text}\nA:" for text in ROW["questions"]
    ]
    for text, message in (("multi_hop: Q\n", "exactly one '{}'"), ("hop: '{}'\n", "unknown probe")):
        shots.write_text(text)
        with pytest.raises(ValueError, match=message):
            prepare(str(tmp_path / "m.json"), str(tmp_path / "o"), probe_templates=str(shots))


def test_each_request_is_an_example_to_train_on(tmp_path: Path) -> None:
    several = replace(
        rows_of.from_row(ROW, 0),
        paraphrase_prompts=("Whose is it?",),
        neighborhood_prompts=("Lyon is in",),
        neighborhood_targets=("France",),
    )
    single = replace(several, case_id=1, further=())
    store = Store(tmp_path)
    store.write_table("shard-00000.parquet", to_table([several, single]))
    found = examples_of(store, skip=0)
    assert [one.request for one in found] == [*several.requests, single.request]
    assert [one.rephrased for one in found] == [("Whose is it?",), (), ("Whose is it?",)]
    assert {one.local for one in found} == {(("Lyon is in", "France"),)}


def test_a_chain_with_checkpoints_takes_no_record_of_several_requests(tmp_path: Path) -> None:
    model = tiny.model("gpt2", "float32")
    tiny.save(model, tmp_path / "model")
    (tmp_path / "m.json").write_text(json.dumps([ROW]))
    prepare(str(tmp_path / "m.json"), str(tmp_path / "records"))
    chain = {"sequence": 1, "checkpoints": [1], "layer": 0, "steps": 1}
    run = {
        "name": "several",
        "model": {"name": "tiny", "source": str(tmp_path / "model"), "dtype": "float32"},
        "benchmark": str(tmp_path / "records"),
        "editors": {"ft": chain},
        "scoring": {"generation": None},
        "templates": {"texts": ["{}"]},
        "workers": {"workers": 0},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    status, text = command("evaluate", tmp_path / "run.yaml", "--out", tmp_path / "run")
    assert status == 3, text
    assert "a chain with checkpoints takes no record with several requests, as case 7 is" in text
