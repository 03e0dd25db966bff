"""A judge behind a real server: concurrent, resumable, and with what servers do wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from jobs.inputs.record_stores import prepare
from jobs.judge import app
from rome.data.results import OK, RESULT_SCHEMA
from tests.support.chat_server import Server, serving

KEY = "sk-very-secret-0123"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two editors over three records of QAEdit, with WILD's texts and a probe."""
    rows = [
        {"id": i, "prompt": f"Where is tower {i}?", "subject": f"tower {i}", "target": "Rome",
         "rephrase": f"Tower {i} is where?", "locality": [{"loc": f"who {i}", "loc_ans": "Eve"}]}
        for i in range(3)
    ]  # fmt: skip
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    prepare(str(tmp_path / "qa.json"), str(tmp_path / "store"))
    run = tmp_path / "run"
    for editor, said in (("none", "Qom"), ("rome", "It is in Rome")):
        probe = {"set": "hop", "item": 0, "role": "any", "prompt": "And?", "answers": ["x", "y"],
                 "nll": [1.0, 1.0], "accuracy": [0.0, 0.0], "greedy": "z",
                 "wild": f"{said} {{text}}"}  # fmt: skip
        parts = [
            {"run": "r", "case_id": i, "status": OK, "attempts": 1, "subject": f"tower {i}",
             "prompt": "Where is {}?", "target_new": "Rome", "neighborhood_targets": ["Eve"],
             "rewrite_wild": [f" {said}. And {i}"], "paraphrase_wild": [f" {said}\n{i}"],
             "neighborhood_wild": [" Eve"], "wild_form": "plain", "rewrite_accuracy": [1.0],
             "probes": [probe] if i == 0 else None}
            for i in range(3)
        ]  # fmt: skip
        folder = run / "results" / "benchmark=qa" / "model=m" / f"editor={editor}"
        folder.mkdir(parents=True)
        schema = pl.from_arrow(RESULT_SCHEMA.empty_table()).schema  # type: ignore[union-attr]
        pl.DataFrame(parts, schema=schema).write_parquet(
            folder / "part-00000-000000-000003.parquet"
        )
    manifest = {"name": "r", "records": 3, "editors": ["none", "rome"],
                "records_store": str(tmp_path / "store")}  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def ask(run: Path, server: Server, *more: str, **env: str) -> Any:
    given = [str(run), "--endpoint", server.endpoint, "--model", "org/judge-1", *more]
    return CliRunner().invoke(app, given, env={"OPENAI_API_KEY": None, **env})


def fair(question: str, number: int) -> tuple[int, Any]:
    answer = question.partition("Answer: ")[2]
    return 200, "CORRECT" if "Rome" in answer or "Eve" in answer else "Incorrect."


def test_verdicts_are_columns_with_the_judges_name_and_no_key_is_kept(run: Path) -> None:
    with serving(fair, pause_s=0.05) as server:
        result = ask(run, server, "--concurrency", "4", OPENAI_API_KEY=KEY)
    assert result.exit_code == 0, result.output
    assert server.keys == {f"Bearer {KEY}"}
    assert 2 <= server.most <= 4
    summary = pl.read_parquet(run / "summary.parquet").to_dicts()
    none, rome = summary
    assert (none["ES_org-judge-1"], rome["ES_org-judge-1"]) == (0, 100)
    assert (none["NS_org-judge-1"], rome["PS_org-judge-1"]) == (100, 100)
    assert (none["probe_hop_org-judge-1"], rome["probe_hop_org-judge-1"]) == (0, 100)
    assert rome["ES_wild"] == 0
    assert "ES_org-judge-1" in result.stdout
    # Of each question once, with all that it needs, and nothing filled in twice.
    asked = [body["messages"][0]["content"] for body in server.asked]
    assert len(asked) == len(set(asked)) == 3 * 2 * 2 + 3 + 2
    assert any(
        "Question: Where is tower 1?\nTarget: Rome\nAnswer: It is in Rome.\n" in a for a in asked
    )
    assert any("Target: x or y\nAnswer: Qom {text}\n" in a for a in asked)
    assert {body["temperature"] for body in server.asked} == {0}
    for file in run.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes(), file
    assert KEY not in result.output


def test_what_was_replied_is_not_asked_again(run: Path) -> None:
    def failing(question: str, number: int) -> tuple[int, Any]:
        return (500, b"oops") if "tower 2" in question or "who 2" in question else fair(question, 0)

    with serving(failing) as server:
        result = ask(run, server, "--tries", "1")
    assert result.exit_code == 3
    assert "3 without a reply" in result.output
    before = len(server.asked)
    half = pl.read_parquet(run / "summary.parquet").filter(editor="rome").to_dicts()[0]
    assert (half["ES_org-judge-1"], half["ES_org-judge-1_n"]) == (100, 2)
    with serving(fair) as again:
        assert ask(run, again, "--tries", "1").exit_code == 0
    assert len(again.asked) == 3
    assert before == 17
    with serving(fair) as third:
        assert ask(run, third).exit_code == 0
    assert third.asked == []


def test_nonsense_is_no_verdict(run: Path) -> None:
    replies: list[Any] = [
        b"<html>",
        b"{}",
        b'{"choices": [{"message": {"content": null}}]}',
        b"[" * 9000,
    ]

    def odd(question: str, number: int) -> tuple[int, Any]:
        return 200, [*replies, "Well, perhaps", ""][number % 6]

    with serving(odd) as server:
        result = ask(run, server, "--concurrency", "1")
    assert result.exit_code == 3, result.output
    assert "12 without a reply, 5 not clear" in result.output
    summary = pl.read_parquet(run / "summary.parquet")
    assert summary["ES_org-judge-1"].to_list() == [None, None]


def test_a_slow_server_is_asked_again_and_then_left(run: Path) -> None:
    def slow_at_first(question: str, number: int) -> tuple[int, Any]:
        return (429, b"") if number < 5 else fair(question, number)

    with serving(slow_at_first) as server:
        assert ask(run, server, "--concurrency", "8").exit_code == 0
    assert len(server.asked) == 17 + 5
    with serving(fair, pause_s=1.5) as server:
        result = ask(run, server, "--name", "other", "--timeout", "0.2", "--tries", "1")
    assert result.exit_code == 3, result.output
    assert "17 without a reply" in result.output


@pytest.mark.parametrize(
    ("more", "answer", "message"),
    [
        ([], lambda q, n: (401, b"your key sk-very"), "status 401; check the endpoint"),
        (["--endpoint", "http://me:pw@localhost/v1"], fair, "endpoint must have no user or"),
        (["--endpoint", "localhost:80"], fair, "endpoint must be an address"),
        (["--name", "wild"], fair, "must not be named wild"),
        (["--name", "a b"], fair, "must be of letters"),
    ],
)
def test_what_cannot_work_is_said(run: Path, more: list[str], answer: Any, message: str) -> None:
    with serving(answer) as server:
        result = ask(run, server, *more, OPENAI_API_KEY=KEY)
    assert result.exit_code == 1
    assert message in result.output
    assert "sk-very" not in result.output


def test_a_prompt_of_ones_own_and_another_judge_of_that_name(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("right: ja\nwrong: nein\nprompt: '{text} = {target}? {question}'\n")
    with serving(lambda question, n: (200, "Ja!")) as server:
        assert ask(run, server, "--prompt", str(own)).exit_code == 0
        assert "Eve = Eve? who 1" in {b["messages"][0]["content"] for b in server.asked}
        result = ask(run, server)
        assert result.exit_code == 1
        assert "another judge" in result.output
        own.write_text("right: ja\nwrong: nein\nprompt: '{text}'\n")
        result = ask(run, server, "--prompt", str(own))
        assert "prompt must hold {question}" in result.output
