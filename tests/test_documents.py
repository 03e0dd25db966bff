"""The documents that follow from the code are those of the code."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from jobs.__main__ import COMMANDS
from tests.programs.documents import DOCS, PAGES

ROOT = DOCS.parent
TEXTS = {path: path.read_text("utf-8") for path in (*ROOT.glob("*.md"), *DOCS.glob("*.md"))}
_cells = json.loads((DOCS / "notebook.ipynb").read_text("utf-8"))["cells"]
TEXTS[DOCS / "notebook.ipynb"] = "\n\n".join("".join(cell["source"]) for cell in _cells)


@pytest.mark.parametrize("name", list(PAGES))
def test_a_generated_page_is_what_the_code_says(name: str) -> None:
    assert (DOCS / name).read_text("utf-8") == PAGES[name](), "run `make documents`"


def test_the_index_names_every_page() -> None:
    linked = re.findall(r"\]\(([\w-]+\.(?:md|ipynb))\)", TEXTS[DOCS / "README.md"])
    assert sorted(linked) == sorted(path.name for path in TEXTS if path.parent == DOCS)[1:]
    # The site's, too, in this order; a notebook is no page of it.
    first, *sections = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = [page for section in sections for part in section.values() for page in part]
    assert [first, *pages] == ["README.md", *(name for name in linked if name.endswith(".md"))]


def _anchor(heading: str) -> str:
    """A heading's address, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_and_names_is_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.M | re.S)
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", TEXTS[there], re.MULTILINE)
            assert anchor in map(_anchor, headings), link
    if page.name != "CHANGELOG.md":  # It tells of what was.
        named = (
            r"(?<![\w/.-])(?:rome|cluster|jobs|configs|tests|docs)/[\w/.-]+\.(?:md|png|py|yaml)\b"
        )
        files = {file for file in re.findall(named, TEXTS[page]) if "NAME" not in file}
        lacking = {file for file in files if not (ROOT / file).exists()}
        assert lacking <= {"rome/editors/steer.py"}  # A page says how to write it.


def _options(command: Any, words: list[str]) -> set[str]:
    """The options of a command; of a group, those of the first word's, else of its first."""
    if commands := getattr(command, "commands", None):
        command = commands.get(words[0]) or next(iter(commands.values()))
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_are_those_of_the_commands(page: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", TEXTS[page])
    targets = re.findall(r"^([\w%-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([a-z][\w-]*\w)(?![\w-])", text, re.MULTILINE):
        assert any(re.fullmatch(known.replace("%", ".+"), target) for known in targets), target
    for line in re.findall(r"(?:python -m jobs\.|rome-bench |python -m rome )([^`\n#|]*)", text):
        name, *words = line.split()
        if not re.match(r"[a-z]", name):  # `jobs.COMMAND`, any of them, and `rome-bench --help`.
            continue
        name = name.rstrip(".,:;)'\"").replace("_", "-")
        module, _ = COMMANDS[name]
        command = typer.main.get_command(import_module(module).app)
        known = _options(command, [name] if module == "rome.__main__" else words)
        asked = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
        assert asked <= known | {"--help"}, line


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
