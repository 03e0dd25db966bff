"""A real Chromium for the tests of pages."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

LAPTOP, PHONE = 1280, 390


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here: install Debian's package chromium")
    with sync_playwright() as playwright:
        # A container's root may not make the sandbox; the pages are our own.
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@contextmanager
def opened(browser: Browser, file: Path, width: int = LAPTOP, **context: Any) -> Iterator[Page]:
    """A page from a file, in a profile of its own; fails where it asks for anything, or errs."""
    size = {"width": width, "height": 800}
    with browser.new_context(viewport=size, **context) as profile:  # type: ignore[arg-type]
        page = profile.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on(
            "request", lambda asked: wrong.extend(re.findall("^(?!file:|data:|blob:).*", asked.url))
        )
        page.goto(file.as_uri())
        yield page
        assert wrong == []


def overflows(page: Page) -> bool:
    """Whether the page as a whole is wider than the window."""
    return bool(page.evaluate("document.documentElement.scrollWidth > innerWidth"))
