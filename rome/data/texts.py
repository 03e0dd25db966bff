"""Texts of records: the form in which they are compared, and what none may be."""

from __future__ import annotations

import unicodedata


def one_form(text: str) -> str:
    """A text as it is compared: in normal form C, where "é" is one character and not two."""
    return unicodedata.normalize("NFC", text)


def check_text(name: str, value: object) -> None:
    """Raises ValueError where a value is no text, or an empty one, or not of whole characters."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text and not empty, got {value!r}")
    check_whole(name, value)


def check_bare(name: str, value: object) -> None:
    """Raises ValueError where a value is no text, or has white space around it."""
    check_text(name, value)
    if isinstance(value, str) and value != value.strip():
        raise ValueError(f"{name} must not begin or end with white space, got {value!r}")


def check_whole(name: str, text: str) -> None:
    """Raises ValueError where a text has half a character, which JSON may hold and no file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} must be whole characters, but has half of one (a lone surrogate): {text!r}"
        ) from None
