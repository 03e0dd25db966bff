"""The rooms are those of docs/architecture.md, and doors open only where it says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rome", "cluster", "jobs")

# A room may use itself and these; `rome` and `cluster` do not know each other.
ALLOWED = {"rome": set[str](), "cluster": set[str](), "jobs": {"rome", "cluster"}}
# What runs where there is no Ray.
WITHOUT_RAY = ("rome",)


def modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def imports(path: Path) -> set[str]:
    """Full names of what a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_use_only_those_that_they_may(package: str) -> None:
    for name, path in modules(package):
        used = {full.split(".")[0] for full in imports(path)} & set(PACKAGES)
        assert used <= ALLOWED[package] | {package}, name
        if package in WITHOUT_RAY:
            assert "ray" not in {full.split(".")[0] for full in imports(path)}, name


def test_rooms_of_jobs_do_not_use_commands() -> None:
    commands = {f"jobs.{path.stem}" for path in (ROOT / "jobs").glob("*.py")} - {"jobs.cli"}
    for name, path in modules("jobs"):
        if name.count(".") == 2:
            used = {".".join(full.split(".")[:2]) for full in imports(path)}
            assert not used & commands, name


def test_the_picture_shows_every_module_and_no_other() -> None:
    picture = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    shown = set(re.findall(r"(?<![\w*])[\w/]+\.py\b", picture))
    there = {
        str(path.relative_to(ROOT / package))
        for package in PACKAGES
        for _, path in modules(package)
        if path.name != "__init__.py"
    }
    helpers = {path.name for path in (ROOT / "tests").rglob("*.py")}
    assert there - shown == set(), "docs/architecture.md lacks these"
    assert shown - there <= helpers, "docs/architecture.md shows what is not there"


def test_letters_of_shapes_mean_the_same_everywhere() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    reserved = dict(re.findall(r"^\| (\w) \| (.+) \|$", text, re.MULTILINE))
    assert set(reserved) == set("BETDKVLd")
    explained = 0
    for name, path in modules("rome"):
        for legend in re.findall(r"^Legend: (.+?)\.\n(?=\n|\"\"\")", path.read_text(), re.M | re.S):
            flat = " ".join(legend.split())
            for letter, word in re.findall(r"(?:^|, |and )(\w) ([a-z]+)", flat):
                if letter in reserved:
                    assert word in reserved[letter], (name, letter, word)
                    explained += 1
    assert explained > 60


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), link


def test_no_test_module_imports_another() -> None:
    """What several of them use is in a helper beside them."""
    for path in (ROOT / "tests").glob("test_*.py"):
        assert not any(".test_" in name for name in imports(path)), path.name
