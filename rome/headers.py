"""Headers of safetensors files, whose library writes metadata in another order each time: here the
same content is the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rome.json_text import parsed

_NUMBER = 8
"""Bytes of the number at the beginning of a file, which says how long the header after it is."""


def header(data: bytes) -> dict[str, Any]:
    """The JSON header of a file that begins so; the library reads `__metadata__` from paths only.

    Raises JsonError if it is none.
    """
    found: dict[str, Any] = parsed(data[_NUMBER : _end(data)])
    return found


def in_order(data: bytes) -> bytes:
    """A file that has metadata, or its beginning, with these sorted."""
    found, end = header(data), _end(data)
    found["__metadata__"] = dict(sorted(found["__metadata__"].items()))
    text = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > end - _NUMBER:
        raise ValueError(f"a header of {end - _NUMBER} bytes must not grow, got {len(text)}")
    return b"".join((data[:_NUMBER], text.ljust(end - _NUMBER), data[end:]))


def sort_metadata(path: Path) -> None:
    """Sort the metadata of a file in place: it may be larger than the memory."""
    with path.open("r+b") as file:
        number = file.read(_NUMBER)
        begin = in_order(number + file.read(_end(number) - _NUMBER))
        file.seek(0)
        file.write(begin)


def _end(data: bytes) -> int:
    """The bytes before the tensors."""
    return _NUMBER + int.from_bytes(data[:_NUMBER], "little")
