"""Sharded Parquet in, atomic Parquet out, on any filesystem that pyarrow can open."""

from __future__ import annotations

import os
import posixpath
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs


@dataclass(frozen=True)
class Store:
    """A folder of files, local (a path) or remote (a URI such as `s3://bucket/folder`).

    Names are relative, with `/` between folders. A file is there whole or not at all, however the
    process that writes it ends. Picklable. Relative paths are made absolute when the store is made.
    """

    uri: str

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        object.__setattr__(self, "uri", text if "://" in text else os.path.abspath(text))

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        if "://" not in self.uri:
            return fs.LocalFileSystem(), self.uri
        filesystem, root = fs.FileSystem.from_uri(self.uri)
        return filesystem, root

    def _path(self, name: str) -> str:
        return posixpath.join(self._opened[1], name) if name else self._opened[1]

    @property
    def is_local(self) -> bool:
        return isinstance(self._opened[0], fs.LocalFileSystem)

    def sub(self, path: str) -> Store:
        """The store of a folder inside this one; the folder need not exist."""
        if "://" not in self.uri:
            return Store(os.path.join(self.uri, path))
        parts = urlsplit(self.uri)
        return Store(parts._replace(path=posixpath.join(parts.path or "/", quote(path))).geturl())

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Commit a file; a file of that name is replaced."""
        path = self._path(name)
        if not self.is_local:
            # One write of everything: an object store shows the object when the stream closes, and
            # also when an abandoned stream is garbage collected, so nothing may fail in between.
            with self._opened[0].open_output_stream(path) as stream:
                stream.write(data)
            return
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".tmp-{uuid.uuid4().hex}")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise

    def write_table(self, name: str, table: pa.Table) -> None:
        """Commit a table as one Parquet file; a file of that name is replaced."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write_bytes(name, sink.getvalue())

    def read_bytes(self, name: str) -> bytes:
        """Raises FileNotFoundError where there is no such file."""
        with self._opened[0].open_input_stream(self._path(name)) as stream:
            data: bytes = stream.read()
        return data

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A Parquet file, or those of `columns` that it has.

        Raises FileNotFoundError where there is no such file, ValueError where it is no whole
        Parquet file.
        """
        with self._opened[0].open_input_file(self._path(name)) as file:
            try:
                return pq.ParquetFile(file).read(columns=columns and list(columns))
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(
                    f"{self._path(name)} is not a whole Parquet file ({error}). "
                    "Move it away and run the same command again."
                ) from error

    def exists(self, name: str) -> bool:
        info = self._opened[0].get_file_info(self._path(name))
        return bool(info.type == fs.FileType.File)

    def list(self, prefix: str = "", suffix: str = "") -> list[str]:
        """The names that start with `prefix` and end with `suffix`, sorted, from all folders below.

        Files and folders whose own name starts with `.` or `_` are not there; nor is anything in a
        folder that does not exist.
        """
        filesystem, root = self._opened
        folder = self._path(posixpath.dirname(prefix))
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        names = (
            posixpath.relpath(info.path, root)
            for info in filesystem.get_file_info(selector)
            if info.type == fs.FileType.File
        )
        return sorted(
            name
            for name in names
            if name.startswith(prefix)
            and name.endswith(suffix)
            and not any(part.startswith((".", "_")) for part in name.split("/"))
        )

    def delete(self, name: str) -> None:
        """Remove a file. Raises FileNotFoundError where there is none."""
        self._opened[0].delete_file(self._path(name))
