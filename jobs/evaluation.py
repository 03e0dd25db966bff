"""What a worker of `jobs.evaluate` does with a lease: read, edit, score, revert."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from cluster.queue import Grid, Lease
from cluster.store import Store
from jobs.config import RunConfig, SliceConfig
from jobs.pinned import load_model
from rome import prompts, records, second_moment
from rome.editors import EDITORS, Editor, Resources
from rome.evaluation import TOKEN_BUDGETS, evaluate
from rome.models import EditableModel
from rome.results import ERROR, OK, RESULT_SCHEMA
from rome.scoring.generation import sample_context_texts
from rome.scoring.text_metrics import ReferenceTexts
from rome.second_moment import Solver
from rome.summary import record_metrics


def group_of(config: RunConfig, benchmark: str, editor: str) -> str:
    """The hive path of an editor's parts."""
    values = {"benchmark": benchmark, "model": config.model.name, "editor": editor}
    return "/".join(f"{key}={quote(value, safe='')}" for key, value in values.items())


def grid_of(store: Store, chosen: SliceConfig, lease_records: int) -> Grid:
    """The case ids of a record store that a run uses, shard by shard."""
    left = chosen.limit if chosen.limit is not None else float("inf")
    shards = []
    for name in store.list(prefix="shard-", suffix=".parquet"):
        ids = store.read_table(name, columns=["case_id"])["case_id"].to_pylist()
        if chosen.case_id_below is not None:
            ids = [i for i in ids if i < chosen.case_id_below]
        shards.append(tuple(ids[: int(min(left, len(ids)))]))
        left -= len(shards[-1])
    return Grid(tuple(shards), lease_records)


@dataclass(frozen=True)
class Evaluation:
    """Everything that a worker must know, small enough to be sent to each."""

    config: RunConfig
    records: Store
    grid: Grid
    templates: tuple[str, ...]
    second_moments: dict[int, dict[str, str]] = field(default_factory=dict)
    """Layer -> `file`, readable on every node, and its `sha256`."""

    def row(self, case_id: int, **values: Any) -> dict[str, Any]:
        return {"run": self.config.name, "case_id": case_id, "attempts": 1, **values}

    def dead_row(self, lease: Lease, error: str, attempts: int) -> pa.Table:
        """The row of a record that ended its workers."""
        (case_id,) = self.grid.ids(lease)
        return _table([self.row(case_id, status=ERROR, error=error, attempts=attempts)])


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)
    return pl.from_arrow(table).with_columns(record_metrics()).to_arrow()  # type: ignore[union-attr]


class EvaluationTask:
    """A model pinned in a worker, its editors, and the weights' hash to come back to."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.model: EditableModel = load_model(evaluation.config.model)
        self.fingerprint = self.model.fingerprint()
        default = TOKEN_BUDGETS[self.model.device.type]
        self.token_budget = evaluation.config.token_budget or default
        self.solver = cache(self._solver)
        # Built now, so that what is missing ends the run at once instead of failing each record.
        self.editors = {name: self._editor(name) for name in evaluation.config.editors}

    def describe(self) -> dict[str, Any]:
        return {"model_fingerprint": self.fingerprint}

    def verify(self) -> None:
        now = self.model.fingerprint()
        if now != self.fingerprint:
            raise RuntimeError(
                "after each lease the weights must be what they were at the start: their hash was "
                f"{self.fingerprint[:16]} and is {now[:16]}; an edit was not reverted exactly"
            )

    def run(self, lease: Lease) -> pa.Table:
        evaluation = self.evaluation
        ids = evaluation.grid.ids(lease)
        shard = evaluation.records.read_table(f"shard-{lease.shard:05d}.parquet")
        chosen = shard.filter(pc.is_in(shard["case_id"], value_set=pa.array(ids)))
        name = unquote(lease.group.rpartition("editor=")[2])
        done = evaluate(
            self.model,
            self.editors[name],
            records.from_table(chosen),
            evaluation.config.scoring,
            self.references,
            self.token_budget,
        )
        worker = f"{socket.gethostname()}:{os.getpid()}"
        return _table(
            [
                evaluation.row(**{"status": OK, "attempts": lease.attempt, "worker": worker, **row})
                for row in done
            ]
        )

    @cached_property
    def references(self) -> ReferenceTexts | None:
        store = self.evaluation.records
        if not store.exists("reference_texts.parquet"):
            return None
        return ReferenceTexts(
            store.read_table("reference_texts.parquet"), store.read_table("reference_tfidf.parquet")
        )

    def _solver(self, layer: int) -> Solver:
        known = self.evaluation.second_moments[layer]
        if (now := file_sha256(known["file"])) != known["sha256"]:
            raise ValueError(
                f"{known['file']} must be the second moment that the run began with: its sha256 "
                f"was {known['sha256'][:16]} and is {now[:16]}; restore it, or begin another run"
            )
        moment, _ = second_moment.load(known["file"])
        return Solver(moment)

    def _editor(self, name: str) -> Editor:
        kind, settings = self.evaluation.config.editor(name)
        resources = Resources(
            self.model,
            self.evaluation.templates,
            self.solver,
            self.token_budget,
        )
        return EDITORS[kind].build(resources, settings)


def model_facts(config: RunConfig) -> dict[str, Any]:
    """What only the model can say, once per run: its fingerprint and the context templates."""
    model = load_model(config.model)
    chosen = config.templates
    templates = chosen.texts or prompts.context_templates(
        sample_context_texts(model, chosen.lengths, chosen.seed)
    )
    return {"model_fingerprint": model.fingerprint(), "context_templates": list(templates)}


def file_sha256(file: str) -> str:
    """sha256 of a file's content."""
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
