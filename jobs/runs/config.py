"""Configs: YAML files into dataclasses, every key checked.

A run file names a model (configs/models), a benchmark (configs/benchmarks, or a prepared store) and
the editors. Settings of an editor come from its dataclass, then from the model's file, then from
the run's.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import yaml
from pydantic import PositiveInt, TypeAdapter, ValidationError

from cluster.settings import RunSettings
from rome.editors import EDITORS
from rome.edits.sequences import Grouping
from rome.evaluation import ScoringSettings
from rome.paths import CONFIGS

_GROUPING = [f.name for f in fields(Grouping)]


class ConfigError(ValueError):
    """A config says something that it may not; the message names the key and what it may be."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What a second moment is computed over."""

    corpus: str = "self"
    """`self` (text sampled from the model), a .txt file with a passage a line, a Parquet file with
    a column `text`, or a `datasets` id (`NAME:CONFIG:SPLIT:COLUMN`, the last three optional)."""
    tokens: PositiveInt = 100_000
    """Tokens at least, unless the corpus ends before."""
    passage_tokens: PositiveInt = 512
    """Longer passages are cut."""
    file: str | None = None
    """A ready second moment to use instead, `{layer}` in its name standing for the layer:
    safetensors, or a .npz as the ROME authors publish."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One file of configs/models."""

    name: str
    source: str
    """See rome.models.load."""
    dtype: Literal["float64", "float32", "tf32", "bfloat16"]
    """float32 is the reference; bfloat16 is faster on CPUs with AMX and on GPUs, tf32 on GPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the GPU that the worker was given, all of them where it was given several, else the
    CPU."""
    second_moment: CorpusConfig = field(default_factory=CorpusConfig)
    editors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Hyperparameters of editors for this model."""


@dataclass(frozen=True, kw_only=True)
class SliceConfig:
    """Which records of the store are used; all by default."""

    limit: PositiveInt | None = None
    """The first so many."""
    case_id_below: int | None = None
    """The paper's slices: 7500 for GPT-2, 2000 for GPT-J."""


@dataclass(frozen=True, kw_only=True)
class TemplateConfig:
    """Context templates: sampled from the model once per run, or given."""

    lengths: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))
    """(tokens, how many)"""
    seed: int = 0
    texts: tuple[str, ...] | None = None
    """Ready templates, the bare `{}` first, instead of sampling."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One file of configs/runs, with its model filled in."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # For the dataclasses inside as well.
    name: str
    model: ModelConfig
    benchmark: str
    """A name in configs/benchmarks, or the folder or URI of a prepared store."""
    editors: dict[str, dict[str, Any]]
    """Name of a row of the table -> settings; the key `editor` says which editor it is if the name
    does not. The keys of `rome.edits.sequences.Grouping` say how many records share an edited
    model."""
    records: SliceConfig = field(default_factory=SliceConfig)
    templates: TemplateConfig = field(default_factory=TemplateConfig)
    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    keep_edits: bool = False
    """Also write the edits themselves, see jobs.tasks.stored_edits. The dense ones of fine-tuning
    are as large as the weights that they change, for each record."""
    edits: str | None = None
    """A run directory that kept its edits, which are scored instead of new ones."""
    token_budget: PositiveInt | None = None
    """Tokens of a forward pass at most, padding included; null takes what suits the device."""
    lease_records: PositiveInt = 8
    """Records that a worker takes at a time, and loses at most."""
    workers: RunSettings = field(default_factory=RunSettings)

    def kind(self, name: str) -> str:
        """The registered editor of a row. Raises ConfigError."""
        kind: str = self.editors[name].get("editor", name)
        if kind not in EDITORS:
            raise ConfigError(f"editors.{name}: {_unknown('editor', kind, EDITORS)}")
        return kind

    def takes_stored(self, name: str) -> bool:
        """Whether a row's edits come from another run."""
        return self.edits is not None and self.kind(name) != "none"

    def editor(self, name: str) -> tuple[str, Any]:
        """The registered editor of a row and its settings. Raises ConfigError."""
        kind = self.kind(name)
        taken = {*_GROUPING, "editor"}
        given = {k: v for k, v in self.editors[name].items() if k not in taken}
        merged = _merge(self.model.editors.get(kind, {}), given)
        return kind, validate(EDITORS[kind].settings, merged, f"editors.{name}.")

    def grouping(self, name: str) -> Grouping:
        """How many records of a row share an edited model. Raises ConfigError."""
        given = {k: v for k, v in self.editors[name].items() if k in _GROUPING}
        grouping: Grouping = validate(Grouping, given, f"editors.{name}.")
        if self.lease_records % grouping.size:
            raise ConfigError(
                f"lease_records must be a multiple of {grouping.size}, the records that share a "
                f"model in editors.{name}, got {self.lease_records}"
            )
        return grouping


def workspace() -> Path:
    """Where stores, second moments and runs go by default: $ROME_WORKSPACE, else ~/rome-workspace.

    Absolute, because a Ray job's working directory is a copy that is deleted.
    """
    return Path(os.environ.get("ROME_WORKSPACE", "~/rome-workspace")).expanduser().resolve()


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """A run's config from its file and `key=value` overrides.

    Keys are dotted, values YAML. Raises ConfigError, naming file and key.
    """
    data = filled(path, overrides)
    config: RunConfig = validate(RunConfig, data, f"{path}: ")
    if not config.editors:
        raise ConfigError(f"{path}: editors must name at least one editor, such as none or rome")
    for kind, settings in config.model.editors.items():
        if kind not in EDITORS:
            raise ConfigError(f"{path}: model.editors: {_unknown('editor', kind, EDITORS)}")
        validate(EDITORS[kind].settings, settings, f"{path}: model.editors.{kind}.")
    for name in config.editors:
        config.editor(name)
        config.grouping(name)
    return config


def filled(path: str | os.PathLike[str], overrides: Sequence[str]) -> dict[str, Any]:
    """What a config's file and overrides say, with the file of its model in the model's place.

    Raises ConfigError where a file cannot be read or an override has no `=`.
    """
    data = _read(Path(path))
    model = data.get("model")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"--set takes key=value, got '{override}'")
        if key == "model":
            model = yaml.safe_load(value)
    if isinstance(model, str):
        data["model"] = _read(_named(model, "models"))
    for override in overrides:
        key, _, value = override.partition("=")
        if key != "model":
            _set(data, key.split("."), yaml.safe_load(value), key)
    return data


def validate(kind: type, data: Any, where: str) -> Any:
    """`data` as a `kind`. Raises ConfigError with every wrong key, and the nearest right one."""
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            path = [str(part) for part in problem["loc"]]
            if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                text = _unknown("key", path[-1], _keys(kind, path[:-1]))
            else:
                text = f"{problem['msg']}, got {problem.get('input')!r}"
            lines.append(f"{where}{'.'.join(path)}: {text}")
        raise ConfigError("\n".join(lines)) from None


def difference(old: Any, new: Any, key: str = "") -> list[str]:
    """What differs between two trees of plain values, one line per key."""
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


def plain(config: RunConfig) -> dict[str, Any]:
    """The config as the run's manifest keeps it: JSON values, without what changes no result."""
    data = asdict(config)
    del data["workers"], data["token_budget"], data["keep_edits"]
    plain_data: dict[str, Any] = yaml.safe_load(yaml.safe_dump(_listed(data)))
    return plain_data


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list | tuple) else value


def _read(path: Path) -> dict[str, Any]:
    # `configs/...` is the project's own file wherever the command runs, unless there is one.
    own = CONFIGS.parent / path
    if path.parts[:1] == ("configs",) and own.exists() and not path.exists():
        path = own
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config must be a mapping, got {type(data).__name__}")
    return data


def _named(name: str, kind: str) -> Path:
    """configs/KIND/NAME.yaml, or NAME itself where it is the path of a YAML file."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = CONFIGS / kind / f"{name}.yaml"
    if not path.exists():
        names = [p.stem for p in path.parent.glob("*.yaml")]
        raise ConfigError(_unknown(kind.removesuffix("s"), name, names))
    return path


def _set(data: dict[str, Any], parts: list[str], value: Any, key: str) -> None:
    for part in parts[:-1]:
        if data.get(part) is None:
            data[part] = {}
        if not isinstance(data[part], dict):
            raise ConfigError(f"--set {key}: '{part}' is {data[part]!r} and has no keys")
        data = data[part]
    data[parts[-1]] = value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _keys(kind: type, path: Sequence[str]) -> list[str]:
    """The keys that are right at a path inside a dataclass."""
    for part in path:
        hint = get_type_hints(kind).get(part)
        found = [t for t in (hint, *get_args(hint)) if is_dataclass(t) and isinstance(t, type)]
        if not found:
            return []
        kind = found[0]
    return [f.name for f in fields(kind)]


def _unknown(what: str, name: str, known: Any) -> str:
    names = sorted(str(k) for k in known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"unknown {what} '{name}'; did you mean '{close[0]}'?"
    return f"unknown {what} '{name}'; " + (
        f"known: {', '.join(names)}" if names else "none is known"
    )
