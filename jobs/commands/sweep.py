"""The command line of `jobs.sweep`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs import cli

app = cli.new_app()


@app.command()
def main(
    config: Annotated[str, typer.Argument(help="A run with the editor rome.")],
    out: Annotated[
        str | None, typer.Option(help="Run directory or URI [workspace/runs/NAME-sweep].")
    ] = None,
    layers: Annotated[str, typer.Option(help="Layers, separated by commas [all].")] = "",
    positions: Annotated[str, typer.Option(help="Positions, separated by commas [all].")] = "",
    overrides: cli.Overrides = None,
) -> None:
    """Edit at every layer and token, and draw the scores; the same line resumes."""
    with cli.errors():
        cli.check_run_config(config, overrides)
    cli.job("sweep").main(config, out, layers, positions, overrides)
