"""The command line of `jobs.study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs import cli

app = cli.new_app(no_args_is_help=True)


@app.command("make")
def make_command(
    run_dirs: Annotated[list[str], typer.Argument(help="One or two run directories.")],
    out: Annotated[Path, typer.Option(help="A new folder.", callback=cli.on_this_machine)],
    a: Annotated[
        str | None, typer.Option(help="An editor [the only one, or the first of two].")
    ] = None,
    b: Annotated[
        str | None, typer.Option(help="Its opponent [the second of two, else unedited].")
    ] = None,
    records: Annotated[int, typer.Option(min=1, help="Records to rate.")] = 50,
    checks: Annotated[int, typer.Option(min=0, help="Attention checks among them.")] = 4,
    seed: Annotated[int, typer.Option(help="Of records, texts, sides and order.")] = 0,
) -> None:
    """Write the rating page, DIR/pages/index.html, and its key, DIR/key.json."""
    with cli.errors():
        cli.check_runs(run_dirs)
    cli.job("study").make_command(run_dirs, out, a, b, records, checks, seed)


@app.command("tally")
def tally_command(
    study: Annotated[Path, typer.Argument(help="The folder that `make` wrote.")],
    files: Annotated[list[Path], typer.Argument(help="The files that raters sent back.")],
) -> None:
    """Print the preference ratios with intervals and agreement."""
    cli.job("study").tally_command(study, files)
