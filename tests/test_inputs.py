"""Files that people really have: read right, or refused with the line or row and the way out."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.store import Store
from jobs.inputs import formats, sources
from jobs.inputs.corpus import _texts
from jobs.inputs.sources import load
from rome import models, yaml_text
from rome.data import rows as rows_of
from rome.data.records import Record, by_script, from_table
from rome.editors.rome import Rome, RomeSettings
from rome.editors.values import ValueSettings
from rome.options import ConfigError
from rome.scoring.generation import UNEDITED
from rome.scoring.probabilities import Extras, Query, score, score_records
from rome.yaml_text import YamlError
from tests.support import tiny
from tests.support.commands import command

HEADER = "relation,templates,subject,object\n"
FACTS = HEADER + "sings,{} sings|The singing of {} is,Ada,low\nsings,,Bob,high\n"


def record(case_id: int = 0, **changes: Any) -> dict[str, Any]:
    rewrite = {
        "prompt": "{} sings",
        "subject": "Ada",
        "relation_id": "S1",
        "target_new": {"str": "high", "id": "Q1"},
        "target_true": {"str": "low", "id": "Q2"},
    }
    rewrite |= {key: changes.pop(key) for key in list(changes) if key in rewrite}
    lists = ("paraphrase", "neighborhood", "attribute", "generation")
    return {
        "case_id": case_id,
        "requested_rewrite": rewrite,
        **{f"{name}_prompts": ["It sings"] for name in lists},
        **changes,
    }


def read(path: Path, content: str | bytes) -> sources.Source:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return load(str(path))


def facts(found: sources.Source) -> dict[str, str | None]:
    return {one.subject: one.target_true for one in found.records}


# CSV


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("blank", ["", "\n\n", " , , , \n"])
def test_every_line_end_and_blank_lines(tmp_path: Path, end: str, blank: str) -> None:
    text = FACTS.replace("sings,,Bob", blank + "sings,,Bob").replace("\n", end)
    assert facts(read(tmp_path / "f.csv", text)) == {"Ada": "low", "Bob": "high"}


def test_a_comma_without_quotes_is_a_bad_row_and_with_quotes_none(tmp_path: Path) -> None:
    text = FACTS + 'sings,,King, Jr.,low\nsings,,"Queen, Sr.",low\nsings,,Solo\n'
    found = read(tmp_path / "f.csv", text)
    assert facts(found) == {"Ada": "low", "Bob": "high", "Queen, Sr.": "low"}
    first, second = found.invalid
    assert re.search(r"f\.csv, line 4: there must be 4 cells, .* got 5: .*comma in quotes", first)
    assert "line 6: there must be 4 cells" in second
    assert "got 3" in second


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FACTS + 'sings,,"Eve,low\nsings,,Max,high\n', "line 4: .*quote in it as"),
        (FACTS + 'sings,,"Eve\nsings,,Max",low\n', "line 4: a cell must be of one line"),
        (FACTS + 'sings,,"E"ve,low\n', "line 4: .*quote in it as"),
        (FACTS + 'sings,, "E"ve,low\n', "line 4: .*quote in it as"),
        (HEADER.replace("object", "subject"), r"no \['object'\]"),
        (HEADER.strip() + ",subject\n", "line 1: a column must stand once"),
    ],
)
def test_stray_quotes_and_repeated_columns_swallow_nothing(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "f.csv", text)


def test_a_long_field_is_no_traceback(tmp_path: Path) -> None:
    long = "x" * 200_000
    assert long in facts(read(tmp_path / "f.csv", FACTS + f"sings,,{long},low\n"))


def test_spaces_before_quotes_are_none_of_the_cell(tmp_path: Path) -> None:
    found = read(tmp_path / "f.csv", FACTS + 'sings, , "Eve, Jr.", "low"\n')
    assert facts(found)["Eve, Jr."] == "low"


def test_a_relation_whose_first_row_is_bad_has_bad_rows_and_spoils_no_other(tmp_path: Path) -> None:
    text = FACTS + "dances,{} dances,King, Jr.,well\ndances,,Max,badly\n"
    found = read(tmp_path / "f.csv", text)
    assert facts(found) == {"Ada": "low", "Bob": "high"}
    assert ["line 4: there must be 4" in found.invalid[0], "line 5: " in found.invalid[1]] == [
        True,
        True,
    ]


# YAML


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    high: [Bob]", "    low: [Bob]", "line 6: the key 'low' is in line 5 already"),
        ("high", "NO", "line 6: .* must be text, and NO is read as false"),
        ("Bob", "1984", "line 6: a value must be text, and 1984 is read as a number"),
        ("Bob", "~", "line 6: a value must be text, and ~ is read as nothing"),
        ("Bob", "2024-01-01", None),  # A date is text.
        ("Bob", "*x", "not YAML: .*undefined alias"),
        ("Bob", "[" * 3000, "not YAML"),
    ],
)
def test_yaml_loses_and_bends_nothing(
    tmp_path: Path, old: str, new: str, message: str | None
) -> None:
    text = (
        "relations:\n- id: sings\n  templates: ['{} sings']\n  facts:\n"
        "    low: [Ada]\n    high: [Bob]\n"
    )
    if message is None:
        read(tmp_path / "f.yaml", text.replace(old, new))
        return
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "f.yaml", text.replace(old, new))


def test_numbers_with_an_exponent_are_numbers() -> None:
    text = "{a: 1e-6, b: -2E3, c: 1e+2, d: 1.5e3, e: e3, f: 1e, g: 0x10}"
    expected = {"a": 1e-6, "b": -2e3, "c": 100.0, "d": 1500.0, "e": "e3", "f": "1e", "g": 16}
    assert yaml_text.load(text) == expected
    merged = "base: &b {x: 1, y: 2}\nown:\n  <<: *b\n  x: 3\n"
    assert yaml_text.load(merged)["own"] == {"x": 3, "y": 2}
    for odd in ("0100", "1:30", "-07", "1:30.5"):
        with pytest.raises(YamlError, match=r"line 1: .* another number in YAML than it seems"):
            yaml_text.load(f"a: {odd}")
    assert yaml_text.load("{a: '0100', b: 0.5, c: 0}") == {"a": "0100", "b": 0.5, "c": 0}
    with pytest.raises(YamlError, match="line 2: the key 'a' is in line 1"):
        yaml_text.load("a: 1\na: 2\n")


# JSON, and what has its name


def test_rows_of_every_container(tmp_path: Path) -> None:
    rows = [record(0), record(1, subject="Bob")]
    expected = read(tmp_path / "a.json", json.dumps(rows)).records
    lines = "\n\n".join(map(json.dumps, rows)).encode()
    assert read(tmp_path / "a.jsonl", lines).records == expected
    assert read(tmp_path / "b.json.gz", gzip.compress(lines)).records == expected
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("inner/c.json", json.dumps(rows))
    assert load(str(tmp_path / "c.zip")).records == expected
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert load(str(tmp_path / "d.parquet")).records == expected
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        archive.writestr("mac.json", json.dumps(rows))
        archive.writestr("__MACOSX/._mac.json", b"\0")
    assert load(str(tmp_path / "mac.zip")).records == expected
    assert read(tmp_path / "one.jsonl", json.dumps(rows[0])).records == expected[:1]
    assert read(tmp_path / "blank.jsonl", b"\n" + lines).records == expected
    cut = read(tmp_path / "cut.jsonl", b"{cut\n" + lines)
    assert (cut.records, len(cut.invalid)) == (expected, 1)
    bad = read(tmp_path / "e.jsonl", lines + b"\n{cut")
    assert (bad.records, len(bad.invalid)) == (expected, 1)
    assert "e.jsonl, line 4 (case_id 2): a record must be a mapping, got {cut" in bad.invalid[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS pointer.*git lfs pull"),
        ("\n<!DOCTYPE html><html>", "HTML page.*raw file"),
        (b"PAR1 and no more", "not a whole Parquet file"),
        ("[" * 200_000, "not JSON"),
        (b"PK\x03\x04 damaged", "damaged archive"),
        (gzip.compress(gzip.compress(b"[]", mtime=0), mtime=0), "an archive in an archive"),
    ],
)
def test_what_is_none_is_named_for_what_it_is(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"x\.json cannot be .*{message}"):
        read(tmp_path / "x.json", content)


def test_archives_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MOST_BYTES", 1 << 30)
    with gzip.open(tmp_path / "bomb.json.gz", "wb", compresslevel=9) as file:
        for _ in range(1025):
            file.write(b" " * (1 << 20))
    with pytest.raises(ValueError, match="unzips to more than 1 GiB"):
        load(str(tmp_path / "bomb.json.gz"))
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a", "[]")
        archive.writestr("b", "[]")
    with pytest.raises(ValueError, match=r"one file, but holds \['a', 'b'\]"):
        load(str(tmp_path / "two.zip"))


def test_a_column_of_another_format_does_not_decide(tmp_path: Path) -> None:
    found = read(tmp_path / "a.json", json.dumps([record(src="wiki", answers=["x"], loc="y")]))
    assert [one.subject for one in found.records] == ["Ada"]
    found = read(tmp_path / "b.json", json.dumps([{"src": "Who is Ada?", "answers": ["x"]}]))
    assert "(in zsRE's format)" in found.invalid[0]
    found = read(tmp_path / "c.json", json.dumps([{"question": "Who?"}]))
    assert "got the keys ['question']" in found.invalid[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"case_id": 1 << 63}, r"below 2\^63, got 9223372036854775808"),
        ({"case_id": True}, "whole number"),
        ({"subject": "Party \ud83c"}, "subject must be whole characters"),
        ({"paraphrase_prompts": ["\udc00"]}, r"paraphrase_prompts\[0\] must be whole"),
        ({"relation_id": "\ud83c"}, "relation_id must be whole"),
        ({"target_true": {"str": "Malmö", "id": None}, "target_new": {"str": "Malmö"}}, "differ"),
    ],
)
def test_a_row_that_no_file_can_hold_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    case_id = changes.pop("case_id", 7)
    found = read(tmp_path / "a.json", json.dumps([record(3), record(case_id, **changes)]))
    assert [one.case_id for one in found.records] == [3]
    assert re.search(rf"a\.json, row 2 \(case_id .*{message}", found.invalid[0])


def test_easyedits_rows_are_read(tmp_path: Path) -> None:
    row = {
        "prompt": "Ada sings",
        "subject": "Ada",
        "target_new": "high",
        "ground_truth": "low",
        "rephrase_prompt": "The song of Ada is",
        "locality_prompt": "Bob dances",
        "locality_ground_truth": "well",
    }
    found = read(tmp_path / "a.json", json.dumps([row, row | {"subject": "Eve"}]))
    assert found.records == [
        Record(0, None, "{} sings", "Ada", "high", "low", None, None, ("The song of Ada is",),
               ("Bob dances",), (), (), ("well",))
    ]  # fmt: skip
    assert "subject 'Eve' exactly once" in found.invalid[0]
    bare = {key: row[key] for key in ("prompt", "subject", "target_new", "locality_ground_truth")}
    found = read(
        tmp_path / "c.json", json.dumps([bare | {"ground_truth": " low", "case_id": None}])
    )
    assert "target_true must not begin or end with white space" in found.invalid[0]
    found = read(tmp_path / "d.json", json.dumps([bare | {"ground_truth": "low"}]))
    (only,) = found.records
    assert (only.case_id, only.neighborhood_targets, only.separator) == (0, (), " ")


def test_one_object_in_two_unicode_forms_is_one(tmp_path: Path) -> None:
    text = FACTS + "sings,,Cleo,Hu\u1ebf\nsings,,Dan,Hue\u0302\u0301\n"
    found = read(tmp_path / "f.csv", text)
    assert facts(found)["Dan"] == facts(found)["Cleo"] == "Hu\u1ebf"
    found = read(tmp_path / "g.csv", FACTS + "sings,,Zoe\u0301,low\nsings,,Zo\u00e9,high\n")
    assert "must appear once" in found.invalid[0]


# Corpora and models


def test_a_corpus_of_lists_or_of_another_encoding_names_its_place(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [["a", "b"]]}), tmp_path / "words.parquet")
    with pytest.raises(ValueError, match=r"words\.parquet: the column 'text' .*list"):
        list(_texts(str(tmp_path / "words.parquet")))
    (tmp_path / "old.txt").write_bytes("eins\nfünf\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"old\.txt, line 2: .*0xfc; convert it"):
        list(_texts(str(tmp_path / "old.txt")))
    (tmp_path / "mark.txt").write_bytes("eins\r\nzwei".encode("utf-8-sig"))
    assert list(_texts(str(tmp_path / "mark.txt"))) == ["eins", "zwei"]


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an adapter .*merge it"):
        models.load(str(tmp_path), "float32")


def test_a_config_says_a_key_once(tmp_path: Path) -> None:
    from jobs.runs import config as configs

    run = {"name": "x", "model": "gpt2-xl", "benchmark": "everyday", "editors": {"none": {}}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run) + "name: y\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: line 6: the key 'name' is in line 5"):
        configs.load(path)
    path.write_text(yaml.safe_dump(run))
    with pytest.raises(ConfigError, match=r"--set editors: line 1: the key 'rome'"):
        configs.load(path, ["editors={rome: {}, rome: {layer: 3}}"])


# Languages without spaces

CHINESE = record(0, prompt="{}的首都是", subject="甲国", target_new={"str": "北城", "id": None})
CHINESE |= {f"{kind}_prompts": ["甲国的首都是"] for kind in ("paraphrase", "neighborhood")}


def test_what_stands_before_a_target_is_a_setting_of_the_records(tmp_path: Path) -> None:
    path = tmp_path / "zh.json"
    path.write_text(json.dumps([CHINESE, record(1), record(2, separator="")]))
    found = {}
    for way in ("space", "none", "script"):
        out = tmp_path / way
        status, text = command("prepare", path, "--out", out, "--separator", way)
        assert status == 0, text
        assert ("1 records end in a script without spaces" in text) == (way == "space")
        table = Store(out).read_table("shard-00000.parquet")
        found[way] = [one.separator for one in from_table(table)]
        assert json.loads((out / "manifest.json").read_text())["separator"] == way
    assert found == {"space": [" ", " ", ""], "none": ["", "", ""], "script": ["", " ", " "]}


@pytest.mark.parametrize(
    ("prompt", "separator"),
    [
        ("{}位于：", ""),
        ("{}的首都是哪里？", ""),
        ("{}は「", ""),
        ("{} ｱ", ""),
        ("{} is in:", " "),
        ("{} 1:", ""),
    ],
)
def test_the_last_letter_of_a_prompt_says_its_script(prompt: str, separator: str) -> None:
    assert by_script(rows_of.from_counterfact(record(prompt=prompt, subject="甲国"))).separator == (
        separator
    )


def test_no_separator_in_a_column_that_others_use_is_the_usual_one(tmp_path: Path) -> None:
    rows = [record(0, separator=None), record(1, separator="")]
    found = read(tmp_path / "a.json", json.dumps(rows))
    assert [one.separator for one in found.records] == [" ", ""]


def test_targets_are_edited_and_scored_where_they_stand() -> None:
    """As the texts themselves say, without a space."""
    model = tiny.model("gpt2")
    spaced = rows_of.from_counterfact(CHINESE)
    joined = by_script(spaced)
    (text,) = model.encode_targets([(joined.request.text, "北城", joined.separator)])
    assert text.ids == model.encode(["甲国的首都是北城"])[0].ids
    rows = []
    for one in (spaced, joined):
        query = Query(0, one.request.text, "北城", one.separator)
        (expected,) = score(model, [query], [UNEDITED], 400)
        (row,) = score_records(model, [one], [UNEDITED], 400, Extras(neighborhood_plus=True))
        assert row["rewrite_nll_new"] == pytest.approx([expected.nll])
        rows.append(row)
    assert all(rows[0][column] != rows[1][column] for column in rows[0] if "_nll_" in column)
    settings = RomeSettings(1, ValueSettings(steps=2, stop_below=0), second_moment=False)
    editor = Rome(model, settings, ["{}"], None, 300)
    losses = [edit.health["loss"] for edit in editor.edit([spaced.request, joined.request])]
    assert losses[0] != losses[1]
