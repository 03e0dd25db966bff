"""python -m jobs.trace CONFIG [--out DIR] [--fact KNOWN_ID] [--set key=value ...]

Causal traces of known facts (Meng et al. 2022, Section 2) on Ray, their averages by token role, and
heat maps. Run the same line again to resume; a run in progress is drawn as far as it has come.
"""

from __future__ import annotations

from jobs.commands.trace import app as app

if __name__ == "__main__":
    app()  # It comes back for what follows as a module.

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import polars as pl
import typer

from cluster.calls import once
from cluster.grid import Grid
from cluster.run import FAILURES, run
from cluster.store import Store
from jobs import cli
from jobs.cli import say
from jobs.inputs import sources
from jobs.output import figures
from jobs.runs import manifests
from jobs.runs.config_files import filled
from jobs.runs.manifests import MANIFEST
from jobs.runs.parts import collect, hive_path, of_results, write_table
from jobs.tasks.loading import load_model
from jobs.tasks.tracing import TRACE_SCHEMA, TraceConfig, Tracing
from rome import options, tracing
from rome.analysis.effects import averages, effects, not_finite, suggested_layer
from rome.json_text import parsed
from rome.paths import inside, workspace
from rome.tracing import KnownFact

EFFECTS, AVERAGES = "effects.parquet", "averages.parquet"


def read_facts(location: str) -> tuple[list[KnownFact], str]:
    """The facts of a file or URL, and the sha256 of its bytes.

    Raises ValueError where it cannot be read, or an entry lacks a key or its subject.
    """
    data = sources.read(location)
    try:
        names = ("known_id", "subject", "attribute", "prompt")
        facts = [KnownFact(**{name: row[name] for name in names}) for row in parsed(data)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{location} must be a JSON list of facts with known_id, subject, attribute and prompt "
            f"({error})"
        ) from error
    if not facts:
        raise ValueError(f"{location} must be a JSON list of facts, and has none")
    return facts, hashlib.sha256(data).hexdigest()


def run_traces(config: TraceConfig, out: str) -> int:
    """Trace what is left of a run's facts and give the exit status, as `jobs.evaluate` does."""
    store = Store(out)
    facts, digest = read_facts(config.facts)
    # The noise is that of the whole file, however many of its facts are traced.
    manifest = _manifest(config, store, [fact.subject for fact in facts], digest)
    facts = facts[: config.limit]
    ids = tuple(fact.known_id for fact in facts)
    grid = Grid((ids,), config.lease_facts, origin=manifests.origin(manifest))
    work = Tracing(config, {f.known_id: f for f in facts}, grid, manifest["embedding_std"])
    outcome = run(
        store.sub("results"),
        [hive_path(kind=kind) for kind in config.kinds],
        grid,
        work,
        config.workers,
        expect={"model_fingerprint": manifest["model_fingerprint"]},
        begins=lambda: manifests.goes_on(store),
    )
    return cli.ended(outcome, "traces", "fact")


def _manifest(
    config: TraceConfig, store: Store, subjects: Sequence[str], digest: str
) -> dict[str, Any]:
    """The manifest there, if it is of the same run, or a new one, written first."""
    now = {"config": _plain(config), "facts": {"sha256": digest}}
    if store.exists(MANIFEST):
        there = _read(store)
        manifests.refuse_another(store, there, now)
        return there
    found = once(_model_facts, config, subjects, settings=config.workers)
    manifest = {"name": config.name, **now, **found}
    return manifests.claim(
        store, manifest, lambda there: manifests.refuse_another(store, there, now)
    )


def _read(store: Store) -> dict[str, Any]:
    return manifests.read(
        store,
        ("config", "facts", "model_fingerprint", "embedding_std"),
        "Restore it, or choose another --out.",
    )


def _plain(config: TraceConfig) -> dict[str, Any]:
    """The config as the manifest keeps it: JSON values, without what changes no result."""
    data = asdict(config)
    for key in ("facts", "workers", "token_budget"):
        del data[key]
    for key in ("editors", "second_moment", "local_copy"):
        del data["model"][key]
    plain: dict[str, Any] = json.loads(json.dumps(data))
    return plain


def _model_facts(config: TraceConfig, subjects: Sequence[str]) -> dict[str, Any]:
    model = load_model(config.model)
    return {
        "model_fingerprint": model.fingerprint(),
        "embedding_std": tracing.embedding_std(model, subjects),
    }


def read_effects(store: Store) -> pl.DataFrame:
    """The effects of a run, finished or not. Raises ValueError as `parts.collect` does."""
    origin = manifests.origin(_read(store))
    rows = collect(store, lambda rows: rows.collect(), origin, TRACE_SCHEMA, ("kind",))
    if odd := int(rows.select(not_finite().sum()).item()):
        say(f"note: {odd} traces have numbers that are not finite; they are left out")
    return effects(rows)


def reduce(out: str, rome_layer: int | None = None) -> None:
    """Write effects, averages and figures of a run, and say what they suggest.

    `rome_layer`: the layer that ROME edits, marked in the figures.
    """
    store = Store(out)
    frame = read_effects(store)
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
        "trace-averages": figures.trace_averages(average, model, window, rome_layer),
        "trace-lines": figures.trace_lines(average, model, window, rome_layer),
    }
    if average["kind"].str.ends_with("_severed").any():
        drawn["trace-severed"] = figures.trace_severed(average, model, rome_layer)
    figures.save(store, drawn)


def _knows_any(store: Store) -> bool:
    """True if a fact that the model knows was traced."""
    return bool(of_results(store)) and not read_effects(store).is_empty()


def draw_fact(out: str, known_id: int) -> None:
    """The heat maps of one fact, as in Figure 1. Raises ValueError where it was not traced."""
    store = Store(out)
    frame = read_effects(store).filter(known_id=known_id)
    if frame.is_empty():
        raise ValueError(f"{store.uri} has no trace of a known fact with known_id {known_id}")
    window = _read(store)["config"]["trace"]["window"]
    figures.save(store, {f"trace-fact-{known_id}": figures.trace_fact(frame, window)})


def main(
    config: str,
    out: str | None = None,
    fact: list[int] | None = None,
    overrides: list[str] | None = None,
) -> None:
    """See `jobs.commands.trace`."""
    with cli.errors(*FAILURES):
        chosen = options.validate(TraceConfig, filled(config, overrides or []), f"{config}: ")
        out = out or str(inside(workspace() / "traces", chosen.name))
        status = run_traces(chosen, out)
        if status == cli.STOPPED and not _knows_any(Store(out)):
            raise typer.Exit(status)
        reduce(out, chosen.model.editors.get("rome", {}).get("layer"))
        for known_id in fact or []:
            draw_fact(out, known_id)
    raise typer.Exit(status)
