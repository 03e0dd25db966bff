"""What the readers of published rows share."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any


def prompts(row: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    """The list under a key. Raises ValueError where there is none."""
    found = row.get(name)
    if not isinstance(found, list):
        raise ValueError(f"{name} must be a list, got {found!r}")
    return tuple(found)


def given(row: Mapping[str, Any], name: str, default: Any) -> Any:
    """A column's value; null, which a row has if only others have the column, is the default."""
    return default if row.get(name) is None else row[name]


def without(subject: str, name: str, text: str) -> str:
    """A text with `{}` in the place of its subject. Raises ValueError if that is not in it once."""
    if text.count(subject) != 1:
        raise ValueError(f"{name} must contain the subject {subject!r} exactly once, got {text!r}")
    return text.replace(subject, "{}")


def without_last(subject: str, name: str, text: str) -> str:
    """A text with `{}` in the last place of its subject, of those where it is no part of a word if
    there are some: what a model has read of the subject by then is most.

    Raises ValueError if it is not in the text.
    """
    whole = rf"(?<!\w){re.escape(subject)}(?!\w)"
    found = [match.start() for match in re.finditer(whole, text)]
    at = found[-1] if found else text.rfind(subject)
    if at < 0:
        raise ValueError(f"{name} must contain the subject {subject!r}, got {text!r}")
    return f"{text[:at]}{{}}{text[at + len(subject) :]}"


def refuse_unread(row: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ValueError where a key that is not read holds lists or mappings, so questions."""
    for key, value in row.items():
        if key not in known and isinstance(value, list | Mapping) and value:
            raise ValueError(f"the key {key!r} is not read, got {str(value)[:200]}")
