"""Errors that are meant for people, and what no text may show."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.table import Table

from cluster import lock, store
from cluster.store import Store
from cluster.words import PlainConsole, deliberate, printable, redacted
from jobs import cli
from rome.json_text import parsed
from rome.options import ConfigError
from rome.settings import within


def caught(call: Any) -> BaseException:
    with pytest.raises(Exception) as found:  # noqa: PT011
        call()
    return found.value


def test_what_this_project_raises_and_what_the_system_says_is_meant_for_the_user() -> None:
    assert deliberate(caught(lambda: within("rate", 3, 0, 1)))
    assert deliberate(caught(lambda: Store("s3://key:secret@bucket")))
    assert deliberate(caught(lambda: parsed("{")))
    assert deliberate(caught(lambda: Path("/no/such/file").read_bytes()))
    assert deliberate(ConfigError("it is not raised yet"))


def test_what_a_library_or_an_operation_of_ours_raises_is_a_fault() -> None:
    assert not deliberate(caught(lambda: int("x")))
    assert not deliberate(caught(lambda: json.loads("{")))
    # In this project's code, but not by its `raise`.
    assert not deliberate(caught(lambda: store.retry(lambda: int("x"), 0)))
    assert not deliberate(caught(lambda: lock._name({})))


def test_a_fault_of_ours_is_not_said_to_be_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="invalid literal"), cli.errors():
        store.retry(lambda: int("x"), 0)
    assert capsys.readouterr().err == ""
    with pytest.raises(typer.Exit), cli.errors():
        within("rate", 3, 0, 1)
    assert "error: rate must be from 0 to 1, got 3" in capsys.readouterr().err


HOSTILE = "\x1b[31mred\x1b[0m \x07 \x9b2J \u202egnp.exe \r ok\ttab\nline é 東"


def test_control_characters_are_spelled_out() -> None:
    shown = printable(HOSTILE)
    assert shown == ("\\x1b[31mred\\x1b[0m \\x07 \\x9b2J \\u202egnp.exe \\r ok\ttab\nline é 東")


@pytest.mark.parametrize("terminal", [True, False])
def test_no_table_and_no_line_sends_what_a_model_wrote_to_a_terminal(terminal: bool) -> None:
    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=terminal, width=200)
    table = Table("Editor", title=HOSTILE, caption="[bold]x[/bold]")
    table.add_row(HOSTILE + "[red]:smile:")
    console.print(table)
    console.print(HOSTILE)
    text = out.getvalue()
    assert "\x1b[31m" not in text
    assert "\x9b" not in text
    assert "\u202e" not in text
    assert "[red]:smile:" in text
    assert "[bold]x[/bold]" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:hush@bucket/x", "s3://AKIA:***@bucket/x"),
        ("https://h/x?token=hush&a=1", "https://h/x?token=***&a=1"),
        ("https://h/x?X-Amz-Signature=hush&X-Amz-Credential=hush", None),
        ("s3://b?secret_key=hush", "s3://b?secret_key=***"),
        ("http%3A//h?sig%3Dhush x", "http%3A//h?sig%3D*** x"),
        ("Authorization: Bearer hush", "Authorization: Bearer ***"),
        ("{'x-api-key: hush'}", "{'x-api-key: ***'}"),
        ("--password=hush --set tokens=20000", "--password=*** --set tokens=20000"),
        ("the key the-value-of-it is wrong", "the key *** is wrong"),
    ],
)
def test_credentials_are_hidden(
    text: str, shown: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-value-of-it")
    hidden = redacted(text)
    assert "hush" not in hidden
    if shown is not None:
        assert hidden == shown


def test_what_is_said_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    for speak in (cli.say, cli.tell):
        speak("\x1b[2J https://h/?token=hush")
        out = "".join(capsys.readouterr())
        assert "\\x1b[2J" in out
        assert "hush" not in out
