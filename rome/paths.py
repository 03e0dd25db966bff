"""Paths of the project's own files, in a checkout and in an installed package."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE.parent
"""The folder that holds the packages `rome`, `cluster` and `jobs`."""
# The wheel puts the checkout's folder `configs` inside this package.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else ROOT / "configs"
"""Models, benchmarks, runs, trainings, traces and facts as YAML."""


def workspace() -> Path:
    """The default folder of stores and runs: $ROME_WORKSPACE, else ~/rome-workspace.

    Absolute, because a Ray job's working directory is a copy that is deleted.
    """
    return Path(os.environ.get("ROME_WORKSPACE", "~/rome-workspace")).expanduser().resolve()
