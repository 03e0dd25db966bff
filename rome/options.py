"""Settings from YAML files and `key=value` overrides, every key checked."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from rome import yaml_text
from rome.yaml_text import YamlError


class ConfigError(ValueError):
    """A config says something that it may not; the message names the key and what it may be."""


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError if it holds none."""
    try:
        data = yaml_text.load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except YamlError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config must be a mapping, got {type(data).__name__}")
    return data


def overridden(data: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """`data` with overrides `key=value`: keys are dotted, values YAML.

    Raises ConfigError if an override has no `=`, or its key goes through a value without keys.
    """
    result = copy.deepcopy(dict(data))
    for override in given:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"--set takes key=value, got '{override}'")
        try:
            _set(result, key.split("."), yaml_text.load(value), key)
        except YamlError as error:
            raise ConfigError(f"--set {key}: {error}") from None
    return result


def _set(data: dict[str, Any], parts: list[str], value: Any, key: str) -> None:
    for part in parts[:-1]:
        if data.get(part) is None:
            data[part] = {}
        if not isinstance(data[part], dict):
            raise ConfigError(f"--set {key}: '{part}' is {data[part]!r} and has no keys")
        data = data[part]
    data[parts[-1]] = value


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def validate(kind: type, data: Any, where: str) -> Any:
    """`data` as a `kind`. Raises ConfigError with every wrong key, and the nearest right one."""
    try:
        # As JSON, whose lists are tuples: nothing else is taken for what it is not, such as true
        # for 1, text for a number, or 1.0 for 1.
        return TypeAdapter(kind).validate_json(json.dumps(data, default=repr), strict=True)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path = [str(part) for part in problem["loc"]]
            if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                text = unknown("key", path[-1], _keys(kind, path[:-1]))
            elif problem["type"] == "missing":  # Its input is all that is there.
                text = "it must be given"
            elif problem["type"] == "value_error":  # Ours says all of it.
                text = str(problem["ctx"]["error"])
            else:
                text = f"{problem['msg']}, got {problem.get('input')!r}"
            named = where + ("." if where and path and not where.endswith((".", " ")) else "")
            key = f"{named}{'.'.join(path)}".rstrip(".: ")  # A class's own check has no path.
            lines.append(f"{key}: {text}")
        raise ConfigError("\n".join(lines)) from None


def _keys(kind: type, path: Sequence[str]) -> list[str]:
    """The keys that are right at a path inside a dataclass."""
    for part in path:
        hint = get_type_hints(kind).get(part)
        found = [t for t in (hint, *get_args(hint)) if is_dataclass(t) and isinstance(t, type)]
        if not found:
            return []
        kind = found[0]
    return [f.name for f in fields(kind)]


def unknown(what: str, name: str, known: Iterable[Any]) -> str:
    """Say that a name is unknown, and the nearest known one or all of them."""
    names = sorted(str(k) for k in known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"unknown {what} '{name}'; did you mean '{close[0]}'?"
    return f"unknown {what} '{name}'; " + (
        f"known: {', '.join(names)}" if names else "none is known"
    )
