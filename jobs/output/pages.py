"""Pages that need no network: one HTML file with its styles, its script and its data inside."""

from __future__ import annotations

import base64
import gzip
import hashlib
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=PackageLoader("jobs.output"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(name: str, **values: Any) -> str:
    """`templates/NAME.html` with `pages.js` and `NAME.js` as its one script.

    All values are escaped. The page's policy lets nothing be fetched and no other script run.
    """
    script = "".join(_TEMPLATES.get_template(f"{part}.js").render() for part in ("pages", name))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = _TEMPLATES.get_template(f"{name}.html")
    return template.render(script=script, script_hash=digest, **values)


def packed(data: bytes) -> str:
    """Gzip in base64, which holds no character that HTML knows; `unpack` of pages.js reads it."""
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()
