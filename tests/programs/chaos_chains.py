"""Real runs of chains on a tiny model, whose workers end where they are told to, and their judge.

`python -m tests.programs.chaos_chains SPEC` drives a run, SPEC being a `ChainSpec` as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from cluster.driver import RunError
from cluster.lock import LockedError
from cluster.store import Store
from jobs import evaluate as evaluate_job
from jobs.inputs.record_stores import prepare
from jobs.runs import config as configs
from jobs.runs.chains import Chain
from jobs.runs.manifests import MANIFEST
from jobs.runs.parts import BATCHES, collect
from jobs.tasks import evaluation as evaluation_task
from jobs.tasks.chains import HELD_OUT, Chains
from jobs.tasks.evaluation import Evaluation, EvaluationTask
from rome.edits.sequences import ChainState
from tests.support import tiny
from tests.support.tiny import TEMPLATES

RECORDS, ORDERS = 12, 2
CHECKPOINTS = (4, RECORDS)
CHAIN: dict[str, Any] = {
    "editor": "ultraedit",  # It carries a state, and needs no second moment.
    "down": [1],
    "learning_rate": 0.001,
    "edits_per_model": 2,
    "sequence": RECORDS // 2,
    "checkpoints": [*CHECKPOINTS],
    "orders": ORDERS,
}
BATCH, STATE, SCORES = "batch", "state", "scores"


@dataclass(frozen=True)
class ChainSpec:
    """Two chains: `root` holds records, the run and one that nothing disturbs; `log` is a local
    folder of what was done, and of the model.

    dies: points at which the worker that comes there ends, once each. pauses: at each point.
    """

    root: str
    log: str
    dies: tuple[str, ...] = ()
    pauses: float = 0.02
    workers: int = 2

    def died(self, point: str) -> bool:
        return (Path(self.log) / f"died {point}").exists()

    def was_at(self, point: str) -> bool:
        return (Path(self.log) / f"at {point}").exists()

    def changed(self, **changes: Any) -> ChainSpec:
        return replace(self, **changes)

    def dump(self) -> str:
        return json.dumps(asdict(self))

    def come_to(self, kind: str, chain: Chain, number: int) -> None:
        """A worker is inside a batch, between the commit of a state and that of its part, or
        inside the scoring of a checkpoint."""
        point = f"{kind} {chain.order} {number}"
        log = Path(self.log)
        with (log / f"runs-{os.getpid()}").open("a") as runs:
            runs.write(f"{point}\n")
        if point in self.dies and not self.died(point):
            (log / f"died {point}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (log / f"at {point}").touch()
        time.sleep(self.pauses)


class PointedChains(Chains):
    """Chains that say where they are."""

    def __init__(self, spec: ChainSpec, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._spec = spec

    def _edited(self, chain: Chain, state: ChainState, number: int) -> ChainState:
        state = super()._edited(chain, state, number)
        self._spec.come_to(BATCH, chain, number)
        return state

    def _kept(
        self, chain: Chain, state: ChainState, rows: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        rows = super()._kept(chain, state, rows)
        self._spec.come_to(STATE, chain, rows[-1]["case_id"])
        return rows

    @contextmanager
    def at(self, chain: Chain, edits: int) -> Iterator[None]:
        with super().at(chain, edits):
            self._spec.come_to(SCORES, chain, edits)
            yield


@dataclass(frozen=True)
class PointedEvaluation(Evaluation):
    spec: ChainSpec | None = None

    def task(self) -> EvaluationTask:
        evaluation_task.Chains = partial(PointedChains, self.spec)  # type: ignore
        return super().task()


def prepare_chains(spec: ChainSpec) -> None:
    """Records, a model, and the run that nothing disturbs, from which the other has its manifest:
    what a run finds out before its first lease is not what is broken here."""
    model = tiny.model("gpt2")
    tiny.save(model, Path(spec.log) / "model")
    prepare("everyday", f"{spec.root}/records", limit=RECORDS, shard_rows=4)
    _quietly(spec, "undisturbed")
    calm, run = Store(spec.root).sub("undisturbed"), Store(spec.root).sub("run")
    for name in (MANIFEST, HELD_OUT):
        run.write_bytes(name, calm.read_bytes(name))


def _config(spec: ChainSpec) -> configs.RunConfig:
    log = Path(spec.log)
    config = {
        "name": "chains",
        "model": {"name": "tiny", "source": str(log / "model"), "dtype": "float64"},
        "benchmark": f"{spec.root}/records",
        "editors": {"chain": CHAIN},
        "scoring": dict.fromkeys(("strict", "neighborhood_plus", "reversed"), False)
        | {"generation": None},
        "templates": {"texts": TEMPLATES},
        # With more, a lost lease is done again record by record, which other roundings show.
        "lease_records": 1,
        "workers": {"workers": spec.workers, "num_cpus": 1, "max_attempts": 5},
    }
    path = log / f"run-{os.getpid()}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return configs.load(path)


def drive(spec: ChainSpec) -> int:
    evaluate_job.Evaluation = partial(PointedEvaluation, spec=spec)  # type: ignore
    return evaluate_job.evaluate(_config(spec), f"{spec.root}/run")


def finish_here(spec: ChainSpec) -> None:
    """The same line again, in this process."""
    _quietly(spec, "run")


def _quietly(spec: ChainSpec, run: str) -> None:
    config, said = _config(spec.changed(workers=0)), StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        assert evaluate_job.evaluate(config, f"{spec.root}/{run}") == 0, said.getvalue()


@dataclass(frozen=True)
class Found:
    """What a run has in its store."""

    rows: pl.DataFrame
    batches: pl.DataFrame
    states: dict[str, bytes]

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.batches)


def found(root: str, run: str) -> Found:
    store = Store(root).sub(run)
    incidental = pl.selectors.starts_with("seconds") | pl.selectors.by_name("worker", "attempts")
    rows = collect(store, lambda rows: rows.collect()).drop(incidental)
    parts = store.list(f"results/{BATCHES}", ".parquet")
    batches = [
        pl.DataFrame(store.read_table(part))
        .drop(incidental)
        .with_columns(chain=pl.lit(part.rpartition("/")[0]))
        for part in parts
    ]
    names = store.list("chains/", ".safetensors")
    return Found(
        rows.sort("editor", "order", "case_id"),
        pl.concat(batches).sort("chain", "case_id"),
        {name: store.read_bytes(name) for name in names},
    )


def judge_chains(spec: ChainSpec) -> tuple[int, int, int]:
    """How many rows are lost and how many there twice, and the most runs of one of them.

    Raises AssertionError unless rows and states are, to the bit, those of the run that nothing
    disturbed, and nothing else lies there.
    """
    calm, run = found(spec.root, "undisturbed"), found(spec.root, "run")
    unique = (
        run.rows.unique(("editor", "order", "case_id")),
        run.batches.unique(("chain", "case_id")),
    )
    lost = calm.size - sum(map(len, unique))
    doubled = run.size - sum(map(len, unique))
    if not lost and not doubled:
        assert run.rows.equals(calm.rows)
        assert run.batches.drop("file", "sha256").equals(calm.batches.drop("file", "sha256"))
        named = pl.col("edits").is_in(CHECKPOINTS)
        assert run.batches.filter(named).equals(calm.batches.filter(named))
    assert run.states == calm.states, (run.states.keys(), calm.states.keys())
    assert len(run.states) == ORDERS * len(CHECKPOINTS)
    if "://" not in spec.root:
        left = [path.name for path in Path(spec.root).rglob(".tmp-*")]
        assert not left, left
    runs = Counter(
        line
        for log in Path(spec.log).glob("runs-*")
        for line in log.read_text().splitlines()
        if not line.startswith(SCORES)  # A record's line does not say which one.
    )
    return lost, doubled, max(runs.values())


if __name__ == "__main__":
    from tests.programs import chaos_chains  # So that workers import what they are sent.

    values = json.loads(sys.argv[1])
    try:
        sys.exit(chaos_chains.drive(chaos_chains.ChainSpec(**values)))
    except (LockedError, RunError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
