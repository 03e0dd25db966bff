"""Paths of the project's own files, in a checkout and in an installed package."""

from __future__ import annotations

import os
import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE.parent
"""The folder that holds the packages `rome`, `cluster` and `jobs`."""
# The wheel puts the checkout's folder `configs` inside this package.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else ROOT / "configs"
"""Models, benchmarks, runs, trainings, traces and facts as YAML."""


def inside(folder: Path, name: str) -> Path:
    """The folder or file of a name in a folder of the workspace.

    Raises ValueError where it would lie elsewhere.
    """
    path = Path(os.path.normpath(folder / name))
    if path == folder or not path.is_relative_to(folder) or "\0" in name:
        raise ValueError(
            f"a name must be that of a file or folder in {folder}, got {name!r}; give another name"
        )
    return path


def local(path: str | os.PathLike[str]) -> Path:
    """A path on this machine. Raises ValueError for a URI, which would be a folder named `s3:`."""
    if re.match(r"[A-Za-z][\w+.-]+:/", os.fspath(path)):
        raise ValueError(
            f"this must be a path on this machine and no URI, got {path}; a folder of that name is "
            f"./{path}"
        )
    return Path(path)


def own_file(path: Path) -> Path:
    """`configs/...` is the project's own file wherever a command runs, unless there is one."""
    own = CONFIGS.parent / path
    return own if path.parts[:1] == ("configs",) and own.exists() and not path.exists() else path


def workspace() -> Path:
    """The default folder of stores and runs: $ROME_WORKSPACE, else ~/rome-workspace.

    Absolute, because a Ray job's working directory is a copy that is deleted. Raises ValueError as
    `local`.
    """
    return local(os.environ.get("ROME_WORKSPACE", "~/rome-workspace")).expanduser().resolve()
