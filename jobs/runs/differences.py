"""Differences of what two runs are of, and the refusal of another one."""

from __future__ import annotations

from typing import Any

from rome.options import ConfigError


def difference(old: Any, new: Any, key: str = "") -> list[str]:
    """List the differences between two trees of plain values, one line per key."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(old.keys() | new.keys()):
            inner = f"{key}.{name}" if key else str(name)
            lines += difference(old.get(name), new.get(name), inner)
        return lines
    return [] if old == new else [f"{key}: {old!r} there, {new!r} now"]


def refuse_another(where: str, there: Any, now: Any, what: str) -> None:
    """Raises ConfigError with the differences where what is there is of another run or training."""
    if changed := difference(there, now):
        raise ConfigError(
            f"{where} holds another {what}; choose another --out, or go back to what it has:\n"
            + "\n".join(changed)
        )
