"""The command line of `jobs.trace`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs import cli

app = cli.new_app()


@app.command()
def main(
    config: Annotated[str, typer.Argument(help="A file of configs/traces, or your own.")],
    out: Annotated[
        str | None, typer.Option(help="Run directory or URI [workspace/traces/NAME].")
    ] = None,
    fact: Annotated[
        list[int] | None, typer.Option(help="Draw this fact's heat maps, too (known_id).")
    ] = None,
    overrides: cli.Overrides = None,
) -> None:
    """Trace known facts and draw where they are recalled; the same line resumes."""
    with cli.errors():
        cli.check_config(config, overrides)
    cli.job("trace").main(config, out, fact, overrides)
