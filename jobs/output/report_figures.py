"""The figures of a report: SVG that takes the page's colors, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from jobs.output.report_data import labels
from rome.data.results import OK

# After Okabe and Ito, with at least 3:1 on white and on the dark page; the first is the unedited
# model's. Markers and dashes tell the same, so that nobody needs the colors.
_INK = "#010203"
_COLORS = (_INK, "#1F83C4", "#D55E00", "#009E73", "#B566A5", "#A07800", "#6C7FD8", "#7A8793")
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", "-.", ":")
_RELATIONS = 40
_BINS = 20
_GROUPS = 10
# Numbers are drawn logarithmically from this ratio of their 95th percentile to their fifth.
_WIDE = 100
_HEALTH = {
    "edit_norm": "norm of the update",
    "edit_divisor": "divisor",
    "edit_loss": "loss of the last step",
}

Styles = dict[str, dict[str, Any]]


def styles(rows: pl.DataFrame) -> Styles:
    """The style of each label, the same in every figure."""
    names = labels(rows)
    edited = cycle(_COLORS[1:])
    unedited = set(rows.filter(editor="none")["label"])
    return {
        name: {
            "color": _INK if name in unedited else next(edited),
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _DASHES[i % len(_DASHES)],
        }
        for i, name in enumerate(names)
    }


def distributions(rows: pl.DataFrame, metrics: Sequence[str], style: Styles) -> str:
    """Share of records by value, a panel per metric and a line per editor."""
    scored = rows.filter(status=OK)

    def draw(axes: Axes, metric: str) -> None:
        values = scored[metric].drop_nulls().drop_nans()
        edges = np.linspace(*_range(values), _BINS + 1)
        for label, look in style.items():
            own = scored.filter(label=label)[metric].drop_nulls().drop_nans().to_numpy()
            if len(own):
                counts, _ = np.histogram(own, edges)
                line = {key: look[key] for key in ("color", "linestyle")}
                axes.stairs(counts / len(own), edges, label=label, linewidth=1.6, **line)
        axes.set_title(metric)
        axes.set_ylim(0)

    return _panels(draw, metrics, width=3, height=2.1, across=4)


def _range(values: pl.Series) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())  # type: ignore[arg-type]
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def relations(rows: pl.DataFrame, metrics: Sequence[str], style: Styles) -> str:
    """Means by relation, those with most records first. Empty where there are no relations."""
    scored = rows.filter(pl.col("status") == OK, pl.col("relation_id").is_not_null())
    known = (
        scored.group_by("relation_id")
        .agg(pl.col("case_id").n_unique().alias("records"))
        .sort("records", "relation_id", descending=[True, False])
        .head(_RELATIONS)
    )
    if known.is_empty():
        return ""
    means = known.join(
        scored.group_by("relation_id", "label").agg(pl.col(list(metrics)).mean() * 100),
        on="relation_id",
    )
    places = {relation: i for i, relation in enumerate(known["relation_id"])}

    def draw(axes: Axes, metric: str) -> None:
        for label, look in style.items():
            own = means.filter(label=label)
            y = [places[relation] for relation in own["relation_id"]]
            marks = look | {"linestyle": "none"}
            axes.plot(own[metric], y, label=label, markersize=5, alpha=0.85, **marks)
        axes.set_title(metric)
        axes.set_yticks(range(len(known)), [f"{r} ({n})" for r, n in known.iter_rows()])
        axes.grid(axis="y", alpha=0.25)
        axes.invert_yaxis()

    return _panels(draw, metrics, width=3.4, height=1.2 + 0.2 * len(known), across=3, sharey=True)


def differences(pairs: pl.DataFrame, metrics: Sequence[str]) -> str:
    """The paired differences with their intervals, a panel per metric."""
    names = pairs.select("a", "b").unique(maintain_order=True).rows()

    def draw(axes: Axes, metric: str) -> None:
        own = pairs.filter(metric=metric)
        y = [names.index(pair) for pair in own.select("a", "b").iter_rows()]
        ends = own.select(pl.col("low", "high").fill_null(pl.col("difference")))
        axes.hlines(y, ends["low"], ends["high"], color=_COLORS[1], linewidth=2)
        axes.plot(own["difference"], y, "o", color=_COLORS[1])
        axes.axvline(0, color=_INK, linewidth=0.8)
        axes.set_yticks(range(len(names)), [f"{a} − {b}" for a, b in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(metric)

    return _panels(draw, metrics, width=3.4, height=1.1 + 0.26 * len(names), across=3, sharey=True)


def health(rows: pl.DataFrame, metrics: Sequence[str], style: Styles) -> str:
    """Means of the metrics over tenths of the edits by each number of their health.

    Empty where no editor has such a number.
    """
    scored = rows.filter(pl.col("status") == OK, pl.col("editor") != "none")
    known = [name for name in _HEALTH if scored[name].is_finite().any()]
    finite = {name: scored[name].filter(scored[name].is_finite()) for name in known}

    def draw(axes: Axes, panel: tuple[str, str]) -> None:
        metric, name = panel
        for label, look in style.items():
            own = scored.filter(pl.col("label") == label, pl.col(name).is_finite())
            tenth = (pl.col(name).rank("ordinal") - 1) * _GROUPS // pl.len()
            points = (
                own.drop_nulls(metric)
                .group_by(tenth.alias("tenth"))
                .agg(pl.col(name).median(), pl.col(metric).mean() * 100)
                .sort("tenth")
            )
            if len(points):
                axes.plot(points[name], points[metric], label=label, markersize=4, **look)
        low, high = (finite[name].quantile(q) or 0 for q in (0.05, 0.95))
        if 0 < _WIDE * low < high:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(_HEALTH[name])
        axes.set_title(metric)

    panels = [(metric, name) for name in known for metric in metrics]
    return _panels(draw, panels, width=3.4, height=2.4, across=len(metrics)) if panels else ""


def _panels(
    draw: Callable[[Axes, Any], None],
    panels: Sequence[Any],
    *,
    width: float,
    height: float,
    across: int,
    sharey: bool = False,
) -> str:
    """An SVG of one panel each, inches wide and high, with the first one's legend below."""
    across = min(across, len(panels))
    down = -(-len(panels) // across)
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(width * across, height * down), layout="constrained")
        grid = figure.subplots(down, across, squeeze=False, sharey=sharey).flat
        for axes, panel in zip(grid, panels, strict=False):
            draw(axes, panel)
        for axes in list(figure.axes)[len(panels) :]:
            axes.remove()
        handles, names = figure.axes[0].get_legend_handles_labels()
        if handles:
            columns = min(len(names), max(1, int(width * across / 2)))
            figure.legend(handles, names, loc="outside lower center", ncols=columns)
        return _svg(figure)


_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # The same numbers give the same page.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
    ),
}


def _svg(figure: Figure) -> str:
    """The figure as an element of a page: its ink is the page's, and none of its ids is twice."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
