"""python -m jobs.second_moment CONFIG [--set key=value ...]

C = E[k k^T] of every layer that a run's editors need, sharded over the cluster. Layers whose C is
there already cost nothing.
"""

from __future__ import annotations

from jobs.commands.second_moment import app as app

if __name__ == "__main__":
    app()  # It comes back for what follows as a module.

import hashlib
import json
from dataclasses import replace
from urllib.parse import quote

import typer
from pydantic import PositiveInt

from cluster.calls import once
from cluster.driver import RunError
from cluster.grid import Grid
from cluster.joining import number_of_workers
from cluster.origin import Origin
from cluster.run import FAILURES, run
from cluster.settings import RunSettings
from cluster.store import Store
from jobs import cli
from jobs.cli import say
from jobs.inputs import corpus as corpora
from jobs.inputs.corpus import Corpus
from jobs.runs import config as configs
from jobs.runs.config import CorpusConfig, RunConfig
from jobs.tasks.loading import model_fingerprint
from jobs.tasks.moments import GROUP, Moments, Weight, given, write
from rome import models, options
from rome.editors import EDITORS
from rome.json_text import JsonError, parsed
from rome.models import EditableModel
from rome.options import ConfigError
from rome.paths import workspace
from rome.second_moment import MomentOrigin
from rome.solver import UnsolvableError

# The limit of a record, which workers have by default, does not fit thousands of texts.
_CHUNK_SECONDS = 3600.0
# Of a corpus in so many chunks at most, a worker loses this many when it dies.
_CHUNKS_A_LEASE = 64
_LEASE = "lease.json"


def ensure(config: RunConfig, outline: EditableModel, fingerprint: str) -> dict[int, str]:
    """The second moment of each layer that the run's editors need: layer -> safetensors file, by
    its path or URI.

    `outline`: of the model, and `fingerprint`: of its weights. What is not there is computed, in
    one pass over the corpus for all layers; an interrupted pass goes on where it was. Raises
    UnsolvableError where the corpus has too few tokens, ValueError where the corpus or a given file
    cannot be used, RunError and LockedError as `cluster.run.run`, and typer.Exit with the exit
    status of a run that was stopped.
    """
    editors = [config.editor(name) for name in config.editors]
    layers = sorted(
        {n for kind, settings in editors for n in EDITORS[kind].second_moments(settings)}
    )
    if not layers:
        return {}
    folder = Store(config.second_moments or workspace() / "second_moments")
    folder = folder.sub(quote(config.model.name, safe=""))
    for layer in layers:
        outline.down_projection(layer)  # Raises before any work where there is no such layer.
    if config.model.second_moment.file is not None:
        return {n: _given(config, outline, n, folder, fingerprint) for n in layers}
    corpus = corpora.sized(config.model.second_moment, outline, layers[0])
    key = _key(corpus, fingerprint)
    files = {n: folder.sub(f"layer-{n}-{key}.safetensors") for n in layers}
    if missing := {n: file for n, file in files.items() if not file.exists("")}:
        _compute(
            config, corpus, outline, missing, _unfinished(folder, tuple(missing), key), fingerprint
        )
    return {n: file.uri for n, file in files.items()}


def _given(
    config: RunConfig, outline: EditableModel, layer: int, folder: Store, fingerprint: str
) -> str:
    """The file that the config names, or what a worker made of it."""
    name = outline.weight_name(layer)
    weight = Weight(layer, name, outline.sizes(name)[1])
    file, told = once(given, config.model, weight, folder, fingerprint, settings=config.workers)
    if not told:
        say(
            f"note: {file} is of a file that does not say which weights it is of; those of "
            f"{config.model.name} are assumed"
        )
    return str(file)


def _key(corpus: CorpusConfig, fingerprint: str) -> str:
    """Short hash of what decides a second moment, but for the layer."""
    decides = {"model": fingerprint, **corpora.identity(corpus)}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def _compute(
    config: RunConfig,
    chosen: CorpusConfig,
    outline: EditableModel,
    files: dict[int, Store],
    begun: tuple[tuple[int, ...], Store],
    fingerprint: str,
) -> None:
    """Compute the second moments of some layers and write their files."""
    name = config.model.name
    layers, parts = begun
    corpus = corpora.prepare(chosen, outline, parts)
    made_of = {"weights": fingerprint[:16], "layers": str([*layers]), "corpus": corpus.fingerprint}
    grid = Grid(
        (tuple(range(corpus.chunks)),),
        _lease_chunks(config.workers, corpus, parts),
        origin=Origin(made_of),
    )
    settings = replace(config.workers, record_seconds=_CHUNK_SECONDS, retry_dead=True)
    say(f"second moment of {name}, layers {list(layers)}: {corpus.chunks} chunks")
    outcome = run(parts, [GROUP], grid, Moments(config.model, layers, corpus, grid), settings)
    if outcome.stopped:
        raise typer.Exit(cli.ended(outcome, "chunks", "chunk"))
    if outcome.dead:
        _, chunk, error = outcome.dead[0]
        raise RunError(
            f"{len(outcome.dead)} of {outcome.total} chunks of the corpus failed, the first is "
            f"{chunk}: {error}. The same command tries them again."
        )
    for layer, file in files.items():
        origin = MomentOrigin(
            model=name,
            model_fingerprint=fingerprint,
            layer=layer,
            weight=outline.weight_name(layer),
            corpus=chosen.corpus,
            corpus_fingerprint=corpus.fingerprint,
        )
        device = config.model.device
        try:
            found = once(write, parts, grid, layer, origin, file, device, settings=settings)
        except UnsolvableError as error:
            parts.remove()  # More tokens are another corpus; nothing would be used.
            raise UnsolvableError(
                f"layer {layer} of {name}, corpus {chosen.corpus}, "
                f"model.second_moment.tokens={chosen.tokens}: {error}"
            ) from None
        half = f", half the tokens differ by {100 * found['half']:.2g} %" if "half" in found else ""
        say(
            f"layer {layer}: {found['tokens']:,.0f} tokens, condition number "
            f"{found['condition_number']:.3g}{half}, {outcome.seconds:.0f} s: {file.uri}"
        )
    parts.remove()


def _unfinished(folder: Store, missing: tuple[int, ...], key: str) -> tuple[tuple[int, ...], Store]:
    """The layers and the sums of a pass: of one that was stopped and has these, or of a new one.

    Of a pass that was stopped while it wrote its files, some layers are there and not missing.
    """
    for begun in sorted({name.partition("/")[0] for name in folder.list("unfinished-")}):
        *layers, its_key = begun.split("-")[1:]
        if its_key == key and set(missing) <= set(map(int, layers)):
            return tuple(map(int, layers)), folder.sub(begun)
    return missing, folder.sub(f"unfinished-{'-'.join(map(str, missing))}-{key}")


def _lease_chunks(settings: RunSettings, corpus: Corpus, parts: Store) -> int:
    """Chunks of a lease: one or a few leases for each worker, since each writes a matrix a layer.

    Decided when a pass begins, since a chunk may be in one sum only.
    """
    if not parts.exists(_LEASE):
        workers = number_of_workers(settings)
        leases = max(workers, min(4 * workers, -(-corpus.chunks // _CHUNKS_A_LEASE)))
        chunks = max(1, corpus.chunks // leases)
        parts.write_bytes(_LEASE, json.dumps({"chunks": chunks}).encode())
    where = f"{parts.uri}/{_LEASE}"
    try:
        known = options.validate(dict[str, PositiveInt], parsed(parts.read_bytes(_LEASE)), "")
        return int(known["chunks"])
    except (JsonError, ConfigError, KeyError) as error:
        raise ValueError(
            f"{where} is damaged ({error}); remove {parts.uri} and run the same command again"
        ) from None


def main(config: str, overrides: list[str] | None = None) -> None:
    """See `jobs.commands.second_moment`."""
    with cli.errors(*FAILURES):
        run_config = configs.load(config, overrides or [])
        outline = models.outline(run_config.model.source, run_config.model.name)
        fingerprint = once(model_fingerprint, run_config.model, settings=run_config.workers)
        files = ensure(run_config, outline, fingerprint)
    for layer, file in files.items():
        print(f"{layer}\t{file}")
    if not files:
        say("no editor of this run needs a second moment")
