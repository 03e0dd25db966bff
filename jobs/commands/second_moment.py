"""The command line of `jobs.second_moment`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs import cli

app = cli.new_app()


@app.command()
def main(
    config: Annotated[str, typer.Argument(help="A file of configs/runs, or your own.")],
    overrides: cli.Overrides = None,
) -> None:
    """Compute the second moments that a run needs; what is there already is not done again."""
    with cli.errors():
        cli.check_run_config(config, overrides)
    cli.job("second_moment").main(config, overrides)
