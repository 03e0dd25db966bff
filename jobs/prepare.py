"""From a source to a store of records: python -m jobs.prepare SOURCE --out DIR"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from cluster.lock import LockedError
from cluster.store import Store
from jobs import cli
from jobs.cli import say
from jobs.inputs.record_stores import SHARD_ROWS, Separator, check, describe, listed, prepare
from jobs.runs import manifests
from jobs.runs.manifests import MANIFEST


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
    with cli.errors(LockedError):
        manifest = prepare(
            source,
            out,
            shard_rows=shard_rows,
            limit=limit,
            skip_invalid=skip_invalid,
            reference_texts=reference_texts,
            separator=separator,
            probe_templates=probe_templates,
        )
    if skipped := manifest["skipped"]:
        say(f"{len(skipped)} bad rows were left out, all in {MANIFEST}:\n{listed(skipped)}")


@app.command("describe")
def _describe(store: Annotated[str, typer.Argument(help="Folder or URI of a store.")]) -> None:
    """Print what a store is composed of, in the shape of the paper's Table 2."""
    with cli.errors():
        manifest = manifests.read(
            Store(store), ("name", "version"), "Write a store with `jobs.prepare`."
        )
        check(Store(store))
        items = describe(Store(store))
    table = Table("Item", title=f"{manifest['name']} {manifest['version']}")
    for heading in ("Total", "Per relation", "Per record"):
        table.add_column(heading, justify="right")
    for item, total, per_relation, per_record in items:
        means = ("" if mean is None else f"{mean:.1f}" for mean in (per_relation, per_record))
        table.add_row(item, f"{total:,}", *means)
    cli.print_table(table)


if __name__ == "__main__":
    app()
