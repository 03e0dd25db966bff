"""Figures of traces, sweeps and trainings, for the files of a run: colours that all eyes can tell
apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import matplotlib as mpl
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.store import Store
from jobs.cli import say
from rome.analysis.effects import ROLES
from rome.editors.contexts import Position

# Okabe and Ito, without the yellow that is lost on white.
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#999999", "#000000")
# The paper's: one sequential scale per kind.
_MAPS = {"hidden": "Purples", "mlp": "Greens", "attention": "Reds"}
_NAMES = {"hidden": "state", "mlp": "MLP", "attention": "attention"}


def save(store: Store, figures: Mapping[str, Figure]) -> None:
    """Write each figure as figures/NAME.png and .svg."""
    for name, figure in figures.items():
        for form in ("png", "svg"):
            buffer = io.BytesIO()
            # The same numbers give the same file, and its words are text.
            with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
                figure.savefig(buffer, format=form, dpi=160, metadata=_undated(form))
            store.write_bytes(f"figures/{name}.{form}", buffer.getvalue())
        say(f"figure: {store.uri}/figures/{name}.png")


def _undated(form: str) -> dict[str, Any]:
    return {"Date": None} if form == "svg" else {}


def trace_averages(average: pl.DataFrame, model: str, window: int) -> Figure:
    """Average indirect effect by role and layer, one heat map per kind (Figure 2)."""
    matrices = {
        kind: [
            average.filter(kind=kind, role=role).sort("layer")["indirect_effect"].to_list()
            for role in ROLES
        ]
        for kind in _MAPS
        if kind in average["kind"]
    }
    title = f"{model}: average indirect effect over {max(average['facts'].to_list())} facts"
    return _heat_maps(matrices, ROLES, title, window)


def trace_fact(frame: pl.DataFrame, window: int) -> Figure:
    """Indirect effects of one fact by token and layer (Figure 1); subject tokens have a star."""
    tokens = frame.unique("token").sort("token")
    labels = [
        text + ("*" if any("subject" in role for role in roles) else "")
        for text, roles in tokens.select("text", "roles").iter_rows()
    ]
    matrices = {
        kind: [
            frame.filter(kind=kind, token=token).sort("layer")["indirect_effect"].to_list()
            for token in tokens["token"]
        ]
        for kind in _MAPS
        if kind in frame["kind"]
    }
    title = f"indirect effect on p({frame['answer'][0].strip()})"
    return _heat_maps(matrices, labels, title, window)


def _heat_maps(
    matrices: Mapping[str, Sequence[Sequence[float]]],
    labels: Sequence[str],
    title: str,
    window: int,
) -> Figure:
    height = 1.4 + 0.26 * len(labels)
    figure = Figure(figsize=(4.2 * len(matrices) + 1.2, height), layout="constrained")
    # One scale for all, so that kinds can be compared.
    highest = max(x for rows in matrices.values() for row in rows for x in row)
    for axes, (kind, rows) in zip(
        figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0],
        matrices.items(),
        strict=True,
    ):
        layers = max(len(row) for row in rows)
        # A role that no fact has stays blank.
        grid = [[*row] or [float("nan")] * layers for row in rows]
        image = axes.pcolormesh(grid, cmap=_MAPS[kind], vmin=0, vmax=highest)
        axes.set_yticks([i + 0.5 for i in range(len(labels))], labels)
        axes.set_xticks([i + 0.5 for i in range(0, layers, 5)], range(0, layers, 5))
        if not axes.yaxis_inverted():
            axes.invert_yaxis()
        axes.set_xlabel(
            "restored layer" if kind == "hidden" else f"centre of {window} restored layers"
        )
        axes.set_title(_NAMES[kind], fontsize=10)
        figure.colorbar(image, ax=axes)
    figure.suptitle(title, fontsize=11)
    return figure


def trace_lines(average: pl.DataFrame, model: str, window: int) -> Figure:
    """The averages as lines with 95 % intervals."""
    kinds = [kind for kind in _MAPS if kind in average["kind"]]
    figure = Figure(figsize=(4.2 * len(kinds) + 1.6, 3.4), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for role, colour in zip(ROLES, _COLOURS, strict=True):
            rows = average.filter(kind=kind, role=role).sort("layer")
            mean, half = rows["indirect_effect"], rows["half_width"]
            _band(axes, rows["layer"], mean, mean - half, mean + half, role, colour)
        what = "single layer" if kind == "hidden" else f"window of {window} layers"
        axes.set_title(f"{_NAMES[kind]}, {what}", fontsize=10)
        axes.set_xlabel(f"layer of {model}")
    panels[0].set_ylabel("average indirect effect")
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def trace_severed(average: pl.DataFrame, model: str) -> Figure:
    """Effect of states at the last subject token, with MLP or attention severed (Figure 3)."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    names = {
        "hidden": "state",
        "attention_severed": "state, attention severed",
        "mlp_severed": "state, MLP severed",
    }
    colours = ("#999999", "#D55E00", "#0072B2")
    width = 0.8 / len(names)
    for i, ((kind, name), colour) in enumerate(zip(names.items(), colours, strict=True)):
        rows = average.filter(kind=kind, role="last subject").sort("layer")
        places = [layer + (i - 1) * width for layer in rows["layer"]]
        axes.bar(places, rows["indirect_effect"], width, label=name, color=colour)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_xlabel(f"restored layer of {model}, last subject token")
    axes.set_ylabel("average indirect effect")
    axes.legend(frameon=False, fontsize=8)
    return figure


def sweep_curves(frame: pl.DataFrame, model: str) -> Figure:
    """S, ES, PS and NS by layer, a line per edited token (Figure 5).

    `frame`: columns layer and position, and M, M_low and M_high of each metric M, of which the
    bands are made: the 95 % bootstrap clustered by relation.
    """
    figure = Figure(figsize=(9.4, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flat
    positions = [p for p in get_args(Position) if p in frame["position"]]
    for axes, metric in zip(panels, ("S", "ES", "PS", "NS"), strict=True):
        for position, colour in zip(positions, _COLOURS, strict=False):
            rows = frame.filter(position=position).sort("layer")
            middle, low, high = (rows[f"{metric}{end}"] for end in ("", "_low", "_high"))
            _band(axes, rows["layer"], middle, low, high, position.replace("_", " "), colour)
        axes.set_title(metric, fontsize=10)
        axes.set_ylim(0, 102)
    for axes in figure.axes[2:]:
        axes.set_xlabel(f"edited layer of {model}")
    figure.axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def training_curve(curve: Sequence[Mapping[str, Any]], name: str) -> Figure:
    """Draw the curve of a training by step: success of edits, and the two losses.

    `curve`: a row per validation, the first that of the unedited model.
    """
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    success, losses = figure.subplots(1, 2)
    steps = [row["step"] for row in curve]
    for axes, key, label, colour, scale in (
        (success, "val_edit_accuracy", "edits", _COLOURS[0], 100),
        (success, "val_paraphrase_accuracy", "paraphrases", _COLOURS[2], 100),
        (losses, "val_edit_loss", "NLL of the new fact", _COLOURS[0], 1),
        (losses, "val_local_loss", "KL on other text", _COLOURS[3], 1),
    ):
        values = [scale * row[key] for row in curve]
        if not all(map(math.isnan, values)):  # Continuations of text have no paraphrases.
            axes.plot(steps, values, marker=".", markersize=5, color=colour, label=label)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    success.set_ylim(-2, 102)
    success.set_ylabel("all tokens right, %")
    losses.set_yscale("symlog", linthresh=0.01)
    losses.set_ylabel("validation loss")
    for axes in (success, losses):
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(name, fontsize=11)
    return figure


def _band(
    axes: Axes,
    layers: pl.Series,
    middle: pl.Series,
    low: pl.Series,
    high: pl.Series,
    label: str,
    colour: str,
) -> None:
    axes.plot(layers, middle, marker=".", markersize=4, color=colour, label=label)
    # An interval that is null, as of a single relation, is not drawn.
    lowest, highest = low.cast(pl.Float64).to_numpy(), high.cast(pl.Float64).to_numpy()
    axes.fill_between(layers, lowest, highest, color=colour, alpha=0.15, linewidth=0)
    axes.grid(alpha=0.3)
