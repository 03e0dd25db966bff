"""The documents that follow from the code are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.__main__ import COMMANDS
from tests.programs.documents import DOCS, PAGES


@pytest.mark.parametrize("name", list(PAGES))
def test_a_generated_page_is_what_the_code_says(name: str) -> None:
    assert (DOCS / name).read_text("utf-8") == PAGES[name](), "run `make documents`"


def test_the_index_names_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text("utf-8")))
    assert linked == {path.name for path in DOCS.glob("*.md")} - {"README.md"}


def test_messages_of_the_page_of_troubles_are_those_of_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    root = Path(__file__).parents[1]
    sources = [
        p.read_text() for room in ("rome", "cluster", "jobs") for p in (root / room).rglob("*.py")
    ]
    # A message may be broken over lines of code, and has values where the page has three dots.
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    assert len(quoted) >= 10
    for message in quoted:
        for part in message.split(" ... "):
            assert part in code, part


def test_the_readme_names_every_command() -> None:
    readme = (DOCS.parent / "README.md").read_text("utf-8")
    for name in COMMANDS:
        job = f"jobs.{name.replace('-', '_')}"
        assert job in readme or f"rome {name}" in readme, name
