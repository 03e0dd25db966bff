"""docs/messages.md has each message that a run can print, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "messages.md"
SOURCES = (
    *sorted((ROOT / "cluster").glob("*.py")),
    *(ROOT / "jobs" / name for name in ("evaluate.py", "cli.py")),
    *sorted((ROOT / "jobs" / "runs").glob("*.py")),
    *(ROOT / "jobs" / "tasks" / name for name in ("chains.py", "evaluation.py", "loading.py")),
)
SPEAK = {"note", "_note", "say", "RunError", "LockedError", "StoreError", "DamagedError"}
SPEAK |= {"ConfigError", "ValueError", "RuntimeError", "FileNotFoundError", "RecordError"}
VALUE = "…"
"""Stands on the page for what differs from one message to the next."""


def said(node: ast.expr) -> str:
    """The text of an expression, with VALUE for its parts that are none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(said(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return said(node.left) + said(node.right)
    return VALUE


def pieces(text: str) -> list[str]:
    """What stands between the values, but for what is too short to tell anything."""
    found = (" ".join(piece.split()).strip(" .,:;()'`") for piece in text.split(VALUE))
    return [piece for piece in found if len(piece) > 8]


def messages() -> Iterator[str]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                function = node.func
                name = getattr(function, "attr", getattr(function, "id", ""))
                if name in SPEAK and pieces(text := said(node.args[0])):
                    yield text


def documented() -> list[str]:
    rows = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return [" ".join(row.split()) for row in rows if row not in ("message", "---")]


def test_each_message_of_a_run_is_on_the_page() -> None:
    known = documented()
    # Its beginning will do: the way out, which follows, need not stand twice.
    lacking = [
        text for text in messages() if not any(pieces(text)[0][:40] in message for message in known)
    ]
    assert not lacking, "docs/messages.md lacks:\n" + "\n".join(lacking)


def test_the_page_has_no_message_that_no_run_prints() -> None:
    there = " ".join(" ".join(pieces(text)) for text in messages())
    for message in documented():
        parts = pieces(message)
        assert parts, message
        assert parts[0] in there, message
