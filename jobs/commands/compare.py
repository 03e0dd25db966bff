"""The command line of `jobs.compare`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from jobs import cli

app = cli.new_app()


class Format(StrEnum):
    TABLE = "table"
    MARKDOWN = "markdown"


@app.command()
def main(
    run_dirs: Annotated[list[str], typer.Argument(help="Run directories, local or s3://...")],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric; may be repeated [those of the paper's table]."),
    ] = None,
    format: Annotated[Format, typer.Option(help="What to print.")] = Format.TABLE,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the pairs to this Parquet file.", callback=cli.on_this_machine),
    ] = None,
) -> None:
    """Compare the editors of one or more runs in pairs, record by record."""
    with cli.errors():
        cli.check_runs(run_dirs)
    cli.job("compare").main(run_dirs, metric, format, out)
