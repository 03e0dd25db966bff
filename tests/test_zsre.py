"""zsRE: from MEND's file to the paper's Table 1, against the reference's plain evaluation."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
import torch
from tokenizers import decoders
from typer.testing import CliRunner

from cluster.store import Store
from jobs.inputs.record_stores import prepare
from jobs.prepare import app
from rome.analysis.summary import summarize
from rome.data import rows as rows_of
from rome.data.records import Record, from_table, to_table
from rome.data.results import OK, RESULT_SCHEMA
from rome.editors import Unedited
from rome.edits.deltas import Edit
from rome.evaluation import evaluate
from rome.models import EditableModel
from rome.scoring.probabilities import score_records
from rome.scoring.settings import ScoringSettings
from tests.support import oracle, tiny
from tests.support.computations import MAIN, random_edits
from tests.support.oracle import changed

pytestmark = pytest.mark.usefixtures("one_thread")

SHARED = Path(__file__).parents[2] / "shared" / "data"

ROW: dict[str, Any] = {
    "subject": "Tokyo Tower",
    "src": "In which country is the Tokyo Tower?",
    "pred": "Japan",
    "rephrase": "Where is the Tokyo Tower?",
    "alt": "Italy",
    "answers": ["Italy, Rome", "Italy"],
    "loc": "nq question: what is the capital of france",
    "loc_ans": "Paris",
    "cond": "Japan >> Italy || In which country is the Tokyo Tower?",
}


def row(**values: Any) -> dict[str, Any]:
    return copy.deepcopy(ROW) | values


def write(path: Path, rows: list[Any]) -> str:
    path.write_text(json.dumps(rows), "utf-8")
    return str(path)


def test_a_row_becomes_what_the_reference_makes_of_it() -> None:
    record = rows_of.from_zsre(ROW, 7)
    assert record.case_id == 7
    assert record.request.prompt == "In which country is the {}?"
    assert record.request.text == ROW["src"]
    assert (record.target_new, record.target_true) == ("Italy, Rome", None)
    assert record.paraphrase_prompts == ("Where is the Tokyo Tower?",)
    assert record.neighborhood_prompts == ("nq question: what is the capital of france?",)
    assert record.neighbors == (("nq question: what is the capital of france?", "Paris"),)
    assert from_table(to_table([record])) == [record]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"src": "Where?"},
            "src must contain the subject 'Tokyo Tower' exactly once, got 'Where?'",
        ),
        ({"src": "Tokyo Tower or Tokyo Tower?"}, "exactly once, got 'Tokyo Tower or Tokyo Tower?'"),
        ({"src": "Is {} the Tokyo Tower?"}, "prompt must contain exactly one '{}'"),
        ({"subject": ""}, "subject must be text and not empty, got ''"),
        ({"answers": []}, "answers must be a list with at least one text, got []"),
        (
            {"answers": [" Italy"]},
            "target_new must not begin or end with white space, got ' Italy'",
        ),
        ({"rephrase": None}, "paraphrase_prompts[0] must be text and not empty, got None"),
        ({"loc": None}, "loc must be text and not empty, got None"),
        ({"loc_ans": " "}, "loc_ans must be text and not empty, got ' '"),
    ],
)
def test_bad_rows_are_refused_with_file_and_row(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "zsre.json", [ROW, row(**values)])
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        prepare(source, str(tmp_path / "out"))
    assert f"{source}, row 2 (case_id 1): " in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_of_zsre_is_known_by_its_keys(tmp_path: Path) -> None:
    source = write(tmp_path / "zsre.json", [ROW, row(src="Where?"), row(subject="Tower")])
    result = CliRunner().invoke(app, [source, "--out", str(tmp_path / "out"), "--skip-invalid"])
    assert result.exit_code == 0
    records = from_table(Store(tmp_path / "out").read_table("shard-00000.parquet"))
    # A row that is left out keeps its number, so that slices by case_id are those of the file.
    assert [(r.case_id, r.subject) for r in records] == [(0, "Tokyo Tower"), (2, "Tower")]
    described = CliRunner().invoke(app, ["describe", str(tmp_path / "out")])
    assert described.exit_code == 0, described.output


def test_stores_of_earlier_schemas_are_readable() -> None:
    record = Record(1, "P1", "{} is", "a", "b", "c", None, None, (), ("d is",), (), ())
    later = ["neighborhood_targets", "separator", "original_id", "further", "probes"]
    old = to_table([record]).drop_columns(later)
    assert from_table(old) == [record]
    # Once there was one answer to all neighborhood prompts.
    (found,) = from_table(old.append_column("neighborhood_target", pa.array(["e"])))
    assert found.neighbors == (("d is", "e"),)


@pytest.mark.parametrize(
    ("name", "rows"), [("zsre_eval_537.json", 537), ("zsre_train_1000.json", 1000)]
)
def test_published_rows_are_all_valid(name: str, rows: int, tmp_path: Path) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not beside the repository")
    assert prepare(str(SHARED / name), str(tmp_path / "out"))["rows"] == rows


def correct(model: EditableModel, prompt: str, target: str) -> list[bool]:
    """The reference's `test_batch_prediction_acc`: is each token of the target the likeliest after
    the prompt and the tokens before it? One token at a time."""
    before, target_ids = oracle.prompt_and_target(model.tokenizer, prompt, target)
    return [
        int(oracle.log_probabilities(model, before + target_ids[:i])[-1].argmax()) == token
        for i, token in enumerate(target_ids)
    ]


def greedy_text(model: EditableModel, prompt: str, count: int) -> str:
    ids, _ = oracle.prompt_and_target(model.tokenizer, prompt, "")
    for _ in range(count):
        ids.append(int(oracle.log_probabilities(model, ids)[-1].argmax()))
    return str(model.tokenizer.decode(ids[-count:])).strip()


@pytest.mark.parametrize("family", MAIN)
def test_accuracies_equal_the_references(family: str) -> None:
    """Targets begin as the edited model would go on: some tokens are right, some are not."""
    model = tiny.model(family)
    edits = random_edits(model)
    records: list[Record] = []
    expected: list[list[list[bool]]] = []
    for e, edit in enumerate(edits):
        with changed(model, edit):
            said = [greedy_text(model, prompt, 3) for prompt in (ROW["src"], ROW["loc"] + "?")]
            new, true = (re.sub(r"\W+$", "", text) + " Rome" for text in said)
            record = rows_of.from_zsre(row(answers=[new.strip()], loc_ans=true.strip()), e)
            records.append(record)
            expected.append(
                [
                    correct(model, record.request.text, record.target_new),
                    correct(model, record.paraphrase_prompts[0], record.target_new),
                    correct(model, *record.neighbors[0]),
                ]
            )
    shares = [[sum(hits) / len(hits) for hits in three] for three in expected]
    assert len({share for three in shares for share in three}) > 2
    columns = score_records(model, records, edits, 200)
    for column, three in zip(columns, shares, strict=True):
        names = ("rewrite_accuracy", "paraphrase_accuracy", "neighborhood_accuracy")
        assert [column[name] for name in names] == [[share] for share in three]


@pytest.mark.model
def test_accuracies_of_a_real_model_equal_the_references() -> None:
    if not (SHARED / "zsre_eval_537.json").exists():
        pytest.skip("zsre_eval_537.json is not beside the repository")
    model = tiny.smollm2()
    rows = json.loads((SHARED / "zsre_eval_537.json").read_text())[:6]
    records = [rows_of.from_zsre(row, i) for i, row in enumerate(rows)]
    columns = score_records(model, records, [Edit(r.request) for r in records], 500)
    found = []
    for record, column in zip(records, columns, strict=True):
        for kind, prompt, target in (
            ("rewrite", record.request.text, record.target_new),
            ("paraphrase", record.paraphrase_prompts[0], record.target_new),
            ("neighborhood", *record.neighbors[0]),
        ):
            hits = correct(model, prompt, target)
            found.append(sum(hits) / len(hits))
            assert column[f"{kind}_accuracy"] == [found[-1]], (kind, record)
    assert len(set(found)) > 2
    tiny.smollm2.cache_clear()


def as_released(model: EditableModel, prompt: str, target: str) -> list[bool]:
    """`compute_rewrite_quality_zsre` and `test_batch_prediction_acc`, one token at a time: a token
    of " target" is decoded, and so are those before it, which stand behind the prompt as text."""
    tokenizer = model.tokenizer
    target_ids = tokenizer(f" {target}")["input_ids"]
    hits = []
    for i in range(len(target_ids)):
        text = prompt + str(tokenizer.decode(target_ids[:i]))
        wanted = tokenizer(tokenizer.decode(target_ids[i]))["input_ids"][0]
        found = oracle.log_probabilities(model, tokenizer(text)["input_ids"])[-1].argmax()
        hits.append(int(found) == wanted)
    return hits


def test_a_token_that_decodes_to_nothing_is_asked_for_itself() -> None:
    """As the space before a character of bytes in Llama 2's tokenizer."""
    tokenizer = tiny.tokenizer("metaspace")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    model = tiny.model("llama", "float64", "metaspace")
    model.tokenizer = tokenizer
    assert tokenizer.decode(tokenizer(" 東京", add_special_tokens=False)["input_ids"][:1]) == ""
    record = rows_of.from_zsre(row(answers=["東京"]), 0)
    (found,) = score_records(model, [record], [Edit(record.request)], 300)
    assert 0 <= found["rewrite_accuracy"][0] <= 1


@pytest.mark.parametrize("family", MAIN)
def test_parts_of_characters_are_encoded_again_as_the_released_code_does(family: str) -> None:
    model = tiny.model(family)
    targets = ["Žižek", "Rome", "東京", "São Tomé", "Ω"]
    likely = model.tokenizer(" ".join([*targets, "\ufffd"]))["input_ids"]
    with torch.no_grad():  # So that it says them at all.
        model.hf.get_output_embeddings().weight[sorted(set(likely))] *= 9
    records = [
        rows_of.from_zsre(row(answers=[new], loc_ans=true), i)
        for i, (new, true) in enumerate(itertools.permutations(targets, 2))
    ]
    columns = score_records(model, records, [Edit(r.request) for r in records], 300)
    differ = 0
    for record, column in zip(records, columns, strict=True):
        for kind, prompt, target in (
            ("rewrite", record.request.text, record.target_new),
            ("paraphrase", record.paraphrase_prompts[0], record.target_new),
            ("neighborhood", *record.neighbors[0]),
        ):
            paper, tokens = as_released(model, prompt, target), correct(model, prompt, target)
            assert column[f"{kind}_accuracy"] == [sum(paper) / len(paper)], (target, prompt)
            assert column[f"{kind}_accuracy_tokens"] == [sum(tokens) / len(tokens)]
            differ += paper != tokens
    assert differ


def test_from_records_to_table_1() -> None:
    model = tiny.model("gpt2")
    records = [rows_of.from_zsre(row(), i) for i in range(3)]
    rows, _ = evaluate(model, Unedited(), records, ScoringSettings(), None, 400)
    table = pa.Table.from_pylist(
        [{"run": "r", "status": OK, "attempts": 1, **row} for row in rows], schema=RESULT_SCHEMA
    )
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    assert frame["rewrite_nll_true"].is_null().all()
    assert frame["neighborhood_nll_true"].list.len().to_list() == [1, 1, 1]
    keys = {key: pl.lit(key) for key in ("benchmark", "model", "editor")}
    (summary,) = summarize(frame.lazy().with_columns(**keys)).to_dicts()
    for name in ("efficacy", "paraphrase", "specificity", "ES_strict", "PS_strict", "NS_strict"):
        assert 0 <= summary[name] <= 100
        assert summary[f"{name}_n"] == 3
    for name in ("S", "ES", "NS", "NM", "GE", "RS", "NS_plus", "RVS"):
        assert summary[name] is None
