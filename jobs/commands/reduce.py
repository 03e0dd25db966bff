"""The command line of `jobs.reduce`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from jobs import cli

app = cli.new_app()


class Format(StrEnum):
    TABLE = "table"
    MARKDOWN = "markdown"
    LATEX = "latex"
    JSON = "json"


@app.command()
def main(
    run_dirs: Annotated[list[str], typer.Argument(help="Run directories, local or s3://...")],
    format: Annotated[Format, typer.Option(help="What to print.")] = Format.TABLE,
) -> None:
    """Print and write the table of one or more runs, finished or in progress."""
    with cli.errors():
        cli.check_runs(run_dirs)
    cli.job("reduce").main(run_dirs, format)
