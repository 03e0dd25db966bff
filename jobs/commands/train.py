"""The command line of `jobs.train`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs import cli

app = cli.new_app()


@app.command()
def main(
    config: Annotated[str, typer.Argument(help="A file of configs/train, or your own.")],
    out: Annotated[
        str | None, typer.Option(help="Folder or URI [workspace/hypernetworks/NAME].")
    ] = None,
    overrides: cli.Overrides = None,
) -> None:
    """Train an editor; the same line resumes."""
    with cli.errors():
        cli.check_config(config, overrides)
    cli.job("train").main(config, out, overrides)
