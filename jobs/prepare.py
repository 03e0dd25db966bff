"""From a source to a store of records: python -m jobs.prepare SOURCE --out DIR"""

from __future__ import annotations

from jobs.commands.prepare import app as app

if __name__ == "__main__":
    app()  # It comes back for what follows as a module.


from rich.table import Table

from cluster.lock import LockedError
from cluster.store import Store
from jobs import cli
from jobs.cli import say
from jobs.inputs import SHARD_ROWS, Separator
from jobs.inputs.record_stores import check, describe, listed, prepare
from jobs.runs import manifests
from jobs.runs.manifests import MANIFEST


def prepare_command(
    source: str,
    out: str,
    shard_rows: int = SHARD_ROWS,
    limit: int | None = None,
    skip_invalid: bool = False,
    reference_texts: str | None = None,
    separator: Separator = "space",
    probe_templates: str | None = None,
) -> None:
    """See `jobs.commands.prepare`."""
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


def describe_command(store: str) -> None:
    """See `jobs.commands.prepare`."""
    records, way_out = Store(store), "Write a store with `jobs.prepare`."
    with cli.errors():
        if not records.exists(MANIFEST):
            raise ValueError(f"{store} is no store: it has no {MANIFEST}. {way_out}")
        manifest = manifests.read(records, ("name", "version"), way_out)
        check(records)
        items = describe(records)
    table = Table("Item", title=f"{manifest['name']} {manifest['version']}")
    for heading in ("Total", "Per relation", "Per record"):
        table.add_column(heading, justify="right")
    for item, total, per_relation, per_record in items:
        means = ("" if mean is None else f"{mean:.1f}" for mean in (per_relation, per_record))
        table.add_row(item, f"{total:,}", *means)
    cli.print_table(table)
