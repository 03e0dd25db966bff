"""Settings: frozen dataclasses that refuse unknown keys and numbers out of bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True)
def configurable(
    *, kw_only: bool = False, **bounds: float | tuple[float, float]
) -> Callable[[type[_T]], type[_T]]:
    """Make a class a frozen dataclass that a config can fill.

    `bounds`: fields and the smallest number that each may be, or that and the largest; what is no
    number is let through. Making one with another number, or one that is not finite, raises
    ValueError. A key of a config that is no field is an error, too.
    """
    limits = {n: b if isinstance(b, tuple) else (b, math.inf) for n, b in bounds.items()}

    def decorated(cls: type[_T]) -> type[_T]:
        made: Any = cls
        check = getattr(cls, "__post_init__", None)  # Its own, or that of the class it extends.

        def post_init(self: Any) -> None:
            for name, (least, most) in limits.items():
                within(name, getattr(self, name), least, most)
            if check is not None:
                check(self)

        made.__post_init__ = post_init
        made.__pydantic_config__ = {"extra": "forbid"}
        return dataclass(frozen=True, kw_only=kw_only)(cls)

    return decorated


def within(name: str, value: Any, least: float, most: float = math.inf) -> None:
    """Raises ValueError if a value is a number that is not finite and from `least` to `most`."""
    if isinstance(value, int | float) and not (least <= value <= most and math.isfinite(value)):
        allowed = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
