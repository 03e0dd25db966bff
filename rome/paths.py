"""Paths of the project's own files, in a checkout and in an installed package."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
ROOT = _PACKAGE.parent
"""The folder that holds the packages `rome`, `cluster` and `jobs`."""
# The wheel puts the checkout's folder `configs` inside this package.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else ROOT / "configs"
"""Models, benchmarks, runs, trainings, traces and facts as YAML."""
