"""Rows of a file by its content: JSON, a JSON object a line, Parquet, each perhaps zipped."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MOST_BYTES = 8 << 30
"""Of an unzipped file: what a small file that unzips to more is for, it does not do here."""

_LFS, _PARQUET, _GZIP, _ZIP = b"version https://git-lfs", b"PAR1", b"\x1f\x8b", b"PK\x03\x04"


def unzipped(data: bytes) -> bytes:
    """The content of a gzip, or of a zip of one file; other data as it is.

    Raises ValueError where it is damaged, locked, of several files, of another archive, or of more
    than MOST_BYTES.
    """
    content = _content(data)
    if content is not data and content.startswith((_GZIP, _ZIP)):
        raise ValueError("it is an archive in an archive: unzip it once")
    return content


def _content(data: bytes) -> bytes:
    try:
        if data.startswith(_GZIP):
            return _bounded(gzip.GzipFile(fileobj=io.BytesIO(data)))
        if data.startswith(_ZIP):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                names = [
                    info.filename
                    for info in archive.infolist()
                    if not info.is_dir() and not info.filename.startswith("__MACOSX/")
                ]
                if len(names) != 1:
                    raise ValueError(f"a zip must hold one file, but holds {names[:5]}: unzip it")
                with archive.open(names[0]) as file:
                    return _bounded(file)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ValueError(f"it is a damaged archive: {error}") from error
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"it is an archive that cannot be opened: {error}") from error
    return data


def _bounded(file: Any) -> bytes:
    content: bytes = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it unzips to more than {MOST_BYTES >> 30} GiB")
    return content


def rows(data: bytes) -> Iterator[tuple[str, Any]]:
    """The rows of a list in JSON, of JSON lines or of Parquet, each with its place.

    Raises ValueError, naming what the data is instead.
    """
    begin = data[:200].lstrip().lower()
    if begin.startswith(_LFS):
        raise ValueError("it is a Git LFS pointer, not the file: run `git lfs pull`")
    if begin.startswith((b"<!doctype html", b"<html")):
        raise ValueError("it is an HTML page, not data: take the address of the raw file")
    if data.startswith(_PARQUET):
        yield from _of_parquet(data)
        return
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        lines = data.splitlines()
        # One that is cut is a bad row among others.
        if not any(_is_object(line) for line in [one for one in lines if one.strip()][:2]):
            raise ValueError(f"it is not JSON: {error}") from error
        yield from _of_lines(lines)
        return
    if isinstance(found, dict) and found:
        found = [found]  # JSON lines of one line.
    if not isinstance(found, list):
        raise ValueError(f"it must hold a list, got a {type(found).__name__}")
    yield from ((f"row {i}", row) for i, row in enumerate(found, 1))


def _of_parquet(data: bytes) -> Iterator[tuple[str, Any]]:
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"it is not a whole Parquet file: {error}") from error
    yield from ((f"row {i}", row) for i, row in enumerate(table.to_pylist(), 1))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _of_lines(lines: list[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError):  # Its record is bad, and the others are not.
            yield f"line {number}", line.decode(errors="replace")
