"""Bounds on the numbers of settings."""

from __future__ import annotations


def at_least(settings: object, **least: float) -> None:
    """Raise ValueError if a field named in `least` is below the number given for it."""
    for name, limit in least.items():
        if (value := getattr(settings, name)) < limit:
            raise ValueError(f"{name} must be at least {limit}, got {value}")
