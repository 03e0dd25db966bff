"""Sharded Parquet in, atomic Parquet out, on any filesystem that pyarrow can open."""

from __future__ import annotations

import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cluster.clock import REAL, Clock
from cluster.words import has_credentials

DAMAGED = "_damaged"
_UNFINISHED = ".tmp-"
_PIECE = 8 << 20
_T = TypeVar("_T")


class StoreError(OSError):
    """The store is full, out of reach or closed to us: nobody's record is to blame."""


class MissingError(StoreError, FileNotFoundError):
    """A file is not there, or out of sight."""


class DamagedError(ValueError):
    """A file is not what its name says."""


class Stat(NamedTuple):
    """Bytes of a file, and when it was committed, by the store's clock, to the microsecond."""

    size: int
    committed: datetime


def retry(call: Callable[[], _T], seconds: float, clock: Clock = REAL) -> _T:
    """Call again while StoreError is raised, for so many seconds, and return the answer."""
    deadline, pause = clock.now() + seconds, 0.2
    while True:
        try:
            return call()
        except StoreError:
            if clock.now() + pause > deadline:
                raise
            clock.sleep(pause)
            pause *= 2


def _refuse_what_gets_lost(uri: str) -> None:
    parts = urlsplit(uri)
    if "#" in uri or ("?" in uri and (parts.scheme == "file" or not parts.query)):
        raise ValueError(
            "a URI must have its '#' and '?' as %23 and %3F, or pyarrow drops what follows, "
            f"got {uri}"
        )
    if re.search(r"%(?![0-9A-Fa-f]{2})", uri):
        raise ValueError(f"a URI must have a '%' of a name as %25, got {uri}")
    if parts.password or has_credentials(uri):
        raise ValueError(
            f"a {parts.scheme} URI must have no password or key in it, since manifests and logs "
            "show it; set it in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )


@dataclass(frozen=True)
class Store:
    """A folder of files, local (a path) or remote (a URI such as `s3://bucket/folder`).

    Names are relative, with `/` between folders. A file is there whole or not at all, however the
    process that writes it ends. Picklable. Relative paths are made absolute when the store is made.
    A path is taken as it is; in a URI `%`, `#` and `?` of a name are percent-encoded.
    Making one raises ValueError if pyarrow would drop a part of a URI, or if it holds a password;
    its first use does if pyarrow cannot open such a URI.
    Every method raises StoreError where the store does not do what it is asked: MissingError, which
    is also a FileNotFoundError, where a file is not there.
    """

    uri: str

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        if "://" in text:
            _refuse_what_gets_lost(text)
        elif found := re.match(r"([A-Za-z][\w+.-]+):/", text):
            raise ValueError(
                f"a URI has two slashes, such as {found[1]}://, and a folder of that name is "
                f"./{found[0]}, got {text}"
            )
        object.__setattr__(self, "uri", text if "://" in text else os.path.abspath(text))

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        if "://" not in self.uri:
            return fs.LocalFileSystem(), self.uri
        try:
            filesystem, root = fs.FileSystem.from_uri(self.uri)
        except pa.ArrowInvalid as error:
            raise ValueError(
                "a URI must be one that pyarrow can open, with the '?' of a name as %3F, got "
                f"{self.uri}: {error}"
            ) from None
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

    def address(self, name: str) -> str:
        """Of a file, for polars, which takes the path of a URI as it is and decodes nothing."""
        path = self._path(name)
        return path if self.is_local else f"{urlsplit(self.uri).scheme}://{path}"

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Commit a file; a file of that name is replaced."""
        with self._as_store_error():
            self._write(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Commit a file if there is none of that name; returns whether.

        Nobody comes between on a local folder, in an object store only between look and write.
        """
        if self.exists(name):
            return False
        with self._as_store_error():
            try:
                self._write(self._path(name), data, os.link)
            except FileExistsError:
                return False
        return True

    def _write(
        self,
        path: str,
        data: bytes | pa.Buffer,
        commit: Callable[[str, str], None] = os.replace,
    ) -> None:
        if not self.is_local:
            # One write of everything: an object store shows the object when the stream closes, and
            # also when an abandoned stream is garbage collected, so nothing may fail in between.
            with self._opened[0].open_output_stream(path) as stream:
                stream.write(data)
            return
        folder = os.path.dirname(path)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f"{_UNFINISHED}{uuid.uuid4().hex}")
        try:
            with open(temporary, "xb") as file:  # A new file, and not what a link names.
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            commit(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)

    def write_table(self, name: str, table: pa.Table) -> int:
        """Commit a table as one Parquet file, whose size is returned; one there is replaced."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue()
        self.write_bytes(name, data)
        return int(data.size)

    def read_bytes(self, name: str) -> bytes:
        """Raises MissingError where there is no such file."""
        with self._as_store_error(), self._opened[0].open_input_stream(self._path(name)) as stream:
            data: bytes = stream.read()
        return data

    def pieces(self, name: str) -> Iterator[bytes]:
        """The content of a file of any size, piece by piece. Raises FileNotFoundError as well."""
        with self._as_store_error(), self._opened[0].open_input_stream(self._path(name)) as stream:
            while piece := stream.read(_PIECE):
                yield piece

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A Parquet file, or those of `columns` that it has.

        Raises MissingError where there is no such file, DamagedError where it is no whole Parquet
        file.
        """
        chosen = columns and list(columns)
        return self._parquet(name, lambda file: file.read(columns=chosen))

    def read_schema(self, name: str) -> pa.Schema:
        """The schema of a Parquet file, with its metadata. Raises as `read_table`."""
        return self._parquet(name, lambda file: file.schema_arrow)

    def _parquet(self, name: str, of: Callable[[pq.ParquetFile], _T]) -> _T:
        path = self._path(name)
        with self._as_store_error():
            try:
                with self._opened[0].open_input_file(path) as file:
                    return of(pq.ParquetFile(file))
            except FileNotFoundError:
                raise
            except (pa.ArrowInvalid, OSError):
                # Was it the store or the file? What is read whole and then fails is the file.
                with self._opened[0].open_input_file(path) as file:
                    data = file.read_buffer()
        try:
            return of(pq.ParquetFile(pa.BufferReader(data)))
        except (pa.ArrowInvalid, OSError) as error:
            raise DamagedError(
                f"{path} is not a whole Parquet file ({error}). "
                "Restore it, or move it away if it is a result, and run the same command again."
            ) from error

    def read_tables(
        self, names: Sequence[str], columns: Sequence[str]
    ) -> Iterator[pa.Table | DamagedError]:
        """Many Parquet files at once: of each what `read_table` returns, or what is wrong with it.

        Raises MissingError where one is not there.
        """

        def read(name: str) -> pa.Table | DamagedError:
            try:
                return self.read_table(name, columns)
            except DamagedError as error:
                return error

        with ThreadPoolExecutor(16) as pool:
            yield from pool.map(read, names)

    def exists(self, name: str) -> bool:
        with self._as_store_error():
            info = self._opened[0].get_file_info(self._path(name))
        return bool(info.type == fs.FileType.File)

    def committed(self, name: str) -> datetime:
        """When a file was committed, by the store's clock. Raises MissingError."""
        with self._as_store_error():
            info = self._opened[0].get_file_info(self._path(name))
        if info.type != fs.FileType.File:
            raise MissingError(f"{self.uri}/{name} is not there")
        when: datetime = info.mtime
        return when

    def list(self, prefix: str = "", suffix: str = "") -> list[str]:
        """The names that start with `prefix` and end with `suffix`, sorted, from all folders below.

        Files and folders whose own name starts with `.` or `_` are not there; nor is anything in a
        folder that does not exist.
        """
        return sorted(self.stats(prefix, suffix))

    def written(self, prefix: str = "", suffix: str = "") -> dict[str, datetime]:
        """The names that `list` gives, and when each was committed, by the store's clock."""
        return {name: stat.committed for name, stat in self.stats(prefix, suffix).items()}

    def stats(self, prefix: str = "", suffix: str = "") -> dict[str, Stat]:
        """The names that `list` gives, with the size and the time of each."""
        filesystem, root = self._opened
        folder = self._path(posixpath.dirname(prefix))
        with self._as_store_error():
            infos = filesystem.get_file_info(
                fs.FileSelector(folder, recursive=True, allow_not_found=True)
            )
        names = {
            posixpath.relpath(info.path, root): Stat(info.size, info.mtime)
            for info in infos
            if info.type == fs.FileType.File
        }
        return {
            name: stat
            for name, stat in names.items()
            if name.startswith(prefix)
            and name.endswith(suffix)
            and not any(part.startswith((".", "_")) for part in name.split("/"))
        }

    def delete(self, name: str) -> None:
        """Remove a file. Raises MissingError where there is none."""
        with self._as_store_error():
            self._opened[0].delete_file(self._path(name))

    def remove(self) -> None:
        """Delete the folder of the store with all that is in it."""
        with self._as_store_error():
            self._opened[0].delete_dir(self._opened[1])

    def sweep(self) -> None:
        """Remove what writers that were killed left unfinished, which only a local folder keeps.

        A writer that is at work there gets a StoreError.
        """
        if self.is_local:
            with self._as_store_error():
                for path in Path(self._path("")).rglob(f"{_UNFINISHED}*"):
                    path.unlink(missing_ok=True)

    def set_aside(self, name: str) -> str:
        """Move a damaged file to where no reader looks, and say where that is."""
        aside, data = f"{DAMAGED}/{name}", self.read_bytes(name)
        self.write_bytes(aside, data)
        if self.read_bytes(name) == data:  # A late writer may have replaced it by a whole one.
            self.delete(name)
        return aside

    @contextmanager
    def _as_store_error(self) -> Iterator[None]:
        """Errors of any filesystem as StoreError, which says whose it is."""
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise MissingError(f"{self.uri}: {error}") from error
        except OSError as error:
            raise StoreError(f"{self.uri}: {error}") from error
