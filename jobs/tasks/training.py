"""The task of `jobs.train`: read examples, train, validate, keep checkpoints.

In a training's store: `curve.parquet`, a row per validation; `weights.safetensors`, the network
where it validated best; `checkpoint.safetensors`, from which an interrupted training goes on.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import NonNegativeInt, PositiveInt
from safetensors import SafetensorError

from cluster.settings import RunSettings
from cluster.store import Store
from jobs.inputs import corpus as corpora
from jobs.runs.config import CorpusConfig, ModelConfig
from jobs.tasks.loading import load_model, token_budget
from rome import options
from rome.data import records
from rome.data.records import Record, Request
from rome.editors import hypernetwork
from rome.editors.hypernetwork import NETWORKS, NetworkOrigin
from rome.editors.objective import Example
from rome.editors.training import Figures, Trainer, TrainingSettings
from rome.models import EditableModel, memory
from rome.options import ConfigError
from rome.paths import inside, workspace
from rome.scoring import generation
from rome.scoring.generation import UNEDITED, Start
from rome.scoring.settings import GenerationSettings

CURVE, WEIGHTS, CHECKPOINT = "curve.parquet", "weights.safetensors", "checkpoint.safetensors"
_EXAMPLES = "examples.parquet"
_COLUMNS = ("beginning", "sampled", "local", "local_end")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data: the records of a benchmark, or the passages of a corpus."""

    benchmark: str | None = None
    """A name in configs/benchmarks, or the folder or URI of a prepared store."""
    skip: NonNegativeInt = 0
    """The first so many records of the store, which tables are made of, are left out."""
    corpus: str | None = None
    """See jobs.runs.config.CorpusConfig. An edit makes the model's own continuation of a passage's
    beginning, sampled, what it says there; the next passage should stay as it is."""
    passages: PositiveInt = 400
    beginning: PositiveInt = 20
    """Tokens of a passage that the continuation follows."""
    continuation: PositiveInt = 10
    """Tokens that are sampled."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One file of configs/train, with its model filled in."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    name: str
    model: ModelConfig
    editor: Literal["ke", "mend"]
    layers: PositiveInt = 3
    """The MLP's in and out weights of the last so many layers are edited."""
    network: dict[str, Any] = field(default_factory=dict)
    """Settings of the network: rome.editors.mend or rome.editors.knowledge_editor."""
    data: DataConfig
    training: TrainingSettings
    workers: RunSettings = field(default_factory=RunSettings)

    @property
    def network_settings(self) -> Any:
        """Raises ConfigError."""
        return options.validate(NETWORKS[self.editor][0], self.network, "network.")


def folder() -> Path:
    """The default folder of trainings; each has a folder of its name."""
    return workspace() / "hypernetworks"


def trained(name: str) -> str:
    """The file that a trained editor's setting `weights` names: a training or a file.

    Raises ConfigError where it is not there.
    """
    path = Path(name) if name.endswith(".safetensors") else inside(folder(), name) / WEIGHTS
    if not path.is_file():
        how = "it must be a file that jobs.train wrote"
        if not name.endswith(".safetensors"):
            how = f"train it first: python -m jobs.train configs/train/{name}.yaml"
        raise ConfigError(f"{path}: no such file, which the weights '{name}' should be in; {how}")
    return str(path.resolve())


def finished(curve: list[dict[str, Any]], settings: TrainingSettings) -> bool:
    """True if a training with these validations has come to its end."""
    if not curve or curve[-1]["step"] >= settings.steps:
        return bool(curve)
    return len(curve) - 1 - best(curve) >= settings.patience


def best(curve: list[dict[str, Any]]) -> int:
    """Index of the row with the lowest validation loss; row 0 is the unedited model."""
    losses = [row["val_loss"] for row in curve]
    ranked = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return min(range(1, len(curve)), key=ranked.__getitem__, default=0)


def read_curve(store: Store) -> list[dict[str, Any]]:
    """A row per validation, the first that of the unedited model; none before the first.

    Raises ValueError where the file is damaged or of something else.
    """
    if not store.exists(CURVE):
        return []
    rows: list[dict[str, Any]] = store.read_table(CURVE).to_pylist()
    names = ("step", "seconds", *(f"val_{field.name}" for field in fields(Figures)))
    for name in names:
        if not all(isinstance(row.get(name), int | float) for row in rows):
            raise ValueError(
                f"{store.uri}/{CURVE} is damaged: its column {name} must hold numbers. Restore it, "
                "or choose another --out."
            )
    return rows


def train(config: TrainConfig, source: Store | None, store: Store) -> Iterator[dict[str, Any]]:
    """Train to the end, from the checkpoint where there is one: yields step and loss of each step,
    and each new row of the curve.

    `source`: the records. Raises ValueError where there are too few examples.
    """
    model = load_model(config.model)
    examples = (
        examples_of(source, config.data.skip) if source else _from_passages(config, model, store)
    )
    random.Random(config.training.seed).shuffle(examples)
    settings = config.network_settings
    network = hypernetwork.build(
        model, config.editor, config.layers, settings, config.training.seed
    )
    budget = token_budget(model, None, config.workers)
    trainer = Trainer(model, network, examples, config.training, budget)
    curve = read_curve(store)
    if store.exists(CHECKPOINT):
        try:
            trainer.restore(store.read_bytes(CHECKPOINT))
        except (SafetensorError, LookupError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{store.uri}/{CHECKPOINT} is damaged or of another network ({error!r}). Restore "
                "it, or move it away: the training then begins anew."
            ) from None
        curve = [row for row in curve if row["step"] <= trainer.step]
    else:
        curve = [_row(0, [], trainer.validate(edited=False), 0.0)]
        yield curve[0]
    origin = NetworkOrigin(
        training=config.name,
        kind=config.editor,
        layers=config.layers,
        settings=asdict(settings),
        model=config.model.name,
        model_fingerprint=model.origin,
        step=0,
    )
    began = time.monotonic() - curve[-1]["seconds"]
    since: list[Figures] = []
    while not finished(curve, config.training):
        since.append(trainer.train())
        yield {"step": trainer.step, "loss": since[-1].loss}
        if trainer.step % config.training.validate_every and trainer.step < config.training.steps:
            continue
        curve.append(_row(trainer.step, since, trainer.validate(), time.monotonic() - began))
        since = []
        # The checkpoint comes last: what is written before it is written again without it.
        store.write_table(CURVE, pa.Table.from_pylist(curve))
        if best(curve) == len(curve) - 1:
            where = NetworkOrigin(**{**asdict(origin), "step": trainer.step})
            store.write_bytes(WEIGHTS, hypernetwork.serialised(network, where))
        store.write_bytes(CHECKPOINT, trainer.serialised())
        yield curve[-1]


def _row(step: int, since: list[Figures], validated: Figures, seconds: float) -> dict[str, Any]:
    """A row of the curve: means of the steps since the last one, and the validation."""

    def mean(name: str) -> float | None:
        return sum(getattr(one, name) for one in since) / len(since) if since else None

    names = ("edit_loss", "local_loss", "loss")
    return {
        "step": step,
        **{f"train_{name}": mean(name) for name in names},
        **{f"val_{name}": value for name, value in asdict(validated).items()},
        "seconds": seconds,
    }


def examples_of(source: Store, skip: int) -> list[Example]:
    """The requests of a store's records but for the first so many, as examples. The paraphrases
    of a record are its first request's, its neighbours those of all."""
    read: list[Record] = []
    for name in source.list(prefix="shard-", suffix=".parquet"):
        read += records.from_table(source.read_table(name))
    return [
        example
        for record in read[skip:]
        for example in (
            Example(record.request, record.paraphrase_prompts, record.neighbors),
            *(Example(request, (), record.neighbors) for request in record.further),
        )
    ]


def _from_passages(config: TrainConfig, model: EditableModel, store: Store) -> list[Example]:
    """Passages whose continuation is the model's own, as in the published Wikitext task.

    Sampled once and kept: each is seeded by its place.
    """
    if not store.exists(_EXAMPLES):
        store.write_table(_EXAMPLES, pa.Table.from_pylist(_sampled(config.data, model, store)))
    return [
        Example(
            Request("{}", row["beginning"], row["sampled"]), (), ((row["local"], row["local_end"]),)
        )
        for row in store.read_table(_EXAMPLES).to_pylist()
    ]


def _sampled(data: DataConfig, model: EditableModel, store: Store) -> list[dict[str, str]]:
    beginning, length = data.beginning, data.beginning + data.continuation
    # One more, which the last edit should leave alone, and as many that are too short.
    tokens = 2 * length * (data.passages + 1)
    corpus = CorpusConfig(corpus=str(data.corpus), tokens=tokens, passage_tokens=length)
    prepared = corpora.prepare(corpus, model, store)
    passages = [
        ids[:length]
        for chunk in range(prepared.chunks)
        for ids in prepared.texts(model, chunk)
        if len(ids) >= length
    ][: data.passages + 1]
    starts = [Start(ids[:beginning], 0, (i,)) for i, ids in enumerate(passages)]
    settings = GenerationSettings(max_tokens=length)
    sampled = generation.generate(model, starts, [UNEDITED], settings, memory.token_budget(model))
    rows = []
    for ids, after in zip(sampled, [*passages[1:], passages[0]], strict=True):
        cut = [part for row in (ids, after) for part in (row[:beginning], row[beginning:])]
        texts = generation.decode(model, cut)
        # A cut may fall into a character, which is then none.
        if all(text.strip() and "\N{REPLACEMENT CHARACTER}" not in text for text in texts):
            rows.append(dict(zip(_COLUMNS, texts, strict=True)))
    return rows
