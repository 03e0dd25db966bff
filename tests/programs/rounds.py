"""A round of the meter: the oracle's and the engine's way through the same records, and how far
apart their numbers are.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rome.data.results import OK, PROMPT_KINDS, RESULT_SCHEMA
from rome.editors import Editor, Unedited, values
from rome.editors.rome import Rome
from rome.edits.deltas import Edit, dense
from rome.evaluation import evaluate
from rome.scoring import generation, probabilities
from rome.scoring.settings import ScoringSettings
from tests.programs import bench
from tests.programs.bench import Bench
from tests.support import oracle, reference

RECORD_STAGES = ("edit", "probabilities", "generation")
STAGES = (*RECORD_STAGES, "row")
MODELS = ("unedited", "edited")


@dataclass(frozen=True)
class Distance:
    """How far the engine's numbers are from the oracle's, or may be; the worst of all records."""

    direction: float = 0.0
    """|u - u'| of the directions C^-1 k*, which have unit norm."""
    value: float = 0.0
    """|v* - v*'| / |v*|."""
    log_p: float = 0.0
    """Of a target, in nats."""
    texts: float = 0.0
    """Share of the generated texts that are not equal; a rounding may flip a draw."""


# float32: ten times the tolerance of the parity tests. The others are the borders of a mistake;
# whether what they do to the numbers is good enough is a question to the benchmark, not to a meter.
ALLOWED = {
    "float32": Distance(1e-3, 1e-3, 1e-3, 0.25),
    "tf32": Distance(1e-2, 0.1, 1.0, 1.0),
    "bfloat16": Distance(0.03, 0.25, 3.0, 1.0),
}


@dataclass
class Round:
    """What one side needed and computed, once through its records."""

    seconds: dict[str, float] = field(default_factory=dict)
    """By row of the table, all records together."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """By stage, over what was in use when it began."""
    outcomes: list[oracle.Outcome] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    nlls: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """By (model, record): of target_new and target_true in turn after each prompt."""
    texts: dict[tuple[str, int], list[list[int]]] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of a whole row of either model, the seconds of its parts."""


class Clock:
    """Adds seconds and peak memory to a round."""

    def __init__(self, round_: Round, device: torch.device) -> None:
        self.round, self.cuda = round_, device.type == "cuda"

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def row(self, *names: str) -> Iterator[None]:
        began = self._now()
        yield
        seconds = self._now() - began
        for name in names:
            self.round.seconds[name] = self.round.seconds.get(name, 0.0) + seconds

    @contextmanager
    def stage(self, name: str, *, of_record: bool = True) -> Iterator[None]:
        """Seconds count for the whole record too, unless it is not one of its stages."""
        before = self._reset_peak()
        with self.row(name, *(["record"] if of_record else [])):
            yield
        peak = torch.cuda.max_memory_allocated() if self.cuda else _memory("VmHWM")
        self.round.peak_bytes[name] = max(self.round.peak_bytes.get(name, 0), peak - before)

    def _reset_peak(self) -> int:
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        # What the other side freed goes back to the system, or it would hide what this one takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # The high-water mark begins anew.
        return _memory("VmRSS")


def _memory(name: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def run_oracle(made: Bench, stages: Sequence[str], edits: Sequence[Edit]) -> Round:
    """One record at a time. `edits` are scored where the edit is not to be measured."""
    model, layer = made.reference, made.settings.layer
    assert model is not None
    done = Round()
    clock = Clock(done, model.device)
    for r, record in enumerate(made.oracle_records):
        if "edit" in stages:
            with clock.stage("edit"):
                chosen = reference.contexts(model, made.templates, record.request)
                with clock.row("keys"):
                    u_K = reference.direction(model, layer, chosen, made.inverse_KK)
                with clock.row("values"):
                    outcome = reference.value(model, made.settings, chosen, u_K)
            done.outcomes.append(outcome)
            change_DK = torch.outer(outcome.lambda_D, outcome.u_K)
        else:
            change_DK = dense(oracle.rank_one(edits[r]))
        for name in MODELS:
            with oracle.edited(model, layer, change_DK) if name == "edited" else nullcontext():
                if "probabilities" in stages:
                    with clock.stage("probabilities"):
                        done.nlls[name, r] = reference.probabilities(model, record)
                if "generation" in stages:
                    with clock.stage("generation"):
                        done.texts[name, r] = reference.generate(model, record, made.generation)
    return done


def run_engine(
    made: Bench, stages: Sequence[str], edits: Sequence[Edit], token_budget: int
) -> Round:
    """All records in batches, by a new editor: nothing is kept from one round to the next."""
    model, records = made.engine, made.records
    done = Round(edits=list(edits))
    clock = Clock(done, model.device)
    if "edit" in stages:
        optimise = values.optimise

        def timed(*args: Any, **kwargs: Any) -> Any:
            with clock.row("values"):
                return optimise(*args, **kwargs)

        with mock.patch.object(values, "optimise", timed), clock.stage("edit"):
            rome = Rome(model, made.settings, made.templates, made.solver, token_budget)
            done.edits = rome.edit([record.request for record in records])
        done.seconds["keys"] = done.seconds["edit"] - done.seconds["values"]
    unedited = [Edit(record.request) for record in records]
    for name, applied in zip(MODELS, (unedited, done.edits), strict=True):
        if "probabilities" in stages:
            with clock.stage("probabilities"):
                columns = probabilities.score_records(model, records, applied, token_budget)
            done.nlls |= {(name, r): _in_turn(row) for r, row in enumerate(columns)}
        if "generation" in stages:
            with clock.stage("generation"):
                starts = generation.record_starts(model, records)
                texts = generation.generate(model, starts, applied, made.generation, token_budget)
            for start, text in zip(starts, texts, strict=True):
                done.texts.setdefault((name, start.edit), []).append(text)
    if "row" in stages:
        rome = Rome(model, made.settings, made.templates, made.solver, token_budget)
        editors: list[Editor] = [Unedited(), rome]
        for name, editor in zip(MODELS, editors, strict=True):
            with clock.stage(f"row, {name}", of_record=False):
                _write_rows(made, editor, token_budget, done.parts.setdefault(name, {}))
    return done


def _write_rows(made: Bench, editor: Editor, token_budget: int, seconds: dict[str, float]) -> None:
    """What a worker of `jobs.evaluate` does with a lease: rows, the weights' hash, a Parquet part.

    RS, for which a benchmark brings the texts, is left out. `seconds` takes the parts' seconds.
    """
    rows, _ = evaluate(
        made.engine,
        editor,
        made.records,
        ScoringSettings(made.generation),
        None,
        token_budget,
        bench.reversed_prompts(),
        entropies=bench.entropies(made.engine.device),
    )
    for stage in ("edit", "probabilities", "greedy", "generation"):
        seconds[stage] = sum(row[f"seconds_{stage}"] for row in rows)
    began = time.perf_counter()
    made.engine.fingerprint()
    seconds["fingerprint"] = time.perf_counter() - began
    began = time.perf_counter()
    facts = {"run": "meter", "status": OK, "attempts": 1}
    table = pa.Table.from_pylist([facts | row for row in rows], schema=RESULT_SCHEMA)
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
    seconds["parquet"] = time.perf_counter() - began


def _in_turn(columns: dict[str, list[float]]) -> list[float]:
    return [
        nll
        for kind in PROMPT_KINDS
        for pair in zip(columns[f"{kind}_nll_new"], columns[f"{kind}_nll_true"], strict=True)
        for nll in pair
    ]


def distance(theirs: Round, ours: Round) -> Distance:
    """How far the engine is from the oracle on the oracle's records."""
    direction = value = log_p = 0.0
    for outcome, edit in zip(theirs.outcomes, ours.edits, strict=False):
        delta = oracle.rank_one(edit)
        direction = max(
            direction, float((delta.right_KR[:, 0].to(outcome.u_K) - outcome.u_K).norm())
        )
        # v* = W k + divisor * Lambda, with W k the oracle's.
        change_D = edit.health["divisor"] * delta.left_DR[:, 0].to(outcome.lambda_D)
        apart_D = change_D - outcome.divisor * outcome.lambda_D
        value = max(value, float(apart_D.norm() / outcome.target_D.norm()))
    for key, nlls in theirs.nlls.items():
        log_p = max(log_p, *(abs(a - b) for a, b in zip(nlls, ours.nlls[key], strict=True)))
    pairs = [
        pair
        for key, texts in theirs.texts.items()
        for pair in zip(texts, ours.texts[key], strict=True)
    ]
    return Distance(direction, value, log_p, sum(a != b for a, b in pairs) / max(len(pairs), 1))


def check(found: Distance, dtype: str, random: bool) -> None:
    """Raises ValueError where the engine computed something else than the oracle.

    With random weights and less than float32 v* is not limited: a random model has no clear
    minimum, and Adam makes whole steps of what is rounding in its gradients.
    """
    allowed = ALLOWED[dtype]
    if random and dtype != "float32":
        allowed = replace(allowed, value=math.inf)
    for name, limit in asdict(allowed).items():
        # A NaN is within no limit.
        if not asdict(found)[name] <= limit:
            raise ValueError(
                f"the engine's numbers must be the oracle's, but '{name}' is off by "
                f"{asdict(found)[name]:.2g}, at most {limit:g} is allowed ({found}): a "
                "speed-up that changes numbers is none"
            )
