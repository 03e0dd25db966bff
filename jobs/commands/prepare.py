"""The command line of `jobs.prepare`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jobs import cli
from jobs.inputs import SHARD_ROWS, Separator


class _PrepareByDefault(TyperGroup):
    """`SOURCE --out DIR` alone means `prepare SOURCE --out DIR`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args[:1] == ["--help"] or (args and args[0] in self.commands)
        return super().parse_args(ctx, args if named else ["prepare", *args])


app = cli.new_app(cls=_PrepareByDefault)


@app.command("prepare")
def _prepare(
    source: Annotated[
        str,
        typer.Argument(help="Benchmark, JSON file or URL, `datasets` id or folder, or fact table."),
    ],
    out: Annotated[str, typer.Option(help="Folder or URI of the store.")],
    shard_rows: Annotated[int, typer.Option(help="Records in a shard.")] = SHARD_ROWS,
    limit: Annotated[int | None, typer.Option(help="Take the first rows only.")] = None,
    skip_invalid: Annotated[bool, typer.Option(help="Leave bad rows out and list them.")] = False,
    reference_texts: Annotated[
        str | None, typer.Option(help="File or URL in the form of attribute_snippets.json.")
    ] = None,
    separator: Annotated[
        Separator,
        typer.Option(help="Between prompts and targets; script: none where no one writes a space."),
    ] = "space",
    probe_templates: Annotated[
        str | None,
        typer.Option(help="YAML: probe set -> text with {} for its prompts, such as examples."),
    ] = None,
) -> None:
    """Turn a source into a store of records (the default command)."""
    cli.job("prepare").prepare_command(
        source,
        out,
        shard_rows,
        limit,
        skip_invalid,
        reference_texts,
        separator,
        probe_templates,
    )


@app.command("describe")
def _describe(store: Annotated[str, typer.Argument(help="Folder or URI of a store.")]) -> None:
    """Print what a store is composed of, in the shape of the paper's Table 2."""
    cli.job("prepare").describe_command(store)
