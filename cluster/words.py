"""Words for people: errors that are meant for them, and nothing in them that should not be seen."""

from __future__ import annotations

import os
import re
import sys
import traceback
from types import FrameType
from typing import Any
from urllib.parse import unquote

from rich.console import Console
from rich.text import Text

_OWN = ("cluster", "jobs", "rome")
# Escape sequences move the cursor and colour what follows; bidirectional marks reverse it.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SECRET_NAME = re.compile("SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL|(^|_)TOKEN(_|$)", re.I)
_SECRETS = (
    (re.compile(r"(//[^/\s:@]*:)[^/\s@]+@"), r"\1***@"),
    (
        re.compile(
            r"((?:token|secret\w*|passw\w*|api_?key|access_key\w*|signature|credentials?|\bsig)"
            r"(?:=|%3D))[^\s&'\"]+",
            re.I,
        ),
        r"\1***",
    ),
    (re.compile(r"((?:authorization|api-key): *(?:\w+ +)?)[^\s'\"]+", re.I), r"\1***"),
)


def printable(text: str) -> str:
    """The text with control characters spelled out, but for tabs and line ends."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def redacted(text: str) -> str:
    """The text with *** in the place of credentials: of URIs, of headers, and those that this
    process has in its environment."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return _without_credentials(text)


def shown(text: str) -> str:
    """The text as anybody may see it: `printable` and `redacted`."""
    return printable(redacted(text))


def note(text: str) -> None:
    """Tell the user something on stderr."""
    print(shown(text), file=sys.stderr)


def has_credentials(uri: str) -> bool:
    """True if a URI or another setting has a password, key or token in it."""
    return any(_without_credentials(text) != text for text in (uri, unquote(uri)))


def _without_credentials(text: str) -> str:
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


class PlainConsole(Console):
    """A console that takes nothing in a text for markup, and shows no control characters of it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)


def deliberate(error: BaseException) -> bool:
    """True if an error is meant for the user: an OSError, or one that this project raises itself.

    A ValueError that a library, or an operation in our own code, raises is a fault of ours, whose
    traceback is needed.
    """
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _OWN:
        return True
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames or _module(frames[-1][0]).partition(".")[0] not in _OWN:
        return False
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return line.startswith("raise ")


def _module(frame: FrameType) -> str:
    """Of `python -m jobs.evaluate` jobs.evaluate, which calls itself __main__."""
    spec = frame.f_globals.get("__spec__")
    return str(spec.name if spec else frame.f_globals.get("__name__", ""))
