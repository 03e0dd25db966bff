"""python -m jobs.second_moment CONFIG [--set key=value ...]

C = E[k k^T] of every layer that a run's editors need, sharded over the cluster. Layers whose C is
there already cost nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from cluster.queue import Grid
from cluster.run import FAILURES, RunError, run
from cluster.store import Store
from jobs import cli
from jobs.cli import say
from jobs.inputs import corpus as corpora
from jobs.runs import config as configs
from jobs.runs.config import ModelConfig, RunConfig
from jobs.tasks.moments import GROUP, Moments, merged
from rome import models
from rome.editors import EDITORS
from rome.models import EditableModel
from rome.second_moment import (
    MomentOrigin,
    SecondMoment,
    Solver,
    UnsolvableError,
    import_npz,
    load,
    save,
)

# The limit of a record, which workers have by default, does not fit thousands of texts.
_CHUNK_SECONDS = 3600.0


def ensure(config: RunConfig) -> dict[int, str]:
    """The second moment of each layer that the run's editors need: layer -> safetensors file.

    What is not there is computed, in one pass over the corpus for all layers; an interrupted pass
    goes on where it was. Raises UnsolvableError where the corpus has too few tokens, ValueError
    where the corpus or a given file cannot be used, RunError and LockedError as `cluster.run.run`.
    """
    editors = [config.editor(name) for name in config.editors]
    layers = sorted(
        {n for kind, settings in editors for n in EDITORS[kind].second_moments(settings)}
    )
    if not layers:
        return {}
    folder = configs.workspace() / "second_moments" / quote(config.model.name, safe="")
    if config.model.second_moment.file is not None:
        outline = models.outline(config.model.source, config.model.name)
        return {n: str(_given(config.model, outline, n, folder)) for n in layers}
    key = _key(config.model)
    files = {n: folder / f"layer-{n}-{key}.safetensors" for n in layers}
    if missing := {n: file for n, file in files.items() if not file.exists()}:
        _compute(config, missing, key)
    return {n: str(file) for n, file in files.items()}


def _key(model: ModelConfig) -> str:
    """Short hash of what decides a second moment, but for the layer."""
    decides = {
        "source": model.source,
        "dtype": model.dtype,
        **corpora.identity(model.second_moment),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def _given(config: ModelConfig, model: EditableModel, layer: int, folder: Path) -> Path:
    """The file that the config names, checked; a .npz becomes a safetensors file in `folder`."""
    path = Path(str(config.second_moment.file).replace("{layer}", str(layer)))
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; model.second_moment.file must name a second moment of layer "
            f"{layer}, or be null to compute one from model.second_moment.corpus"
        )
    if path.suffix != ".npz":
        moment, origin = load(path)
        _check(path, moment, origin, model, layer)
        return path
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    imported = folder / f"layer-{layer}-{digest[:12]}.safetensors"
    if not imported.exists():
        moment = import_npz(path)
        _check(path, moment, None, model, layer)
        origin = MomentOrigin(
            model=config.name,
            model_fingerprint="not recorded",
            layer=layer,
            weight=model.weight_name(layer),
            corpus=path.name,
            corpus_fingerprint=digest,
        )
        save(imported, moment, origin)
    return imported


def _check(
    path: Path, moment: SecondMoment, origin: MomentOrigin | None, model: EditableModel, layer: int
) -> None:
    expected, size = model.sizes(model.weight_name(layer))[1], len(moment.sum_KK)
    if size != expected:
        raise ValueError(
            f"{path} must be over the {expected} key dimensions of layer {layer} of {model.name}, "
            f"got {size}: it is of another model"
        )
    if not moment.sum_KK.isfinite().all():
        raise ValueError(f"{path} must be finite, but holds infinities or NaN: compute it again")
    if origin is not None and origin.weight != model.weight_name(layer):
        raise ValueError(
            f"{path} must be of {model.weight_name(layer)}, but is of {origin.weight}; write "
            "{layer} where its name has the layer"
        )


def _compute(config: RunConfig, files: dict[int, Path], key: str) -> None:
    """Compute the second moments of some layers and write their files."""
    layers = tuple(files)
    outline = models.outline(config.model.source, config.model.name)
    for layer in layers:
        outline.down_projection(layer)  # Raises before any work where there is no such layer.
    folder = next(iter(files.values())).parent
    parts = Store(folder / f"unfinished-{'-'.join(map(str, layers))}-{key}")
    corpus = corpora.prepare(config.model.second_moment, outline, parts)
    grid = Grid((tuple(range(corpus.chunks)),), rows=1)
    settings = replace(config.workers, record_seconds=_CHUNK_SECONDS, retry_dead=True)
    say(f"second moment of {config.model.name}, layers {list(layers)}: {corpus.chunks} chunks")
    outcome = run(parts, [GROUP], grid, Moments(config.model, layers, corpus, grid), settings)
    if outcome.stopped:
        raise RunError(f"stopped: {outcome.done} of {outcome.total} chunks; run it again to go on")
    if outcome.dead:
        _, chunk, error = outcome.dead[0]
        raise RunError(
            f"{len(outcome.dead)} of {outcome.total} chunks of the corpus failed, the first is "
            f"{chunk}: {error}. The same command tries them again."
        )
    try:
        for layer, file in files.items():
            moment, model_fingerprint = merged(parts, grid, layer)
            condition = _condition_number(moment, config.model, layer)
            origin = MomentOrigin(
                model=config.model.name,
                model_fingerprint=model_fingerprint,
                layer=layer,
                weight=outline.weight_name(layer),
                corpus=config.model.second_moment.corpus,
                corpus_fingerprint=corpus.fingerprint,
            )
            save(file, moment, origin)
            say(
                f"layer {layer}: {moment.count:,} tokens, condition number {condition:.3g}, "
                f"{outcome.seconds:.0f} s: {file}"
            )
    except UnsolvableError:
        shutil.rmtree(parts.uri)  # More tokens are another corpus; nothing here would be used.
        raise
    shutil.rmtree(parts.uri)


def _condition_number(moment: SecondMoment, config: ModelConfig, layer: int) -> float:
    try:
        return Solver(moment).condition_number
    except UnsolvableError as error:
        corpus = config.second_moment
        raise UnsolvableError(
            f"layer {layer} of {config.name}, corpus {corpus.corpus}, "
            f"model.second_moment.tokens={corpus.tokens}: {error}"
        ) from error


app = cli.new_app()


@app.command()
def main(
    config: Annotated[str, typer.Argument(help="A file of configs/runs, or your own.")],
    overrides: cli.Overrides = None,
) -> None:
    """Compute the second moments that a run needs; what is there already is not done again."""
    with cli.errors(*FAILURES):
        files = ensure(configs.load(config, overrides or []))
    for layer, file in files.items():
        print(f"{layer}\t{file}")
    if not files:
        say("no editor of this run needs a second moment")


if __name__ == "__main__":
    app()
