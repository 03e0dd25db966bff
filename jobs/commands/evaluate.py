"""The command line of `jobs.evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs import cli

app = cli.new_app()


@app.command()
def main(
    config: Annotated[str, typer.Argument(help="A file of configs/runs, or your own.")],
    out: Annotated[
        str | None,
        typer.Option(help="Run directory or URI, whose last part names the run [runs/NAME]."),
    ] = None,
    overrides: cli.Overrides = None,
    edits: Annotated[
        str | None, typer.Option(help="Score the edits that this run kept: edits=RUN_DIR.")
    ] = None,
    retry_dead: Annotated[
        bool, typer.Option("--retry-dead", help="Do dead letters again: workers.retry_dead=true.")
    ] = False,
) -> None:
    """Evaluate every editor of a run over its records; the same line resumes.

    A run of several models has a run directory for each of them in its own.
    """
    with cli.errors():
        cli.check_run_config(config, overrides)
    cli.job("evaluate").main(config, out, overrides, edits, retry_dead)
