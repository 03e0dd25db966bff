"""Records of the original schema: what is accepted, and what is said about the rest."""

import copy
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rome.data import rows as rows_of
from rome.data.records import RECORD_SCHEMA, from_table, to_table

SHARED = Path(__file__).parents[2] / "shared" / "data"

ROW: dict[str, Any] = {
    "case_id": 7,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["It rained. Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is"] * 10,
    "attribute_prompts": [],
    "generation_prompts": ["Danielle Darrieux was born in"],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    row = copy.deepcopy(ROW)
    *folders, last = path.split(".")
    inner = row
    for folder in folders:
        inner = inner[folder]
    inner[last] = value
    return row


def test_a_row_becomes_a_record_and_survives_arrow() -> None:
    record = rows_of.from_counterfact(ROW)
    assert record.request.text == "The mother tongue of Danielle Darrieux is"
    assert (record.target_new, record.target_true_id) == ("English", "Q150")
    table = to_table([record])
    assert table.schema == RECORD_SCHEMA
    assert from_table(table) == [record]


def test_ids_and_relation_may_be_null() -> None:
    row = changed("requested_rewrite.relation_id", None)
    row["requested_rewrite"]["target_new"]["id"] = None
    assert rows_of.from_counterfact(row).target_new_id is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("requested_rewrite.prompt", "No place", "prompt must contain exactly one '{}', got 'No p"),
        ("requested_rewrite.prompt", "{} and {}", "exactly one '{}', got '{} and {}'"),
        ("requested_rewrite.prompt", None, "prompt must be text and not empty, got None"),
        ("requested_rewrite.subject", " ", "subject must be text and not empty, got ' '"),
        ("requested_rewrite.target_new.str", "", "target_new must be text and not empty"),
        ("requested_rewrite.target_new.str", "French", "must differ, both are 'French'"),
        ("requested_rewrite.target_true.str", " French", "must not begin or end with white space"),
        ("requested_rewrite.target_true", "French", "target_true must be a mapping with 'str'"),
        ("requested_rewrite.relation_id", 103, "relation_id must be text or null, got 103"),
        ("requested_rewrite", None, "requested_rewrite must be a mapping, got None"),
        ("case_id", "7", "case_id must be a whole number from 0 and below 2^63, got '7'"),
        ("case_id", True, "case_id must be a whole number from 0 and below 2^63, got True"),
        ("case_id", -1, "case_id must be a whole number from 0 and below 2^63, got -1"),
        ("paraphrase_prompts", ["a"] * 3, "paraphrase_prompts must have at most 2 entries, got 3"),
        ("attribute_prompts", ["a"] * 11, "attribute_prompts must have at most 10 entries, got 11"),
        ("generation_prompts", ["a", ""], r"generation_prompts[1] must be text and not empty"),
        ("neighborhood_prompts", "one", "neighborhood_prompts must be a list, got 'one'"),
        ("neighborhood_prompts", None, "neighborhood_prompts must be a list, got None"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        rows_of.from_counterfact(changed(path, value))


@pytest.mark.parametrize(
    ("name", "rows"),
    [("counterfact_1618.json", 1618), ("counterfact_partial_21919.json.gz", 21919)],
)
def test_published_records_are_all_valid(name: str, rows: int) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the repository")
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    records = [rows_of.from_counterfact(row) for row in json.loads(data)]
    assert len({record.case_id for record in records}) == rows
