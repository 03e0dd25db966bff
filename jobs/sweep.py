"""python -m jobs.sweep CONFIG [--out DIR] [--layers 0,3,6] [--positions ...] [--set key=value ...]

Edits at every layer and token position (Meng et al. 2022, Figure 5): a run of `jobs.evaluate` in
which the row `rome` stands once for each of them, with one table and curves at the end.
"""

from __future__ import annotations

from jobs.commands.sweep import app as app

if __name__ == "__main__":
    app()  # It comes back for what follows as a module.

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import polars as pl
import typer

from cluster.run import FAILURES
from cluster.store import Store
from jobs import cli
from jobs.cli import say
from jobs.evaluate import evaluate
from jobs.output import figures
from jobs.reduce import reduce
from jobs.runs import config as configs
from jobs.runs.config import RunConfig
from jobs.runs.parts import SWEEP, of_results, write_table
from rome import models, options
from rome.editors.contexts import Position
from rome.options import ConfigError
from rome.paths import inside, workspace
from rome.scoring.settings import ScoringSettings

_ROME = "rome"
# Curves of ES, PS, NS and S need probabilities alone.
_SCORING = ScoringSettings(None, strict=False, neighborhood_plus=False, reversed=False)


def expanded(config: RunConfig, layers: Sequence[int], positions: Sequence[str]) -> RunConfig:
    """The run with one editor for each layer and position instead of `rome`; others stay.

    Raises ConfigError where the run has no editor `rome`, or a layer or position is none.
    """
    if _ROME not in config.editors:
        raise ConfigError(f"a sweep needs the editor '{_ROME}' in the run, got {[*config.editors]}")
    if wrong := set(positions) - set(get_args(Position)):
        raise ConfigError(
            f"positions must be among {', '.join(get_args(Position))}, got {sorted(wrong)}"
        )
    outline = models.outline(config.model.source, config.model.name)
    for layer in layers:
        outline.down_projection(layer)
    settings = config.editors[_ROME]
    grid = {
        _name(layer, position): {
            "editor": _ROME,
            **settings,
            "layer": layer,
            "position": position,
        }
        for layer in layers or range(len(outline.layers))
        for position in positions
    }
    others = {name: given for name, given in config.editors.items() if name != _ROME}
    return replace(
        config,
        name=f"{config.name}-sweep",
        editors=others | grid,
        scoring=_SCORING,
    )


def _name(layer: int, position: str) -> str:
    return f"rome@layer={layer},position={position}"


def table(out: str, config: RunConfig) -> pl.DataFrame:
    """The summary of a sweep with the columns layer and position, also written as `sweep.parquet`.

    Rows of other editors have neither. GE and RS are left out: no text was written.
    """
    store = Store(out)
    places = [
        (name, settings["layer"], settings["position"])
        for name, settings in config.editors.items()
        if name.startswith(f"{_ROME}@")
    ]
    schema = {"editor": pl.String, "layer": pl.Int64, "position": pl.String}
    frame = (
        reduce([store.uri])
        .join(pl.DataFrame(places, schema=schema, orient="row"), on="editor", how="left")
        .drop("^(GE|RS)(_.*)?$")
    )
    write_table(store, SWEEP, frame)
    return frame


def _numbers(layers: str) -> list[int]:
    """Raises ConfigError where one is no number."""
    found = [layer.strip() for layer in layers.split(",") if layer.strip()]
    if wrong := [layer for layer in found if not layer.isdecimal()]:
        raise ConfigError(f"--layers must be numbers, separated by commas, got '{wrong[0]}'")
    return [int(layer) for layer in found]


def main(
    config: str,
    out: str | None = None,
    layers: str = "",
    positions: str = "",
    overrides: list[str] | None = None,
) -> None:
    """See `jobs.commands.sweep`."""
    with cli.errors(*FAILURES):
        chosen = _numbers(layers)
        given = configs.load(config, overrides or [])
        run_config = expanded(
            given,
            chosen,
            positions.split(",") if positions else get_args(Position),
        )
        out = out or str(inside(workspace() / "runs", run_config.name))
        status = evaluate(run_config, out)
        if status == cli.STOPPED and not of_results(Store(out)):
            raise typer.Exit(status)
        frame = table(out, run_config)
        # Where neither file says it, it is no choice of anybody.
        layer = options.merged(given.model.editors.get(_ROME, {}), given.editors[_ROME]).get(
            "layer"
        )
        drawn = figures.sweep_curves(frame, run_config.model.name, layer)
        figures.save(Store(out), {"sweep": drawn})
        best = frame.drop_nulls(["layer", "S"]).sort("S")
        if status != cli.STOPPED and not best.is_empty():  # Unfinished layers would not compare.
            where = best.row(-1, named=True)
            say(f"best S: {where['S']:.1f} at layer {where['layer']}, {where['position']}")
    raise typer.Exit(status)
