"""Settings: frozen dataclasses that refuse unknown keys and numbers out of bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True)
def configurable(*, kw_only: bool = False, **least: float) -> Callable[[type[_T]], type[_T]]:
    """Make a class a frozen dataclass that a config can fill.

    `least`: fields and the smallest number that each may be; what is no number is let through.
    Making one with a smaller number raises ValueError. A key of a config that is no field is an
    error, too.
    """

    def decorated(cls: type[_T]) -> type[_T]:
        made: Any = cls
        check = getattr(cls, "__post_init__", None)  # Its own, or that of the class it extends.

        def post_init(self: Any) -> None:
            if check is not None:
                check(self)
            for name, limit in least.items():
                value = getattr(self, name)
                if isinstance(value, int | float) and not value >= limit:  # A NaN is not, either.
                    raise ValueError(f"{name} must be at least {limit:g}, got {value}")

        made.__post_init__ = post_init
        made.__pydantic_config__ = {"extra": "forbid"}
        return dataclass(frozen=True, kw_only=kw_only)(cls)

    return decorated
