"""The command line of `jobs.export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs import cli

app = cli.new_app()


@app.command()
def main(
    run_dir: Annotated[str, typer.Argument(help="Run directory, local or s3://...")],
    row: Annotated[str, typer.Argument(help="A checkpoint of its table, such as memit@1000.")],
    out: Annotated[Path, typer.Option(help="Folder for the model.", callback=cli.on_this_machine)],
    order: Annotated[int, typer.Option(help="Which order of the chain.")] = 0,
    chain: Annotated[int, typer.Option(help="Which chain, where the records make several.")] = 0,
) -> None:
    """Write the model at a checkpoint of a chain as a folder that transformers loads."""
    with cli.errors():
        cli.check_runs([run_dir])
    cli.job("export").main(run_dir, row, out, order, chain)
