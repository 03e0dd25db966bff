"""The files of a config, before its settings are looked at, which takes seconds of imports."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.words import has_credentials
from rome import options
from rome.options import ConfigError
from rome.paths import CONFIGS, own_file


def filled(path: str | os.PathLike[str], given: Sequence[str]) -> dict[str, Any]:
    """Read a config's file and overrides, and put the file of its model in the model's place.

    Raises ConfigError if a file cannot be read, an override has no `=`, a value holds a credential,
    or there are more models.
    """
    one, *others = filled_each(path, given)
    if others:
        raise ConfigError(
            f"{path}: model must be one here; runs of jobs.evaluate alone take several. Choose one "
            "with --set model=NAME"
        )
    return one


def filled_each(path: str | os.PathLike[str], given: Sequence[str]) -> list[dict[str, Any]]:
    """The same for each of the models that a run names."""
    data = options.read(own_file(Path(path)))
    models = [override for override in given if override.partition("=")[0] == "model"]
    data = options.overridden(data, models)
    others = [override for override in given if override not in models]
    chosen = data.get("model")
    if isinstance(chosen, list):
        if not chosen:
            raise ConfigError(f"{path}: model must name a model, or a list of some, got []")
    else:
        chosen = [chosen]
    found = [options.overridden(_with_model(data, model), others) for model in chosen]
    _refuse_credentials(found, str(path))
    return found


def _refuse_credentials(value: Any, key: str) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_credentials(inner, f"{key}: {name}" if ": " not in key else f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_credentials(inner, key)
    elif isinstance(value, str) and has_credentials(value):
        raise ConfigError(
            f"{key} must have no password, key or token in it, since manifests and logs show it; "
            "set it in the environment"
        )


def _with_model(data: dict[str, Any], model: Any) -> dict[str, Any]:
    if isinstance(model, str):
        model = options.read(_named(model, "models"))
    return data if model is None else copy.deepcopy(data | {"model": model})


def _named(name: str, kind: str) -> Path:
    """configs/KIND/NAME.yaml, or NAME itself where it is the path of a YAML file."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = CONFIGS / kind / f"{name}.yaml"
    if not path.exists():
        names = [p.stem for p in path.parent.glob("*.yaml")]
        raise ConfigError(options.unknown(kind.removesuffix("s"), name, names))
    return path
