"""python -m jobs.evaluate CONFIG [--out RUN_DIR] [--set key=value ...]

Every record under every editor of a run, on Ray. Run the same line again to resume.
"""

from __future__ import annotations

from jobs.commands.evaluate import app as app

if __name__ == "__main__":
    app()  # It comes back for what follows as a module.

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import typer

from cluster.calls import once
from cluster.grid import Grid
from cluster.progress import clock
from cluster.run import FAILURES, Outcome, run
from cluster.store import Store
from jobs import cli, second_moment
from jobs.cli import say
from jobs.inputs.record_stores import check, grid_of, record_store
from jobs.inputs.sources import reversed_prompts
from jobs.output import tables
from jobs.reduce import reduce, show, show_chains
from jobs.runs import config as configs
from jobs.runs import growth, manifests
from jobs.runs.chains import Chain, chains_of, groups_of, rows_of, with_chains
from jobs.runs.config import RunConfig, SliceConfig
from jobs.runs.fits import refuse_what_does_not_fit
from jobs.runs.labels import folder
from jobs.runs.manifests import MANIFEST, file_sha256, unchanged
from jobs.runs.parts import of_results
from jobs.tasks import states, stored_edits
from jobs.tasks.chains import HELD_OUT
from jobs.tasks.evaluation import Evaluation, group_of, held_out, model_facts
from jobs.tasks.training import trained
from rome import models
from rome.analysis.metrics import PROTOCOL
from rome.editors import EDITORS
from rome.models import EditableModel
from rome.paths import inside, workspace

# What a run goes on with.
_FOUND = ("model_fingerprint", "context_templates", "reversed_prompts")
# What a manifest says of files, and what they are.
_FILES = {"second_moments": "second moment", "weights": "trained network"}


def evaluate(config: RunConfig, out: str) -> int:
    """Do what is left of a run, print its table, and give the exit status.

    See `jobs.cli.ended`. Raises ConfigError, LockedError, RunError or ValueError with nothing lost
    that was done.
    """
    return _ended([config], [out])


def evaluate_each(chosen: Sequence[RunConfig], out: str) -> int:
    """The same for several models, one after another: each has a run directory of its name in
    `out`, and all have one table.

    Nothing begins where the settings do not fit one of the models.
    """
    if len(chosen) == 1:
        return evaluate(chosen[0], out)
    for config in chosen:
        _outlined(config)
    names = [quote(config.model.name, safe="") for config in chosen]
    return _ended(chosen, [Store(out).sub(name).uri for name in names])


def _ended(chosen: Sequence[RunConfig], folders: Sequence[str]) -> int:
    """Do what is left of runs, one after another, and tell their end."""
    outcomes: dict[str, Outcome] = {}
    for config, out in zip(chosen, folders, strict=True):
        if len(chosen) > 1:
            say(f"{config.model.name}: {out}")
        outcomes[out] = _rows(config, out)
        if outcomes[out].stopped:
            break
    if begun := [out for out in outcomes if of_results(Store(out))]:
        show(reduce(begun))
        show_chains(begun)
    statuses = {out: cli.ended(outcome, "rows", "case") for out, outcome in outcomes.items()}
    ends = {Store(out).uri: outcomes[out] for out in statuses if statuses[out] != cli.STOPPED}
    for uri, outcome in ends.items():
        say(f"run: {uri}, in {clock(outcome.seconds)}")
    for uri in ends:  # A report is of one model.
        page = f"{uri.rpartition('/')[2]}.html" if len(chosen) > 1 else "report.html"
        say(f"next: {cli.shell('report', uri, '--out', page)}")
    return max(statuses.values())  # Stopped, else with dead letters, else done.


def _rows(config: RunConfig, out: str) -> Outcome:
    store = Store(out)
    records = record_store(config.benchmark)
    if config.edits:  # Absolute, since a worker's folder is another.
        config = replace(config, edits=Store(config.edits).uri)
    check(records)
    rows = config.lease(gpus=False)
    grid = grid_of(records, config.records, rows, max(map(config.together, config.editors)))
    benchmark = manifests.benchmark(records)
    groups, chains = _groups(config, benchmark["name"], grid)
    now = {"config": configs.plain(config), "benchmark": benchmark, "protocol": PROTOCOL}
    counts = {"records": len(grid), "table_rows": rows_of(config, grid, chains)}
    manifest = _manifest(config, store, records, grid, now, counts)
    grid = replace(grid, origin=manifests.origin(manifest))
    config = _sized(config, manifest.get("model_bytes", 0))
    if chains:
        grid = with_chains(grid, chains)
        _hold_out(config, store)

    def begins() -> None:
        manifests.grow(store, now, counts)
        manifests.goes_on(store)

    evaluation = Evaluation(
        config=config,
        records=records,
        grid=grid,
        templates=tuple(manifest["context_templates"]),
        second_moments={int(layer): file for layer, file in manifest["second_moments"].items()},
        weights=manifest["weights"],
        reversed_prompts=manifest["reversed_prompts"],
        run=store,
        chains={group: chain for chain in chains for group in groups_of([chain])},
    )
    outcome = run(
        store.sub("results"),
        [*groups_of(chains), *groups],
        grid,
        evaluation,
        config.workers,
        gpu_rows=config.lease(gpus=True),
        expect={"model_fingerprint": manifest["model_fingerprint"]},
        name=config.name,
        begins=begins,
        so_far=lambda: _so_far(store),
    )
    if not outcome.stopped:
        for chain in chains:
            states.remove_what_is_done_with(store, chain)
    return outcome


def _so_far(store: Store) -> str:
    """The table of what is done; a chain's edits come before its first scores."""
    if not of_results(store):
        return "no record is scored yet"
    return tables.brief(reduce([store.uri], write=False))


def _groups(config: RunConfig, benchmark: str, grid: Grid) -> tuple[list[str], list[Chain]]:
    """The groups of the rows that are no chains, and the chains of the others."""
    ids = [case_id for shard in grid.shards for case_id in shard]
    groups, chains = [], []
    for editor in config.editors:
        group = group_of(config, benchmark, editor)
        if config.grouping(editor).checkpoints:
            chains += chains_of(config, editor, group, ids)
        else:
            groups.append(group)
    return groups, chains


def _hold_out(config: RunConfig, store: Store) -> None:
    """Keep the texts on which drift is measured, unless they are there."""
    if not store.exists(HELD_OUT):
        ids = once(held_out, config.model, settings=config.workers)
        column = pa.array(ids, pa.list_(pa.int32()))
        store.write_table(HELD_OUT, pa.table({"ids": column}))


def _sized(config: RunConfig, model_bytes: int) -> RunConfig:
    """The config with the memory of a worker, unless it says so itself."""
    if config.workers.memory_gib or not model_bytes:
        return config
    # What the weights are converted from, and a pass.
    memory_gib = 1.25 * model_bytes / 2**30 + 1
    return replace(config, workers=replace(config.workers, memory_gib=memory_gib))


def _manifest(
    config: RunConfig,
    store: Store,
    records: Store,
    grid: Grid,
    now: dict[str, Any],
    counts: dict[str, Any],
) -> dict[str, Any]:
    """The run's manifest: the one there, if it is of the same run, or a new one, written first.

    `now`, `counts`: see `manifests.grow`.
    """
    if store.exists(MANIFEST):
        there = manifests.read(
            store,
            (*now, *_FOUND, *_FILES),
            "Restore it. Or, if this is the config that the run began with, move it away: the same "
            "line writes it again and goes on with the rows that are there.",
        )
        manifests.refuse_another(store, there, now)
        if growth.grows(there, now):
            had = SliceConfig(**there["config"]["records"])
            growth.refuse(config, grid_of(records, had, grid.rows), grid)
        for key, what in _FILES.items():
            for known in there[key].values():
                if Path(known["file"]).exists():  # The workers' files may be on other machines.
                    unchanged(known, what)
        return there
    # Refused at once: what is not there or does not fit.
    weights, outline = _outlined(config)
    say(f"loading {config.model.name}: its facts and the context templates of the run")
    facts = once(model_facts, config, weights, settings=config.workers)
    sized = _sized(config, facts["model_bytes"])
    files = {}
    if not config.edits:
        files = second_moment.ensure(sized, outline, facts["model_fingerprint"])
    manifest = {
        "name": config.name,
        **now,
        **facts,
        "reversed_prompts": reversed_prompts(),
        "editors": list(counts["table_rows"]),
        **counts,
        "records_store": records.uri,
        "second_moments": {
            str(layer): {"file": file, "sha256": file_sha256(file)} for layer, file in files.items()
        },
        "weights": {
            name: {"file": file, "sha256": file_sha256(file)} for name, file in weights.items()
        },
    }
    if config.edits:
        stored_edits.check(config, manifest)
    return manifests.claim(
        store, manifest, lambda there: manifests.refuse_another(store, there, now)
    )


def _outlined(config: RunConfig) -> tuple[dict[str, str], EditableModel]:
    """The trained weights of a run, and the outline of its model, which its settings fit.

    Raises ConfigError where they do not, or weights are not there.
    """
    weights = _weights(config)
    outline = models.outline(config.model.source, config.model.name)
    refuse_what_does_not_fit(config, outline)
    return weights, outline


def _name_of(out: str, given: str) -> str:
    """A run is called as its folder is, unless it began under another name."""
    store = Store(out)
    if store.exists(MANIFEST):
        return str(manifests.read(store, ("name",)).get("name"))
    return folder(store.uri).rpartition("/")[2] or given


def _weights(config: RunConfig) -> dict[str, str]:
    """The trained weights that the run's editors need: name -> file. Raises ConfigError."""
    editors = [config.editor(name) for name in config.editors if not config.takes_stored(name)]
    names = {EDITORS[kind].trained(settings) for kind, settings in editors}
    return {name: trained(name) for name in sorted(filter(None, names))}


def main(
    config: str,
    out: str | None = None,
    overrides: list[str] | None = None,
    edits: str | None = None,
    retry_dead: bool = False,
) -> None:
    """See `jobs.commands.evaluate`."""
    given = [*(overrides or [])]
    given += ["workers.retry_dead=true"] if retry_dead else []
    given += [f"edits={json.dumps(edits)}"] if edits else []
    with cli.errors(*FAILURES):
        chosen = configs.load_each(config, given)
        if out and not any(override.startswith("name=") for override in given):
            name = _name_of(out, chosen[0].name)
            chosen = [replace(one, name=name) for one in chosen]
        status = evaluate_each(chosen, out or str(inside(workspace() / "runs", chosen[0].name)))
    raise typer.Exit(status)
