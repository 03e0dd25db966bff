"""python -m jobs.train CONFIG [--out FOLDER] [--set key=value ...]

Train KE or MEND on Ray, and draw what it learnt. Run the same line again to resume.
"""

from __future__ import annotations

from jobs.commands.train import app as app

if __name__ == "__main__":
    app()  # It comes back for what follows as a module.

import json
import math
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import typer

from cluster.calls import stream
from cluster.lock import RunLock
from cluster.progress import LOG_SECONDS
from cluster.run import FAILURES
from cluster.store import Store
from jobs import cli
from jobs.cli import say
from jobs.inputs import corpus as corpora
from jobs.inputs.record_stores import record_store
from jobs.output import figures
from jobs.runs import differences, manifests
from jobs.runs.config import CorpusConfig
from jobs.runs.config_files import filled
from jobs.runs.manifests import MANIFEST
from jobs.tasks.training import TrainConfig, best, finished, folder, read_curve, train
from rome import options
from rome.options import ConfigError
from rome.paths import inside


def load(path: str, overrides: list[str]) -> TrainConfig:
    """A training's config from its file and `key=value` overrides. Raises ConfigError."""
    data = filled(path, overrides)
    config: TrainConfig = options.validate(TrainConfig, data, f"{path}: ")
    _ = config.network_settings
    if (config.data.benchmark is None) == (config.data.corpus is None):
        raise ConfigError(f"{path}: data must name either a benchmark or a corpus")
    return config


def run(config: TrainConfig, out: str) -> int:
    """Train what is left of a training, say how it went, and give the exit status.

    0: it has come to its end. cli.STOPPED: not yet. Raises ConfigError where the folder holds
    another training, LockedError where it has a driver already, and RayError where the worker
    fails; the same line then goes on from the checkpoint.
    """
    store = Store(out)
    records = record_store(config.data.benchmark) if config.data.benchmark else None
    with RunLock(store):
        _claim(config, store, records)
        if not finished(read_curve(store), config.training):
            shown = _Shown(config)
            for state in stream(train, config, records, store, settings=config.workers):
                shown.update(state)
    curve = read_curve(store)
    if not finished(curve, config.training):
        say("stopped; the same line goes on from the last validation")
        return cli.STOPPED
    if not store.exists("figures/training.png"):
        figures.save(store, {"training": figures.training_curve(curve, config.name)})
    chosen = curve[best(curve)]
    seconds = timedelta(seconds=round(curve[-1]["seconds"]))
    say(f"{config.name}: {curve[-1]['step']} steps, {seconds}")
    say(f"unedited: {_figures(curve[0])}")
    say(f"edited, weights of step {chosen['step']}: {_figures(chosen)}")
    return 0


def _claim(config: TrainConfig, store: Store, records: Store | None) -> None:
    """Write what the training is, or check that the folder is of this one."""
    plain: dict[str, Any] = asdict(config)
    del plain["workers"]
    plain["model"] = {key: plain["model"][key] for key in ("name", "source", "dtype")}
    if records:
        plain["records"] = manifests.benchmark(records)
    else:
        plain["passages"] = corpora.identity(CorpusConfig(corpus=str(config.data.corpus)))
    now = json.loads(json.dumps(plain))
    if store.exists(MANIFEST):
        there = manifests.read(store, now, "Restore it, or choose another --out.", kinds={})
        differences.refuse_another(store.uri, there, now, "training")
    else:
        manifests.write(store, now)


class _Shown:
    """Says where a training is: each validation, and the step every ten seconds."""

    def __init__(self, config: TrainConfig) -> None:
        self.steps = config.training.steps
        self.began: tuple[float, int] | None = None
        self.said = time.monotonic()

    def update(self, state: dict[str, Any]) -> None:
        now, step = time.monotonic(), state["step"]
        if "seconds" in state:
            say(f"step {step}/{self.steps}: {_figures(state)}")
        elif self.began is None:  # The start of Ray and of the worker is not part of the rate.
            self.began, self.said = (now, step), now
        elif now - self.said >= LOG_SECONDS:
            self.said = now
            each = (now - self.began[0]) / (step - self.began[1])
            left = timedelta(seconds=round(each * (self.steps - step)))
            say(f"step {step}/{self.steps}, {each:.2f} s a step, {left} left at most")


def _figures(row: dict[str, Any]) -> str:
    paraphrases = row["val_paraphrase_accuracy"]  # NaN where the data has none.
    also = "" if math.isnan(paraphrases) else f"paraphrases {paraphrases:.1%}, "
    return (
        f"edit accuracy {row['val_edit_accuracy']:.1%}, {also}"
        f"KL {row['val_local_loss']:.4f}, loss {row['val_loss']:.4f}"
    )


def main(config: str, out: str | None = None, overrides: list[str] | None = None) -> None:
    """See `jobs.commands.train`."""
    with cli.errors(*FAILURES):
        train_config = load(config, overrides or [])
        status = run(train_config, out or str(inside(folder(), train_config.name)))
    raise typer.Exit(status)
