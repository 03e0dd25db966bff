"""Run directories to the paper's table: python -m jobs.reduce RUN_DIR... [--format FORMAT]"""

from __future__ import annotations

import io
import posixpath
from collections import defaultdict
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated
from urllib.parse import unquote

import polars as pl
import typer
from rich.console import Console, RenderableType

from cluster.store import Store
from jobs import cli, manifests, tables
from rome.summary import summarize

app = cli.new_app()

PARTS = "results/"


class Format(StrEnum):
    TABLE = "table"
    MARKDOWN = "markdown"
    LATEX = "latex"
    JSON = "json"


def reduce(run_dirs: Sequence[str]) -> pl.DataFrame:
    """The summary of every run directory, one row per editor, in the manifest's order.

    Columns: those of `rome.summary.summarize` and `records`, how many the run is to have; an
    editor without a row yet has n = 0. Into each directory go its own `summary.parquet`,
    `table.md` and `table.tex`. A run in progress is summarized as far as it has come.

    Raises ValueError where a path is no run directory, has no results yet, or holds a part that
    cannot be read: nothing is left out silently.
    """
    return pl.concat([_reduce_one(Store(run_dir)) for run_dir in run_dirs])


def _reduce_one(store: Store) -> pl.DataFrame:
    manifest = manifests.read(store)
    summary = collect(store, summarize)
    # An editor that the manifest does not know is shown, too.
    editors = dict.fromkeys([*manifest["editors"], *summary["editor"]])
    frame = (
        pl.DataFrame({"editor": list(editors)}, schema={"editor": pl.String})
        .join(summary, on="editor", how="left", maintain_order="left")
        .with_columns(
            pl.col("run").fill_null(manifest["name"]),
            pl.col("n", "dead", "duplicates", "^.*_n$").fill_null(0),
            pl.lit(manifest["records"], pl.Int64).alias("records"),
        )
        .select(*summary.columns, "records")
    )
    write_table(store, "summary.parquet", frame)
    store.write_bytes("table.md", tables.markdown(frame).encode())
    store.write_bytes("table.tex", tables.latex(frame).encode())
    return frame


def write_table(store: Store, name: str, frame: pl.DataFrame) -> None:
    """Commit a frame as Parquet."""
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    store.write_bytes(name, buffer.getvalue())


def collect(store: Store, of: Callable[[pl.LazyFrame], pl.DataFrame]) -> pl.DataFrame:
    """`of` the result rows of a run with its hive columns, reading only what it needs.

    Raises ValueError where there is none, or a part is not whole.
    """
    parts = store.list(PARTS, ".parquet")
    if not parts:
        raise ValueError(
            f"{store.uri} has no results yet: no part in {PARTS}. "
            "Run jobs.evaluate, or wait for its first part, and reduce again."
        )
    try:
        return of(_scan(store, parts))
    except (pl.exceptions.PolarsError, OSError):
        for part in parts:
            store.read_table(part)  # Names the damaged one.
        raise


def _scan(store: Store, parts: Sequence[str]) -> pl.LazyFrame:
    folders = defaultdict(list)
    for part in parts:
        folders[posixpath.dirname(part)].append(store.address(part))
    # Not polars' own hive columns: those also come from the folders above the run directory.
    return pl.concat(
        [
            pl.scan_parquet(files, glob=False, hive_partitioning=False).with_columns(
                **{key: pl.lit(value) for key, value in _hive_columns(folder).items()}
            )
            for folder, files in folders.items()
        ]
    )


def _hive_columns(folder: str) -> dict[str, str]:
    pairs = (name.split("=", 1) for name in folder.split("/") if "=" in name)
    return {key: unquote(value) for key, value in pairs}


@app.command()
def main(
    run_dirs: Annotated[list[str], typer.Argument(help="Run directories, local or s3://...")],
    format: Annotated[Format, typer.Option(help="What to print.")] = Format.TABLE,
) -> None:
    """Print and write the table of one or more runs, finished or in progress."""
    with cli.errors():
        frame = reduce(run_dirs)
    show(frame, format)


def show(frame: pl.DataFrame, format: Format = Format.TABLE) -> None:
    """Print a summary to stdout; what a reader of the table has to know goes to stderr."""
    match format:
        case Format.TABLE:
            print_table(tables.terminal(frame))
        case Format.MARKDOWN:
            typer.echo(tables.markdown(frame), nl=False)
        case Format.LATEX:
            typer.echo(tables.latex(frame), nl=False)
        case Format.JSON:
            typer.echo(frame.write_json())
    for note in tables.notes(frame):
        typer.echo(note, err=True)


def print_table(table: RenderableType) -> None:
    """To stdout; in a log or a pipe it is not cut to the width of a terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = Console(width=1000).measure(table).maximum
    console.print(table)


if __name__ == "__main__":
    app()
