"""The command line of `jobs.report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs import cli

app = cli.new_app()


@app.command()
def main(
    run_dirs: Annotated[
        list[str], typer.Argument(help="Run directories of evaluate, sweep and trace.")
    ],
    out: Annotated[
        Path, typer.Option(help="The file to write.", callback=cli.on_this_machine)
    ] = Path("report.html"),
    texts: Annotated[
        int, typer.Option(min=0, help="Generated texts to show of each record and editor.")
    ] = 2,
    records: Annotated[
        list[str] | None,
        typer.Option(
            help="Records to show with prompts and texts: failures, sample:N or all [all, or a "
            "sample of a large run]. Or the folder or URI where the records lie now, if they were "
            "moved. May be given for both."
        ),
    ] = None,
) -> None:
    """Write a report of one or more runs, finished or in progress."""
    with cli.errors():
        cli.check_runs(run_dirs)
    cli.job("report").main(run_dirs, out, texts, records or [])
