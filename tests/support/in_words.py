"""Functions under their names in words, as commands and tests take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


def in_words(*functions: _F) -> dict[str, _F]:
    """`worker_killed` is "worker killed"."""
    return {function.__name__.replace("_", " "): function for function in functions}
