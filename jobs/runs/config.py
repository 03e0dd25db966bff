"""Configs: YAML files into dataclasses, every key checked.

A run file names a model (configs/models) or a list of them, a benchmark (configs/benchmarks, or a
prepared store) and the editors. Settings of an editor come from its dataclass, then from the
model's file, then from the run's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields
from math import lcm
from typing import TYPE_CHECKING, Any, Literal

import yaml

from cluster.settings import RunSettings
from jobs.runs.config_files import filled, filled_each
from rome import options
from rome.edits.grouping import Grouping
from rome.options import ConfigError
from rome.scoring.settings import PromptTemplate, ScoringSettings
from rome.settings import configurable, within

if TYPE_CHECKING:
    from rome.editors import Kind

_GROUPING = [f.name for f in fields(Grouping)]


@configurable(kw_only=True, tokens=(1, 1e12), passage_tokens=2)
class CorpusConfig:
    """The corpus of a second moment."""

    corpus: str = "self"
    """`self` (text sampled from the model), a .txt file with a passage a line, a Parquet file with
    a column `text`, or a `datasets` id (`NAME:CONFIG:SPLIT:COLUMN`, the last three optional)."""
    tokens: int | Literal["auto"] = 100_000
    """Tokens at least, unless the corpus ends before. `auto`: twenty for each dimension of a key,
    which suffices (arXiv 2506.04226); the paper has some forty million."""
    passage_tokens: int = 512
    """Longer passages are cut."""
    file: str | None = None
    """A ready second moment to use instead, a path or a URI, `{layer}` in its name standing for the
    layer: safetensors, or a .npz as the ROME authors publish."""


@configurable(kw_only=True)
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
    local_copy: bool = False
    """Copy the checkpoint to each machine's own disk first, into $ROME_CACHE, once for all workers
    there."""
    second_moment: CorpusConfig = field(default_factory=CorpusConfig)
    editors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Hyperparameters of editors for this model."""

    def __post_init__(self) -> None:
        if self.name in ("", ".", ".."):  # Runs and second moments have folders of this name.
            raise ValueError(
                f"name must not be empty, '.' or '..', got {self.name!r}; give another name"
            )


@configurable(kw_only=True, limit=1, case_id_below=1)
class SliceConfig:
    """The records of the store that a run takes; all by default."""

    limit: int | None = None
    """The first so many."""
    case_id_below: int | None = None
    """The paper's slices: 7500 for GPT-2, 2000 for GPT-J."""


@configurable(kw_only=True)
class TemplateConfig:
    """Context templates: sampled from the model once per run, or given."""

    lengths: tuple[tuple[int, int], ...] = ((5, 10), (10, 10))
    """(tokens, how many)"""
    seed: int = 0
    texts: tuple[str, ...] | None = None
    """Ready templates, the bare `{}` first, instead of sampling."""

    def __post_init__(self) -> None:
        for tokens, number in self.lengths:
            within("tokens of lengths", tokens, 2, 10_000)
            within("texts of lengths", number, 1, 10_000)
        if self.texts is not None and self.texts[:1] != ("{}",):
            raise ValueError(f"texts must begin with the bare '{{}}', got {list(self.texts)[:1]}")
        if odd := [text for text in self.texts or () if text.count("{}") != 1]:
            raise ValueError(f"each of texts must have '{{}}' exactly once, got {odd[0]!r}")


@configurable(kw_only=True, token_budget=1, lease_records=(1, 1_000_000))
class RunConfig:
    """One file of configs/runs, with its model filled in."""

    name: str
    model: ModelConfig
    benchmark: str
    """A name in configs/benchmarks, or the folder or URI of a prepared store."""
    editors: dict[str, dict[str, Any]]
    """Name of a row of the table -> settings; the key `editor` says which editor it is if the name
    does not. The keys of `rome.edits.grouping.Grouping` say how many records share an edited
    model."""
    records: SliceConfig = field(default_factory=SliceConfig)
    templates: TemplateConfig = field(default_factory=TemplateConfig)
    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    prompt_template: PromptTemplate = "raw"
    """`chat` puts all prompts that a target follows into the tokenizer's chat template, as a user's
    turn; `chat_edits` those of the edits alone, `chat_probes` those of all that is asked."""
    keep_edits: bool = False
    """Also write the edits themselves, see jobs.tasks.stored_edits. The dense ones of fine-tuning
    are as large as the weights that they change, for each record."""
    edits: str | None = None
    """A run directory that kept its edits, which are scored instead of new ones."""
    second_moments: str | None = None
    """The folder or URI in which second moments are, or are put; null takes the workspace's."""
    token_budget: int | None = None
    """Tokens of a forward pass at most, padding included; null takes what suits the device."""
    lease_records: int | None = None
    """Records that a worker takes at a time, and loses at most. Null: 8 on CPUs, and
    on the GPUs of a cluster up to 128, at least four leases for each."""
    workers: RunSettings = field(default_factory=RunSettings)

    def kind(self, name: str) -> str:
        """The registered editor of a row. Raises ConfigError."""
        kind: str = self.editors[name].get("editor", name)
        if kind not in (known := _registered()):
            raise ConfigError(f"editors.{name}: {options.unknown('editor', kind, known)}")
        return kind

    def takes_stored(self, name: str) -> bool:
        """True if a row's edits come from another run."""
        return self.edits is not None and self.kind(name) != "none"

    def editor(self, name: str) -> tuple[str, Any]:
        """The registered editor of a row and its settings. Raises ConfigError."""
        kind = self.kind(name)
        taken = {*_GROUPING, "editor"}
        given = {k: v for k, v in self.editors[name].items() if k not in taken}
        merged = options.merged(self.model.editors.get(kind, {}), given)
        return kind, options.validate(_registered()[kind].settings, merged, f"editors.{name}.")

    def grouping(self, name: str) -> Grouping:
        """The records of a row that share an edited model. Raises ConfigError."""
        given = {k: v for k, v in self.editors[name].items() if k in _GROUPING}
        grouping: Grouping = options.validate(Grouping, given, f"editors.{name}.")
        if self.edits and grouping.checkpoints:
            raise ConfigError(
                f"editors.{name}: checkpoints are scored as their edits are made: leave `edits` out"
            )
        if self.lease_records and not grouping.checkpoints and self.lease_records % grouping.size:
            raise ConfigError(
                f"lease_records must be a multiple of {grouping.size}, the records that share a "
                f"model in editors.{name}, got {self.lease_records}"
            )
        return grouping

    def together(self, name: str) -> int:
        """The records of a row that must be in one lease. Raises ConfigError."""
        grouping = self.grouping(name)
        return 1 if grouping.checkpoints else grouping.size

    def lease(self, gpus: bool) -> int:
        """Records of a lease: those of the config, or what fills a worker's batches."""
        if self.lease_records:
            return self.lease_records
        # The records that share an edited model are in one lease.
        whole = lcm(*(self.together(name) for name in self.editors))
        return -(-(128 if gpus else 8) // whole) * whole


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """A run's config from its file and `key=value` overrides, of one model.

    Keys are dotted, values YAML. Raises ConfigError, naming file and key.
    """
    return _checked(path, filled(path, overrides))


def load_each(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[RunConfig]:
    """The same for each of the models that a file names; overrides are for all of them."""
    chosen = [_checked(path, data) for data in filled_each(path, overrides)]
    names = [config.model.name for config in chosen]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: model must name each model once, got {names}")
    return chosen


def outlined(path: str | os.PathLike[str], data: dict[str, Any]) -> RunConfig:
    """The config in which all but the editors and their settings is checked, without torch, which
    these import. Raises ConfigError."""
    config: RunConfig = options.validate(RunConfig, data, f"{path}: ")
    if not config.editors:
        raise ConfigError(f"{path}: editors must name at least one editor, such as none or rome")
    return config


def _registered() -> Mapping[str, Kind]:
    from rome.editors import EDITORS

    return EDITORS


def _checked(path: str | os.PathLike[str], data: dict[str, Any]) -> RunConfig:
    config, known = outlined(path, data), _registered()
    for kind, settings in config.model.editors.items():
        if kind not in known:
            raise ConfigError(f"{path}: model.editors: {options.unknown('editor', kind, known)}")
        options.validate(known[kind].settings, settings, f"{path}: model.editors.{kind}.")
    for name in config.editors:
        config.editor(name)
        config.grouping(name)
    return config


def plain(config: RunConfig) -> dict[str, Any]:
    """The config as the run's manifest keeps it: JSON values, without what changes no result."""
    data = asdict(config)
    del data["workers"], data["token_budget"], data["keep_edits"], data["second_moments"]
    del data["model"]["local_copy"]
    plain_data: dict[str, Any] = yaml.safe_load(yaml.safe_dump(_listed(data)))
    return plain_data


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list | tuple) else value
