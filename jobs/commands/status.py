"""The command line of `jobs.status`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs import cli

app = cli.new_app()


@app.command()
def main(
    run_dir: Annotated[str, typer.Argument(help="A run directory, local or s3://...")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Say it again every ten seconds until all is done.")
    ] = False,
    failed: Annotated[
        bool, typer.Option("--failed", help="Show what failed, with the tracebacks.")
    ] = False,
) -> None:
    """Say what is done and left of a run, how fast, by whom, and what failed why."""
    with cli.errors():
        cli.check_runs([run_dir])
    cli.job("status").main(run_dir, watch, failed)
