"""python -m jobs.trace CONFIG [--out DIR] [--fact KNOWN_ID] [--set key=value ...]

Causal traces of known facts (Meng et al. 2022, Section 2) on Ray, their averages by token role, and
heat maps. Run the same line again to resume; a run in progress is drawn as far as it has come.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import polars as pl
import pyarrow as pa
import typer
from pydantic import PositiveInt

from cluster.queue import Grid, Lease
from cluster.run import FAILURES, RunSettings, once, run
from cluster.store import Store
from jobs import cli, figures, manifests, sources
from jobs import config as configs
from jobs.config import ModelConfig
from jobs.manifests import MANIFEST
from jobs.pinned import load_model
from jobs.reduce import write_table
from jobs.sources import say
from rome import tracing
from rome.evaluation import TOKEN_BUDGETS
from rome.results import ERROR, OK
from rome.tracing import KnownFact, TraceSettings

KindName = Literal["hidden", "mlp", "attention", "mlp_severed", "attention_severed"]
EFFECTS, AVERAGES = "effects.parquet", "averages.parquet"

TRACE_SCHEMA = pa.schema(
    [
        pa.field("case_id", pa.int64(), nullable=False),  # The fact's known_id.
        pa.field("subject", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("attribute", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("attempts", pa.int32(), nullable=False),
        # The token that the model itself says next, and whether the attribute starts with it.
        pa.field("answer", pa.string()),
        pa.field("known", pa.bool_()),
        pa.field("tokens", pa.list_(pa.string())),
        pa.field("subject_start", pa.int32()),
        pa.field("subject_stop", pa.int32()),
        # Probabilities of the answer; null where the fact is not known.
        pa.field("clean", pa.float64()),
        pa.field("corrupted", pa.float64()),
        # By token, then by layer; null for tokens that the kind does not trace.
        pa.field("restored", pa.list_(pa.list_(pa.float64()))),
        pa.field("seconds", pa.float64()),
        pa.field("worker", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """One file of configs/traces, with its model filled in."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    name: str
    model: ModelConfig
    facts: str
    """A file or URL in the form of the authors' `known_1000.json`."""
    limit: PositiveInt | None = None
    """The first so many facts, known to the model or not."""
    kinds: tuple[KindName, ...] = ("hidden", "mlp", "attention", "mlp_severed", "attention_severed")
    trace: TraceSettings = field(default_factory=TraceSettings)
    token_budget: PositiveInt | None = None
    """Tokens of a forward pass at most; null takes what suits the device."""
    lease_facts: PositiveInt = 4
    workers: RunSettings = field(default_factory=RunSettings)


@dataclass(frozen=True)
class Tracing:
    """Everything that a worker must know."""

    config: TraceConfig
    facts: dict[int, KnownFact]
    grid: Grid
    std: float

    def dead_row(self, lease: Lease, error: str, attempts: int) -> pa.Table:
        """The row of a fact that ended its workers."""
        (known_id,) = self.grid.ids(lease)
        row = {"case_id": known_id, "status": ERROR, "error": error, "attempts": attempts}
        return pa.Table.from_pylist([row], schema=TRACE_SCHEMA)


class TracingTask:
    """A model pinned in a worker that traces facts."""

    def __init__(self, tracing: Tracing) -> None:
        self.tracing = tracing
        self.model = load_model(tracing.config.model)
        self.fingerprint = self.model.fingerprint()
        default = TOKEN_BUDGETS[self.model.device.type]
        self.token_budget = tracing.config.token_budget or default

    def describe(self) -> dict[str, Any]:
        return {"model_fingerprint": self.fingerprint}

    def verify(self) -> None:
        """Nothing here writes to a weight."""

    def run(self, lease: Lease) -> pa.Table:
        rows = [self._row(lease, known_id) for known_id in self.tracing.grid.ids(lease)]
        return pa.Table.from_pylist(rows, schema=TRACE_SCHEMA)

    def _row(self, lease: Lease, known_id: int) -> dict[str, Any]:
        fact, began = self.tracing.facts[known_id], time.perf_counter()
        settings, std = self.tracing.config.trace, self.tracing.std
        kind = lease.group.rpartition("kind=")[2]
        found = tracing.trace(self.model, fact, kind, settings, std, self.token_budget)
        return {
            "case_id": known_id,
            "subject": fact.subject,
            "prompt": fact.prompt,
            "attribute": fact.attribute,
            "status": OK,
            "attempts": lease.attempt,
            "answer": found.answer,
            "known": found.known,
            "tokens": found.tokens,
            "subject_start": found.subject.start,
            "subject_stop": found.subject.stop,
            "clean": found.clean,
            "corrupted": found.corrupted,
            "restored": found.restored,
            "seconds": time.perf_counter() - began,
            "worker": f"{socket.gethostname()}:{os.getpid()}",
        }


def read_facts(location: str) -> tuple[list[KnownFact], str]:
    """The facts of a file or URL, and the sha256 of its bytes.

    Raises ValueError where it cannot be read, or an entry lacks a key or its subject.
    """
    data = sources.read(location)
    try:
        names = ("known_id", "subject", "attribute", "prompt")
        facts = [KnownFact(**{name: row[name] for name in names}) for row in json.loads(data)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{location} must be a JSON list of facts with known_id, subject, attribute and prompt "
            f"({error})"
        ) from error
    return facts, hashlib.sha256(data).hexdigest()


def run_traces(config: TraceConfig, out: str) -> int:
    """Trace what is left of a run's facts and give the exit status, as `jobs.evaluate` does."""
    store = Store(out)
    facts, digest = read_facts(config.facts)
    # The noise is that of the whole file, however many of its facts are traced.
    manifest = _manifest(config, store, [fact.subject for fact in facts], digest)
    facts = facts[: config.limit]
    grid = Grid((tuple(fact.known_id for fact in facts),), config.lease_facts)
    work = Tracing(config, {f.known_id: f for f in facts}, grid, manifest["embedding_std"])
    outcome = run(
        store.sub("results"),
        [f"kind={kind}" for kind in config.kinds],
        grid,
        partial(TracingTask, work),
        work.dead_row,
        config.workers,
        expect={"model_fingerprint": manifest["model_fingerprint"]},
    )
    return cli.ended(outcome, "traces", "fact")


def _manifest(
    config: TraceConfig, store: Store, subjects: Sequence[str], digest: str
) -> dict[str, Any]:
    """The manifest there, if it is of the same run, or a new one, written first."""
    now = {"config": _plain(config), "facts": {"sha256": digest}}
    if store.exists(MANIFEST):
        there = _read(store)
        configs.refuse_another(store.uri, {key: there[key] for key in now}, now, "run")
        return there
    found = once(_model_facts, config, subjects, settings=config.workers)
    manifest = {"name": config.name, **now, **found}
    manifests.write(store, manifest)
    return manifest


def _read(store: Store) -> dict[str, Any]:
    return manifests.read(
        store, ("config", "facts", "model_fingerprint"), "Restore it, or choose another --out."
    )


def _plain(config: TraceConfig) -> dict[str, Any]:
    """The config as the manifest keeps it: JSON values, without what changes no result."""
    data = asdict(config)
    for key in ("facts", "workers", "token_budget"):
        del data[key]
    for key in ("editors", "second_moment"):
        del data["model"][key]
    plain: dict[str, Any] = json.loads(json.dumps(data))
    return plain


def _model_facts(config: TraceConfig, subjects: Sequence[str]) -> dict[str, Any]:
    model = load_model(config.model)
    return {
        "model_fingerprint": model.fingerprint(),
        "embedding_std": tracing.embedding_std(model, subjects),
    }


def effects(store: Store) -> pl.DataFrame:
    """One row per (kind, known_id, token, layer) of the known facts of a run, finished or not.

    `total_effect` = P[o] - P*[o] and `indirect_effect` = P*,restored[o] - P*[o], for the answer o.
    `roles` are the token's, see `rome.tracing.roles`. Raises ValueError where no part is there.
    """
    parts = store.list("results/", ".parquet")
    if not parts:
        raise ValueError(f"{store.uri} has no traces yet: no part in results/. Run jobs.trace.")
    frames = []
    for part in parts:
        frame = pl.DataFrame(pl.from_arrow(store.read_table(part))).filter(pl.col("known"))
        kind = part.split("/")[1].removeprefix("kind=")
        frames.append(frame.with_columns(pl.lit(kind).alias("kind")))
    rows = pl.concat(frames)
    counted = [
        tracing.roles(range(row["subject_start"], row["subject_stop"]), len(row["tokens"]))
        for row in rows.select("subject_start", "subject_stop", "tokens").iter_rows(named=True)
    ]
    return (
        rows.with_columns(
            pl.Series("roles", counted, pl.List(pl.List(pl.String))),
            pl.int_ranges(pl.col("tokens").list.len()).alias("token"),
        )
        .select(
            "kind",
            pl.col("case_id").alias("known_id"),
            "token",
            pl.col("tokens").alias("text"),
            "roles",
            "answer",
            (pl.col("clean") - pl.col("corrupted")).alias("total_effect"),
            "corrupted",
            pl.col("restored").alias("layers"),
        )
        .explode("token", "text", "roles", "layers")
        .drop_nulls("layers")
        .with_columns(pl.int_ranges(pl.col("layers").list.len()).alias("layer"))
        .explode("layer", "layers")
        .with_columns((pl.col("layers") - pl.col("corrupted")).alias("indirect_effect"))
        .drop("layers", "corrupted")
        .sort("kind", "known_id", "token", "layer")
    )


def averages(frame: pl.DataFrame) -> pl.DataFrame:
    """Average indirect effect by kind, role and layer, over all tokens of a role as the released
    `average_causal_effects` has it; `half_width` is 1.96 * std / sqrt(facts)."""
    effect = pl.col("indirect_effect")
    return (
        frame.explode("roles")
        .drop_nulls("roles")
        .group_by("kind", pl.col("roles").alias("role"), "layer")
        .agg(
            effect.mean().alias("indirect_effect"),
            (1.96 * effect.std(ddof=0) / pl.col("known_id").n_unique().sqrt()).alias("half_width"),
            pl.col("known_id").n_unique().alias("facts"),
        )
        .sort("kind", pl.col("role").cast(pl.Enum(tracing.ROLES)), "layer")
    )


def suggested_layer(average: pl.DataFrame) -> int | None:
    """The layer with the largest average indirect effect of MLPs at the subject's last token."""
    found = average.filter(kind="mlp", role="last subject").sort("indirect_effect")
    return None if found.is_empty() else int(found["layer"][-1])


def reduce(out: str) -> None:
    """Write effects, averages and figures of a run, and say what they suggest."""
    store = Store(out)
    frame = effects(store)
    if frame.is_empty():
        raise ValueError(f"{store.uri}: the model knows none of the facts traced so far")
    average = averages(frame)
    for name, table in ((EFFECTS, frame), (AVERAGES, average)):
        write_table(store, name, table)
    totals = frame.unique("known_id")["total_effect"].to_list()
    average_total = sum(totals) / len(totals)
    say(f"{len(totals)} known facts, average total effect {average_total:.3f}")
    layer, manifest = suggested_layer(average), _read(store)
    if layer is not None:
        say(f"the trace suggests layer {layer}: there MLPs at the last subject token restore most")
    model, window = manifest["config"]["model"]["name"], manifest["config"]["trace"]["window"]
    drawn = {
        "trace-averages": figures.trace_averages(average, model, window),
        "trace-lines": figures.trace_lines(average, model, window),
    }
    if average["kind"].str.ends_with("_severed").any():
        drawn["trace-severed"] = figures.trace_severed(average, model)
    figures.save(store, drawn)


def draw_fact(out: str, known_id: int) -> None:
    """The heat maps of one fact, as in Figure 1. Raises ValueError where it was not traced."""
    store = Store(out)
    frame = effects(store).filter(known_id=known_id)
    if frame.is_empty():
        raise ValueError(f"{store.uri} has no trace of a known fact with known_id {known_id}")
    window = _read(store)["config"]["trace"]["window"]
    figures.save(store, {f"trace-fact-{known_id}": figures.trace_fact(frame, window)})


app = cli.new_app()


@app.command()
def main(
    config: Annotated[str, typer.Argument(help="A file of configs/traces, or your own.")],
    out: Annotated[
        str | None, typer.Option(help="Run directory or URI [workspace/traces/NAME].")
    ] = None,
    fact: Annotated[
        list[int] | None, typer.Option(help="Draw this fact's heat maps, too (known_id).")
    ] = None,
    overrides: cli.Overrides = None,
) -> None:
    """Trace known facts and draw where they are recalled; the same line resumes."""
    with cli.errors(*FAILURES):
        chosen = configs.validate(
            TraceConfig, configs.filled(config, overrides or []), f"{config}: "
        )
        out = out or str(configs.workspace() / "traces" / chosen.name)
        status = run_traces(chosen, out)
        reduce(out)
        for known_id in fact or []:
            draw_fact(out, known_id)
    raise typer.Exit(status)


if __name__ == "__main__":
    app()
