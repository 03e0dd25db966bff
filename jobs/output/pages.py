"""Pages that need no network: one HTML file with its styles, its script and its data inside."""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=PackageLoader("jobs.output"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(
    name: str, parts: Sequence[str] = (), libraries: Sequence[str] = (), **values: Any
) -> str:
    """`templates/NAME.html` with `pages.js`, the `parts` and `NAME.js` as its one script, after
    scripts of libraries.

    All values are escaped. The page's policy lets nothing be fetched and no other script run.
    """
    names = ("pages", *parts, name)
    own = "".join(_TEMPLATES.get_template(f"{part}.js").render() for part in names)
    scripts = [*libraries, own]
    policy = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return _TEMPLATES.get_template(f"{name}.html").render(scripts=scripts, policy=policy, **values)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def packed(data: bytes) -> str:
    """Gzip in base64, which holds no character that HTML knows; `unpack` of pages.js reads it."""
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()
