"""python -m jobs.compare RUN_DIR... [--metric ES ...] [--format FORMAT] [--out FILE]

Every pair of editors of one or more runs, compared on the records that both have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cluster.store import Store
from jobs import cli
from jobs.output.tables import pipes
from jobs.runs import config as configs
from jobs.runs import manifests
from jobs.runs.parts import collect
from rome.analysis import comparison
from rome.analysis.metrics import table_of
from rome.analysis.summary import with_metrics
from rome.data.results import OK

app = cli.new_app()


class Format(StrEnum):
    TABLE = "table"
    MARKDOWN = "markdown"


def read(run_dirs: Sequence[str]) -> pl.DataFrame:
    """The result rows of all runs with their metrics, one per (`label`, `case_id`).

    A label is the editor's name, after the run directory's where two runs have the same editor.
    Raises ValueError where a path is no run directory with results, or where runs differ in what
    makes their numbers comparable: benchmark, weights, protocol or scoring.
    """
    stores = [Store(run_dir) for run_dir in run_dirs]
    for one, other in pairwise(stores):
        _refuse_another(one, other)
    rows = pl.concat(
        [
            collect(store, lambda rows: with_metrics(rows).collect()).with_columns(
                folder=pl.lit(store.uri.rstrip("/").rpartition("/")[2])
            )
            for store in stores
        ]
    )
    shared = pl.col("folder").n_unique().over("editor") > 1
    return (
        rows.with_columns(
            label=pl.when(shared)
            .then(pl.format("{}/{}", "folder", "editor"))
            .otherwise(pl.col("editor"))
        )
        # As in the summary, a scored row is kept in preference to a dead letter.
        .sort(pl.col("status") != OK, maintain_order=True)
        .unique(("label", "case_id"), keep="first", maintain_order=True)
    )


def _refuse_another(one: Store, other: Store) -> None:
    there, now = (
        {key: manifest.get(key) for key in ("benchmark", "model_fingerprint", "protocol")}
        | {"scoring": manifest.get("config", {}).get("scoring")}
        for manifest in (manifests.read(store) for store in (one, other))
    )
    if changed := configs.difference(there, now):
        raise ValueError(
            "runs can be compared if benchmark, weights, protocol and scoring are the same; "
            f"{other.uri} differs from {one.uri}, which is 'there':\n" + "\n".join(changed)
        )


def compare(run_dirs: Sequence[str], metrics: Sequence[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """`rome.analysis.comparison.compare` and `health` of the editors of the runs; see `read`.

    `metrics`: empty for those of the paper's table of the benchmark.
    """
    rows = read(run_dirs)
    if not metrics:
        counterfact = [name for name in table_of("counterfact")[1:] if rows[name].count()]
        metrics = counterfact or table_of("zsre")
    return comparison.compare(rows, metrics), comparison.health(rows)


Cell = Callable[[dict[str, Any]], str]

_PAIRS: dict[str, Cell] = {
    "Metric": lambda row: row["metric"],
    "A": lambda row: row["a"],
    "B": lambda row: row["b"],
    "n": lambda row: f"{row['n']}",
    "A is": lambda row: f"{row['mean_a']:z.1f}",
    "B is": lambda row: f"{row['mean_b']:z.1f}",
    "A - B": lambda row: f"{row['difference']:+.1f}",
    "95 %": lambda row: "–" if row["low"] is None else f"{row['low']:+.1f} to {row['high']:+.1f}",
    "Test": lambda row: row["test"],
    "p": lambda row: f"{row['p']:.2g}",
    "p (Holm)": lambda row: f"{row['p_holm']:.2g}",
}
_PAIRS_CAPTION = (
    "All x 100, over the records that both have; 95 %: bootstrap clustered by relation; "
    "p (Holm): adjusted for all pairs and metrics shown."
)


def _count(name: str) -> Cell:
    return lambda row: "–" if row[name] is None else str(row[name])


_HEALTH: dict[str, Cell] = {
    "Editor": lambda row: row["label"],
    "Edits": _count("n"),
    "Small divisor": _count("small_divisor"),
    "Large norm": _count("large_norm"),
    "Low entropy": _count("low_entropy"),
    "Disabling": _count("disabling"),
}
_HEALTH_CAPTION = (
    f"Small divisor: below {comparison.SMALL_DIVISOR:g} of the editor's median. "
    f"Disabling: the update's norm is above {comparison.LARGE_NORM:g} times the editor's median, "
    f"or GE below {comparison.LOW_ENTROPY:g} of the unedited model's on the same record."
)


def _terminal(frame: pl.DataFrame, cells: dict[str, Cell], caption: str) -> Table:
    table = Table(*cells, box=SIMPLE_HEAD, caption=caption)
    for row in frame.to_dicts():
        table.add_row(*(cell(row) for cell in cells.values()))
    return table


def _markdown(frame: pl.DataFrame, cells: dict[str, Cell], caption: str) -> str:
    rows = [[cell(row) for cell in cells.values()] for row in frame.to_dicts()]
    return f"{pipes(list(cells), rows, len(cells))}\n\n{caption}\n"


@app.command()
def main(
    run_dirs: Annotated[list[str], typer.Argument(help="Run directories, local or s3://...")],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric; may be repeated [those of the paper's table]."),
    ] = None,
    format: Annotated[Format, typer.Option(help="What to print.")] = Format.TABLE,
    out: Annotated[Path | None, typer.Option(help="Write the pairs to this Parquet file.")] = None,
) -> None:
    """Compare the editors of one or more runs in pairs, record by record."""
    with cli.errors():
        pairs, health = compare(run_dirs, metric or [])
        if out:
            pairs.write_parquet(out)
    shown = [(pairs, _PAIRS, _PAIRS_CAPTION), (health, _HEALTH, _HEALTH_CAPTION)]
    for frame, cells, caption in shown[: 2 if len(health) else 1]:
        if format == Format.TABLE:
            cli.print_table(_terminal(frame, cells, caption))
        else:
            typer.echo(_markdown(frame, cells, caption))


if __name__ == "__main__":
    app()
