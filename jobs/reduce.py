"""Run directories to the paper's table: python -m jobs.reduce RUN_DIR... [--format FORMAT]"""

from __future__ import annotations

from jobs.commands.reduce import Format
from jobs.commands.reduce import app as app

if __name__ == "__main__":
    app()  # It comes back for what follows as a module.

from collections.abc import Sequence
from typing import Any

import polars as pl

from cluster.store import Store
from jobs import cli
from jobs.output import chains, tables
from jobs.runs import manifests
from jobs.runs.labels import differing_notes, run_labels
from jobs.runs.parts import collect, write_table
from rome.analysis.summary import summarize

_CHAINS = "chains.parquet"


def reduce(run_dirs: Sequence[str], *, write: bool = True) -> pl.DataFrame:
    """The summary of every run directory, one row per editor, in the manifest's order.

    Columns: those of `rome.analysis.summary.summarize` and `records`, how many the run is to have;
    an editor without a row yet has n = 0. Of several runs, `run` is the label that tells them
    apart. With `write`, `summary.parquet`, `table.md` and `table.tex` of its own go into each
    directory, and where it has chains `chains.parquet` and `figures/chains`. A run in progress is
    summarized as far as it has come.

    Raises ValueError where a path is no run directory, is given twice, has no results yet, or holds
    a part that cannot be read: nothing is left out silently.
    """
    runs = manifests.of_runs(run_dirs)
    frames = {uri: _reduce_one(Store(uri), manifest, write) for uri, manifest in runs.items()}
    if len(runs) > 1:
        labels = run_labels(runs)
        frames = {
            uri: frame.with_columns(pl.lit(labels[uri]).alias("run"))
            for uri, frame in frames.items()
        }
    # Probe sets and judges are of one run or another.
    every = pl.concat(frames.values(), how="diagonal")
    return every.with_columns(pl.col("^.*_n$").fill_null(0))


def _reduce_one(store: Store, manifest: dict[str, Any], write: bool) -> pl.DataFrame:
    summary = collect(store, summarize, manifests.origin(manifest))
    # An editor that the manifest does not know is shown, too.
    wanted = dict.fromkeys(summary["editor"], manifest["records"]) | manifests.rows(manifest)
    editors = dict.fromkeys([*manifest["editors"], *summary["editor"]])
    schema = {"editor": pl.String, "records": pl.Int64}
    frame = (
        pl.DataFrame([(name, wanted[name]) for name in editors], schema=schema, orient="row")
        .join(summary, on="editor", how="left", maintain_order="left")
        .with_columns(
            pl.col("run").fill_null(manifest["name"]),
            pl.col("n", "dead", "duplicates", "not_finite", "^.*_n$").fill_null(0),
        )
        .select(*summary.columns, "records")
    )
    if write:
        _write_chains(store, manifest)
        write_table(store, "summary.parquet", frame)
        store.write_bytes("table.md", tables.markdown(frame).encode())
        store.write_bytes("table.tex", tables.latex(frame).encode())
    return frame


def _write_chains(store: Store, manifest: dict[str, Any]) -> None:
    rows = manifest["editors"]
    found = chains.read(store, rows)
    if len(found):
        from jobs.output import figures  # A run without chains is reduced without matplotlib.

        write_table(store, _CHAINS, found)
        title = f"{manifest['name']} · {found['model'][0]}"
        figures.save(store, {"chains": chains.figure(found, chains.ages(store, rows), title)})


def main(run_dirs: list[str], format: Format = Format.TABLE) -> None:
    """See `jobs.commands.reduce`."""
    with cli.errors():
        frame = reduce(run_dirs)
        notes = differing_notes(manifests.of_runs(run_dirs))
    show(frame, format)
    if format is Format.TABLE:
        show_chains(run_dirs)
    for note in notes:
        cli.say(note)


def show_chains(run_dirs: Sequence[str]) -> None:
    """Print what the chains of runs have beside their table, as `reduce` wrote it."""
    for store in map(Store, run_dirs):
        if store.exists(_CHAINS):
            cli.print_table(chains.table(pl.read_parquet(store.read_bytes(_CHAINS))))


def show(frame: pl.DataFrame, format: Format = Format.TABLE) -> None:
    """Print a summary to stdout; what a reader of the table has to know goes to stderr."""
    match format:
        case Format.TABLE:
            cli.print_table(tables.terminal(frame))
        case Format.MARKDOWN:
            cli.tell(tables.markdown(frame).removesuffix("\n"))
        case Format.LATEX:
            cli.tell(tables.latex(frame).removesuffix("\n"))
        case Format.JSON:
            cli.tell(frame.write_json())
    for note in tables.notes(frame):
        cli.say(note)
