"""JSON from files that anyone may have edited."""

from __future__ import annotations

import json
from typing import Any


class JsonError(ValueError):
    """Not JSON, or nested so deeply that it is none that a program wrote."""


def parsed(data: str | bytes) -> Any:
    """The value of a JSON document. Raises JsonError."""
    try:
        return json.loads(data)
    except RecursionError:
        raise JsonError("its brackets are nested too deeply") from None
    except ValueError as error:
        raise JsonError(f"not JSON: {error}") from None
