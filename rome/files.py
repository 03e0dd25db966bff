"""Files that are there whole or not at all, and made by one process at a time."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path`, whose folder is made; what the block writes there takes its place.

    If the block raises, the file at `path` stays as it was. A file is on the disk before it gets
    its name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes, or two threads, may write the same file at once.
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}-{path.name}")
    temporary.touch(exist_ok=False)  # A new file, and not what a link names.
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make a file or folder while no other process of this machine does: a lock beside `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".lock-{path.name}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Goes with the process, however that ends.
        yield


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before what follows."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
