"""The task of `jobs.evaluate`: read a lease's records, edit, score, revert."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from cluster.grid import Grid, Lease
from cluster.store import DamagedError, Store
from cluster.told import tell
from cluster.worker import describe_error
from jobs.inputs import corpus
from jobs.runs import manifests
from jobs.runs.chains import Chain
from jobs.runs.config import ModelConfig, RunConfig
from jobs.runs.manifests import at_hand
from jobs.runs.parts import hive_path, hive_values
from jobs.tasks import stored_edits
from jobs.tasks.chains import Chains
from jobs.tasks.loading import load_model, token_budget
from jobs.tasks.states import BATCH_SCHEMA
from jobs.tasks.stored_edits import StoredEdits
from jobs.tasks.values import VALUE_SCHEMA
from rome import second_moment
from rome.analysis.summary import record_metrics
from rome.data import records
from rome.data.records import Record, RecordError
from rome.data.results import ERROR, OK, RESULT_SCHEMA
from rome.editors import EDITORS, Editor, Resources, Unedited, hypernetwork
from rome.edits import sequences
from rome.edits.deltas import Edit
from rome.edits.files import EditOrigin
from rome.edits.sequences import turns
from rome.edits.several import RecordEditor
from rome.evaluation import evaluate
from rome.models import EditableModel, prompts
from rome.scoring import text_metrics
from rome.scoring.apart import entropies_beside
from rome.scoring.generation import sample_context_texts
from rome.scoring.text_metrics import Entropies, ReferenceTexts, words
from rome.solver import Solver

log = logging.getLogger(__name__)


def group_of(config: RunConfig, benchmark: str, editor: str) -> str:
    """The hive path of an editor's parts."""
    return hive_path(benchmark=benchmark, model=config.model.name, editor=editor)


@dataclass(frozen=True)
class Evaluation:
    """Everything that a worker must know, small enough to be sent to each."""

    config: RunConfig
    records: Store
    grid: Grid
    templates: tuple[str, ...]
    second_moments: dict[int, dict[str, str]] = field(default_factory=dict)
    """Layer -> `file`, a path or a URI that every node can read, and its `sha256`."""
    weights: dict[str, dict[str, str]] = field(default_factory=dict)
    """Name of trained weights -> the same."""
    reversed_prompts: dict[str, str] = field(default_factory=dict)
    """Relation -> prompt, see `rome.scoring.probabilities.Extras`."""
    run: Store | None = None
    """The run directory, where it keeps its chains, and its edits if it is to."""
    chains: Mapping[str, Chain] = field(default_factory=dict)
    """The chain of each group that is of one."""

    def task(self) -> EvaluationTask:
        return EvaluationTask(self)

    def dead_row(self, lease: Lease, error: str) -> pa.Table:
        (case_id,) = self.grid.ids(lease)
        return self.table(lease, [{"case_id": case_id, "status": ERROR, "error": error}])

    def table(self, lease: Lease, rows: Sequence[Mapping[str, Any]], worker: str = "") -> pa.Table:
        """Rows of a lease with what they have in common."""
        common = {"run": self.config.name, "attempts": lease.attempt, "worker": worker or None}
        chain = self.chains.get(lease.group)
        own = chain and {chain.batches: BATCH_SCHEMA, chain.values: VALUE_SCHEMA}.get(lease.group)
        if own:
            return pa.Table.from_pylist([{**common, **row} for row in rows], schema=own)
        if chain is None:
            return _with_metrics([{**common, "status": OK, **row} for row in rows])
        edits = int(hive_values(lease.group)["edits"])
        common |= {"order": chain.order, "edits": edits, "status": OK}
        return _with_metrics(
            [{**common, "age": chain.age(row["case_id"], edits), **row} for row in rows]
        )


def _with_metrics(rows: list[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist(rows, schema=RESULT_SCHEMA)
    return pl.from_arrow(table).with_columns(record_metrics()).to_arrow()  # type: ignore[union-attr]


_Done = tuple[dict[str, Any], Edit | None]


class EvaluationTask:
    """A model pinned in a worker, its editors, and the weights' hash to come back to."""

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.model: EditableModel = load_model(evaluation.config.model)
        self.fingerprint = self.model.fingerprint()
        config = evaluation.config
        self.token_budget = token_budget(self.model, config.token_budget, config.workers)
        self.solver = cache(self._solver)
        self._shard_of = {
            case_id: number
            for number, shard in enumerate(evaluation.grid.shards)
            for case_id in shard
        }
        # Leases follow each other in a shard; the batches of a chain have records of several.
        self._shard = lru_cache(maxsize=8)(
            lambda n: evaluation.records.read_table(f"shard-{n:05d}.parquet")
        )
        # The records of one group, leased one by one, are evaluated once.
        self._evaluate_once = lru_cache(maxsize=1)(self._evaluate)
        # Built now, so that what is missing ends the run at once instead of failing each record.
        self.editors: dict[str, Editor] = {}
        chained: dict[str, sequences.Chain] = {}
        for name in config.editors:
            if config.takes_stored(name):
                continue
            editor, grouping = self._editor(name), config.grouping(name)
            if grouping.checkpoints:
                chained[name] = sequences.Chain(self.model, editor, grouping)
            else:
                self.editors[name] = sequences.grouped(self.model, editor, grouping)
        if chained:
            assert evaluation.run is not None
            self.chains = Chains(
                evaluation.run,
                self.model,
                self.fingerprint,
                chained,
                self._records,
                self.token_budget,
            )
        self._stored = cache(self._stored_edits)
        self._behind = 0
        self.references = _references(evaluation.records)
        self.entropies: Entropies = text_metrics.entropies
        if config.scoring.generation:
            words("")  # GE's data is missed now, and not after the first lease.
            self.entropies = entropies_beside(self.model.device)

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
        evaluation, self._behind = self.evaluation, 0
        name = hive_values(lease.group)["editor"]
        worker = f"{socket.gethostname()}:{os.getpid()}"
        if chain := evaluation.chains.get(lease.group):
            return evaluation.table(lease, self._of_chain(lease, chain), worker)
        size = evaluation.config.grouping(name).size
        done = self._evaluate(lease) if size == 1 else self._grouped(lease, size)
        if (
            evaluation.run
            and evaluation.config.keep_edits
            and evaluation.config.kind(name) != "none"
        ):
            model = evaluation.config.model.name
            origin = EditOrigin(editor=name, model=model, model_fingerprint=self.fingerprint)
            stored_edits.keep(evaluation.run, lease, [edit for _, edit in done], origin)
        return evaluation.table(lease, [row for row, _ in done], worker)

    def _of_chain(self, lease: Lease, chain: Chain) -> list[dict[str, Any]]:
        if lease.group == chain.batches:
            return self.chains.edit(lease, chain)
        if lease.group == chain.values:
            return self.chains.values(lease, chain)
        some = self._records(self.evaluation.grid.ids(lease))
        try:
            with self.chains.at(chain, int(hive_values(lease.group)["edits"])):
                return [row for row, _ in self._scored(Unedited(), some)]
        except RecordError as error:
            return [self._failed(record, error)[0] for record in some]

    def _grouped(self, lease: Lease, size: int) -> list[_Done]:
        """The rows of a lease from those of the groups that it is of.

        After a failure a lease is a single record, whose group is edited again as a whole.
        """
        rows = []
        for start in range(lease.start // size * size, lease.stop, size):
            group = self._evaluate_once(replace(lease, start=start, stop=start + size, attempt=1))
            rows += group[max(lease.start - start, 0) : lease.stop - start]
        return rows

    def _evaluate(self, lease: Lease) -> list[_Done]:
        evaluation = self.evaluation
        name = hive_values(lease.group)["editor"]
        found = self._records(evaluation.grid.ids(lease))
        if evaluation.config.takes_stored(name):
            return self._scored(self._stored(lease.group), found)
        if evaluation.config.grouping(name).size == 1:
            return self._scored(self.editors[name], found)
        done: list[_Done] = []
        try:
            for editor, places in turns(self.editors[name], len(found)):
                done += self._at_once(editor, [found[place] for place in places])
        except RecordError as error:
            # The model that the records share cannot be had.
            return [self._failed(record, error) for record in found]
        return done

    def _records(self, ids: Sequence[int]) -> list[Record]:
        """The records of case ids, in their order."""
        evaluation = self.evaluation
        shards = {self._shard_of[case_id]: None for case_id in ids}
        found: dict[int, Record] = {}
        for number in shards:
            shard = self._shard(number)
            chosen = shard.filter(pc.is_in(shard["case_id"], value_set=pa.array(ids)))
            found |= {record.case_id: record for record in records.from_table(chosen)}
        if missing := set(ids) - found.keys():
            raise DamagedError(
                f"{evaluation.records.uri} had case {min(missing)} in one of its shards "
                f"{sorted(shards)} when the run began, and has it no more; restore them"
            )
        return [found[case_id] for case_id in ids]

    def _scored(self, editor: Editor | RecordEditor, some: Sequence[Record]) -> list[_Done]:
        """The rows of records, each with a model of its own: one that cannot be done has its error,
        at once, since it would have it again."""
        try:
            return self._at_once(editor, some)
        except RecordError as error:
            if len(some) == 1:
                return [self._failed(some[0], error)]
        return [done for record in some for done in self._scored(editor, [record])]

    def _failed(self, record: Record, error: RecordError) -> _Done:
        log.warning("case %d cannot be done", record.case_id, exc_info=error)
        return {"case_id": record.case_id, "status": ERROR, "error": describe_error(error)}, None

    def _at_once(self, editor: Editor | RecordEditor, some: Sequence[Record]) -> list[_Done]:
        evaluation = self.evaluation
        rows, edits = evaluate(
            self.model,
            editor,
            some,
            evaluation.config.scoring,
            self.references,
            self.token_budget,
            evaluation.reversed_prompts,
            evaluation.config.prompt_template,
            lambda share: tell(self._behind + share * len(some)),
            self.entropies,
        )
        self._behind += len(rows)
        kept = edits if evaluation.config.keep_edits else [None] * len(rows)
        return list(zip(rows, kept, strict=True))

    def _stored_edits(self, group: str) -> StoredEdits:
        assert self.evaluation.config.edits is not None
        run = Store(self.evaluation.config.edits)
        return StoredEdits(run, group, self.model, self.fingerprint)

    def _solver(self, layer: int) -> Solver:
        known = self.evaluation.second_moments[layer]
        return second_moment.load_solver(at_hand(known, "second moment"))

    def _weights(self, name: str) -> Path:
        return at_hand(self.evaluation.weights[name], "trained network")

    def _editor(self, name: str) -> Editor:
        kind, settings = self.evaluation.config.editor(name)
        resources = Resources(
            self.model,
            self.evaluation.templates,
            self.solver,
            self.token_budget,
            self._weights,
        )
        return EDITORS[kind].build(resources, settings)


def _references(store: Store) -> ReferenceTexts | None:
    """The reference texts that a store has by its manifest: they may be out of sight now."""
    way_out = "Prepare the records again with jobs.prepare."
    if not manifests.read(store, ("reference_texts",), way_out)["reference_texts"]:
        return None
    return ReferenceTexts(
        store.read_table("reference_texts.parquet"), store.read_table("reference_tfidf.parquet")
    )


def held_out(config: ModelConfig) -> list[list[int]]:
    """The texts on which the drift of chains is measured, as token ids: see `corpus.held_out`."""
    return corpus.held_out(config.second_moment, load_model(config))


def model_facts(config: RunConfig, weights: Mapping[str, str]) -> dict[str, Any]:
    """Facts that need the model, once per run: its fingerprint and the context templates.

    Raises ValueError where one of the files of trained weights is not for this model.
    """
    model = load_model(config.model)
    for kind, settings in map(config.editor, config.editors):
        if (name := EDITORS[kind].trained(settings)) and name in weights:
            hypernetwork.origin_for(Path(weights[name]), model, kind)
    chosen = config.templates
    templates = chosen.texts or prompts.context_templates(
        sample_context_texts(model, chosen.lengths, chosen.seed)
    )
    return {
        "model_fingerprint": model.fingerprint(),
        "model_bytes": sum(p.numel() * p.itemsize for p in model.hf.parameters()),
        "context_templates": list(templates),
    }
