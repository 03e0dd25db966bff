"""Causal traces of known facts, fact by fact."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from cluster.grid import Grid, Lease
from cluster.settings import RunSettings
from cluster.told import tell
from jobs.runs.config import ModelConfig
from jobs.runs.parts import hive_values
from jobs.tasks.loading import load_model, token_budget
from rome import tracing
from rome.data.results import ERROR, OK
from rome.settings import configurable
from rome.tracing import KnownFact, TraceSettings

KindName = Literal["hidden", "mlp", "attention", "mlp_severed", "attention_severed"]

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


@configurable(kw_only=True, limit=1, token_budget=1, lease_facts=(1, 100_000))
class TraceConfig:
    """One file of configs/traces, with its model filled in."""

    name: str
    model: ModelConfig
    facts: str
    """A file or URL in the form of the authors' `known_1000.json`."""
    limit: int | None = None
    """The first so many facts, known to the model or not."""
    kinds: tuple[KindName, ...] = ("hidden", "mlp", "attention", "mlp_severed", "attention_severed")
    trace: TraceSettings = field(default_factory=TraceSettings)
    token_budget: int | None = None
    """Tokens of a forward pass at most; null takes what suits the device."""
    lease_facts: int = 4
    workers: RunSettings = field(default_factory=RunSettings)


@dataclass(frozen=True)
class Tracing:
    """Everything that a worker must know."""

    config: TraceConfig
    facts: dict[int, KnownFact]
    grid: Grid
    std: float

    def task(self) -> TracingTask:
        return TracingTask(self)

    def dead_row(self, lease: Lease, error: str) -> pa.Table:
        (known_id,) = self.grid.ids(lease)
        row = {"case_id": known_id, "status": ERROR, "error": error, "attempts": lease.attempt}
        return pa.Table.from_pylist([row], schema=TRACE_SCHEMA)


class TracingTask:
    """A model pinned in a worker that traces facts."""

    def __init__(self, tracing: Tracing) -> None:
        self.tracing = tracing
        self.model = load_model(tracing.config.model)
        self.fingerprint = self.model.fingerprint()
        config = tracing.config
        self.token_budget = token_budget(self.model, config.token_budget, config.workers)

    def describe(self) -> dict[str, Any]:
        return {"model_fingerprint": self.fingerprint}

    def verify(self) -> None:
        """Nothing here writes to a weight."""

    def run(self, lease: Lease) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for known_id in self.tracing.grid.ids(lease):
            tell(len(rows))
            rows.append(self._row(lease, known_id))
        return pa.Table.from_pylist(rows, schema=TRACE_SCHEMA)

    def _row(self, lease: Lease, known_id: int) -> dict[str, Any]:
        fact, began = self.tracing.facts[known_id], time.perf_counter()
        settings, std = self.tracing.config.trace, self.tracing.std
        kind = hive_values(lease.group, ("kind",))["kind"]
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
