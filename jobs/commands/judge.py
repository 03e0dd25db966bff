"""The command line of `jobs.judge`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs import cli

app = cli.new_app()


@app.command()
def main(
    run_dir: Annotated[str, typer.Argument(help="A run that kept WILD's texts.")],
    endpoint: Annotated[str, typer.Option(help="Such as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="What the server calls the judge.")],
    name: Annotated[str | None, typer.Option(help="Of its columns [the model's].")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="A file as configs/judges/correct.yaml is.")
    ] = None,
    key_env: Annotated[
        str, typer.Option(help="The variable that holds the key, if there is one.")
    ] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Questions at once.")] = 8,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds of one try.")] = 60.0,
    tries: Annotated[int, typer.Option(min=1, max=20, help="Of one question.")] = 4,
) -> None:
    """Have a model judge the texts of a run; the same line asks what is left."""
    with cli.errors():
        cli.check_runs([run_dir])
    cli.job("judge").main(
        run_dir, endpoint, model, name, prompt, key_env, concurrency, timeout, tries
    )
