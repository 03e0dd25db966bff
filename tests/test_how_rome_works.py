"""The document shows the very code that the tests trust."""

from __future__ import annotations

import inspect
from pathlib import Path

from rome.editors.rome import RomeSettings
from tests.support import oracle

DOCUMENT = Path(__file__).parents[1] / "docs" / "how-rome-works.md"


def test_the_code_is_the_oracle() -> None:
    assert inspect.getsource(oracle.rome) in DOCUMENT.read_text()


def test_the_settings_are_the_published_ones() -> None:
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    shown = {line.split("`")[1]: line.split(" | ")[1].split(",")[0].strip("`") for line in lines}
    settings = RomeSettings()
    for name, text in shown.items():
        value: object = settings
        for part in name.split("."):
            value = getattr(value, part)
        assert str(value).removesuffix(".0") == text, name
    assert len(shown) == 8
