"""Chains as their run's own table and figure: a line a checkpoint, and curves over edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cluster.store import Store
from jobs.runs.parts import AT, BATCHES, PARTS, collect, hive_values
from rome.analysis import chains
from rome.analysis.metrics import SUCCESSES, table_of
from rome.data.results import OK

if TYPE_CHECKING:  # `reduce` makes its table where no figure can be drawn.
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DRIFT = ("perplexity", "perplexity_unedited", "agreement", "norm", "norm_change")


def read(store: Store, rows: Sequence[str]) -> pl.DataFrame:
    """One row per (benchmark, model, chain, edits) of a run: `rome.analysis.chains.over_orders`,
    and means over orders of drift and of the Frobenius norms of all edited weights together
    (`norm`) and of what was changed in them (`norm_change`). Empty where it has no chains.

    `rows`: of the run's table, in whose order these are."""
    batches = store.list(f"{PARTS}{BATCHES}", ".parquet")
    if not batches:  # Most runs, whose rows need not be read for this.
        return pl.DataFrame()
    found = _sorted(chains.over_orders(collect(store, chains.by_order)), rows)
    return found.join(
        _drift(store, batches), on=["chain", "edits"], how="left", maintain_order="left"
    )


def _sorted(frame: pl.DataFrame, rows: Sequence[str]) -> pl.DataFrame:
    """With the name of the chain, in the order of the run's table."""
    places = {row: place for place, row in enumerate(rows)}
    return frame.with_columns(pl.col("editor").str.replace(AT, "").alias("chain")).sort(
        pl.col("editor").replace_strict(places, default=len(places)), maintain_order=True
    )


def _drift(store: Store, batches: Sequence[str]) -> pl.DataFrame:
    columns = ["status", "edits", *_DRIFT[:3], "weight_norms", "change_norms"]
    frames = [
        pl.DataFrame(store.read_table(name, columns)).with_columns(
            chain=pl.lit(hive_values(name)["editor"])
        )
        for name in batches
    ]
    whole = {"norm": "weight_norms", "norm_change": "change_norms"}
    return (
        pl.concat(frames)
        .filter(status=OK)
        .with_columns(
            pl.col(lists).list.eval(pl.element() ** 2).list.sum().sqrt().alias(name)
            for name, lists in whole.items()
        )
        .group_by("chain", "edits")
        .agg(pl.col(_DRIFT).mean())
    )


def table(frame: pl.DataFrame) -> Table:
    """What the table of all rows has not: how orders differ, and drift."""
    found = Table(box=SIMPLE_HEAD, padding=0, title="Chains")
    orders = max(frame["orders"].to_list())
    found.caption = (
        f"± is the deviation over {orders} orders. " if orders > 1 else ""
    ) + "Perplexity and agreement: of held-out text, with the unedited model."
    found.add_column("Editor")
    rates = _rates(frame)
    for name in ("Edits", *rates, "perplexity", "agreement", "change"):
        found.add_column(name, justify="right", no_wrap=True)
    for row in frame.to_dicts():
        scores = [_with_std(row[name], row[f"{name}_std"]) for name in rates]
        found.add_row(
            row["chain"],
            str(row["edits"]),
            *scores,
            _written("{:.2f} of {:.2f}", row["perplexity"], row["perplexity_unedited"]),
            _written("{:.1%}", row["agreement"]),
            _written("{:.2%}", row["norm_change"], by=row["norm"]),
        )
    return found


def _rates(frame: pl.DataFrame) -> Sequence[str]:
    """The scores of COUNTERFACT or, where records have one target, of zsRE."""
    return ("S", *SUCCESSES) if frame["ES"].count() else table_of("zsre")


def _with_std(value: float | None, std: float | None) -> str:
    return _written("{:.1f}", value) + ("" if std is None else f" ±{std:.1f}")


def _written(form: str, *values: float | None, by: float | None = 1.0) -> str:
    if by is None or any(value is None for value in values):
        return "–"
    return form.format(*(value / by for value in values if value is not None))


def figure(frame: pl.DataFrame, ages: pl.DataFrame, title: str) -> Figure:
    """Curves over edits, a panel a score; the last row has facts of the last checkpoint by age.

    A band is one deviation over orders on either side of the mean.
    """
    scores, drift = (
        [name for name in names if frame[name].count()]
        for names in ((*_rates(frame), "GE", "RS"), ("perplexity", "agreement"))
    )
    aged = [name for name in scores if name in ages.columns]
    rows = [scores, drift, aged] if drift else [scores, aged]
    columns = max(map(len, rows))
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(2.6 * columns, 2.3 * len(rows)), layout="constrained")
    panels = drawn.subplots(len(rows), columns, squeeze=False)
    for axes in panels.flat:
        axes.set_visible(False)
    for names, axes_of_row in zip(rows[:-1], panels, strict=False):
        for axes, name in zip(axes_of_row, names, strict=False):
            _curve(axes, frame, name)
    for axes, name in zip(panels[-1], aged, strict=False):
        _aged(axes, ages, name)
    handles, labels = panels[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    drawn.suptitle(title)
    return drawn


def _curve(axes: Axes, frame: pl.DataFrame, name: str) -> None:
    axes.set_visible(True)
    for colour, (chain, of) in _coloured(frame):
        x, y = of["edits"].to_numpy(), of[name].to_numpy()
        axes.plot(x, y, color=colour, marker="o", markersize=3, label=chain)
        if f"{name}_std" in of and of[f"{name}_std"].count():
            std = of[f"{name}_std"].fill_null(0).to_numpy()
            axes.fill_between(x, y - std, y + std, color=colour, alpha=0.2, linewidth=0)
    axes.set_title(name)
    axes.set_xlabel("edits")
    if name == "perplexity":
        axes.set_yscale("log")


def _aged(axes: Axes, ages: pl.DataFrame, name: str) -> None:
    axes.set_visible(True)
    last = ages.filter(pl.col("edits") == pl.col("edits").max().over("chain"))
    for colour, (_, of) in _coloured(last):
        axes.plot(of["age"].to_numpy(), of[name].to_numpy(), color=colour)
    axes.set_title(f"{name} by age")
    axes.set_xlabel("edits since a fact's own")


def _coloured(frame: pl.DataFrame) -> Sequence[tuple[str, tuple[str, pl.DataFrame]]]:
    import matplotlib as mpl

    colours = mpl.color_sequences["tab10"]
    chains_of = frame["chain"].unique(maintain_order=True).to_list()
    return [
        (mpl.colors.to_hex(colours[i % len(colours)]), (chain, frame.filter(chain=chain)))
        for i, chain in enumerate(chains_of)
    ]


def ages(store: Store, rows: Sequence[str]) -> pl.DataFrame:
    """`rome.analysis.chains.by_age` of a run, with the name of the chain, in the same order."""
    return _sorted(collect(store, chains.by_age), rows)
