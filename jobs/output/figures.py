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
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.store import Store
from jobs.cli import say
from rome.analysis.effects import ROLES
from rome.editors.contexts import Position

# Okabe and Ito, without the yellow that is lost on white and the second blue; lines differ in their
# points too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
_POINTS = ("o", "s", "^", "D", "v", "P")
_GREY = "#666666"
# The paper's: one sequential scale per kind.
_MAPS = {"hidden": "Purples", "mlp": "Greens", "attention": "Reds"}
_NAMES = {"hidden": "state", "mlp": "MLP", "attention": "attention"}
# The paper's two sites, by the role of their token.
_SITES = {"last subject": "early site", "last": "late site"}
# The part of a panel's largest effect from which a site is named there.
_SITE_PART = 0.25


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


def trace_averages(
    average: pl.DataFrame, model: str, window: int, rome_layer: int | None = None
) -> Figure:
    """Average indirect effect by role and layer, one heat map per kind (Figure 2).

    The peak of each of the two sites is named in panels where it has an effect; `rome_layer` is
    marked.
    """
    matrices = {
        kind: [
            average.filter(kind=kind, role=role).sort("layer")["indirect_effect"].to_list()
            for role in ROLES
        ]
        for kind in _MAPS
        if kind in average["kind"]
    }
    title = f"{model}: average indirect effect over {max(average['facts'].to_list())} facts"
    figure = _heat_maps(matrices, ROLES, title, window)
    for axes, rows in zip(figure.axes, matrices.values(), strict=False):  # Then colour bars.
        for role, name in _SITES.items():
            _name_site(axes, rows, ROLES.index(role), name)
        _mark_layer(axes, rome_layer, shift=0.5)
    _legend(figure)
    return figure


def _name_site(axes: Axes, rows: Sequence[Sequence[float]], place: int, name: str) -> None:
    """The name at the peak of a row, if it is a part of the panel's largest effect."""
    peak, highest = max(rows[place], default=0.0), max(x for row in rows for x in row)
    if peak < _SITE_PART * highest or peak <= 0:
        return
    layer = rows[place].index(peak)
    left = layer > len(rows[place]) / 2
    axes.annotate(
        name,
        (layer + 0.5, place + 0.5),
        xytext=(-6 if left else 6, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        fontsize=8,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
    )
    axes.plot(layer + 0.5, place + 0.5, "o", color="black", markerfacecolor="white", markersize=5)


def _mark_layer(axes: Axes, layer: int | None, shift: float = 0) -> None:
    if layer is not None:
        axes.axvline(
            layer + shift, color="black", linestyle=(0, (4, 3)), linewidth=1,
            label=f"ROME's layer, {layer}",
        )  # fmt: skip


def _legend(figure: Figure) -> None:
    """One for all panels, right of them, in their own order; none if nothing has a name."""
    named: dict[str, Artist] = {}
    for axes in figure.axes:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, line)
    if named:
        figure.legend(
            [*named.values()], [*named], frameon=False, fontsize=8, loc="outside right center"
        )


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
    # A scale of its own each, or attention and MLPs vanish beside the state.
    for axes, (kind, rows) in zip(
        figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0],
        matrices.items(),
        strict=True,
    ):
        layers = max(len(row) for row in rows)
        # A role that no fact has stays blank.
        grid = [[*row] or [float("nan")] * layers for row in rows]
        image = axes.pcolormesh(grid, cmap=_MAPS[kind], vmin=0)
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


def trace_lines(
    average: pl.DataFrame, model: str, window: int, rome_layer: int | None = None
) -> Figure:
    """The averages as lines with 95 % intervals, on a scale of its own for each kind."""
    kinds = [kind for kind in _MAPS if kind in average["kind"]]
    figure = Figure(figsize=(4.2 * len(kinds) + 1.8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for look, role in enumerate(ROLES):
            rows = average.filter(kind=kind, role=role).sort("layer")
            mean, half = rows["indirect_effect"], rows["half_width"]
            name = f"{role} ({_SITES[role]})" if role in _SITES else role
            _band(axes, rows["layer"], mean, mean - half, mean + half, name, look)
        _mark_layer(axes, rome_layer)
        what = "single layer" if kind == "hidden" else f"window of {window} layers"
        axes.set_title(f"{_NAMES[kind]}, {what}", fontsize=10)
        axes.set_xlabel(f"layer of {model}")
    panels[0].set_ylabel("average indirect effect")
    _legend(figure)
    return figure


def trace_severed(average: pl.DataFrame, model: str, rome_layer: int | None = None) -> Figure:
    """Effect of states at the last subject token, with MLP or attention severed (Figure 3), and
    95 % intervals."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    names = {
        "hidden": "state",
        "attention_severed": "state, attention severed",
        "mlp_severed": "state, MLP severed",
    }
    colours = ("#999999", _COLOURS[1], _COLOURS[0])
    width = 0.8 / len(names)
    for i, ((kind, name), colour) in enumerate(zip(names.items(), colours, strict=True)):
        rows = average.filter(kind=kind, role="last subject").sort("layer")
        places = [layer + (i - 1) * width for layer in rows["layer"]]
        axes.bar(
            places, rows["indirect_effect"], width, label=name, color=colour,
            yerr=rows["half_width"], error_kw={"elinewidth": 0.6, "ecolor": _GREY},
        )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.5)
    _mark_layer(axes, rome_layer)
    axes.set_xlabel(f"restored layer of {model}, last subject token")
    axes.set_ylabel("average indirect effect")
    axes.legend(frameon=False, fontsize=8)
    return figure


def sweep_curves(frame: pl.DataFrame, model: str, rome_layer: int | None = None) -> Figure:
    """S, ES, PS and NS by layer, a line per edited token (Figure 5); the unedited model's is flat.

    `frame`: columns editor, layer and position, and M, M_low and M_high of each metric M, of which
    the bands are made: the 95 % bootstrap clustered by relation. `rome_layer` is marked.
    """
    figure = Figure(figsize=(9.4, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flat
    positions = [p for p in get_args(Position) if p in frame["position"]]
    for axes, metric in zip(panels, ("S", "ES", "PS", "NS"), strict=True):
        for position in positions:
            rows = frame.filter(position=position).sort("layer")
            middle, low, high = (rows[f"{metric}{end}"] for end in ("", "_low", "_high"))
            name, look = position.replace("_", " "), get_args(Position).index(position)
            _band(axes, rows["layer"], middle, low, high, name, look)
        for unedited in frame.filter(editor="none")[metric].drop_nulls():
            axes.axhline(unedited, color=_GREY, linestyle=":", linewidth=1.5, label="unedited")
        _mark_layer(axes, rome_layer)
        axes.set_title(metric, fontsize=10)
        axes.set_ylim(0, 102)
    for axes in figure.axes[2:]:
        axes.set_xlabel(f"edited layer of {model}")
    _legend(figure)
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
        (success, "val_paraphrase_accuracy", "paraphrases", _COLOURS[1], 100),
        (losses, "val_edit_loss", "NLL of the new fact", _COLOURS[0], 1),
        (losses, "val_local_loss", "KL on other text", _COLOURS[2], 1),
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
    look: int,
) -> None:
    colour = _COLOURS[look]
    axes.plot(layers, middle, marker=_POINTS[look], markersize=3, color=colour, label=label)
    # An interval that is null, as of a single relation, is not drawn.
    lowest, highest = low.cast(pl.Float64).to_numpy(), high.cast(pl.Float64).to_numpy()
    axes.fill_between(layers, lowest, highest, color=colour, alpha=0.15, linewidth=0)
    axes.grid(alpha=0.3)
