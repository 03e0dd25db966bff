"""From a source to a store of records: shards, reference texts and, last, `manifest.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from statistics import fmean
from typing import Annotated, Any

import pyarrow as pa
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from typer.core import TyperGroup

from cluster.store import Store
from jobs import cli, sources
from jobs.manifests import MANIFEST
from jobs.sources import say
from rome.facts import ReferenceText
from rome.records import REFERENCE_TEXT_SCHEMA, Record, from_table, to_table
from rome.scoring.text_metrics import fit_tfidf

SCHEMA_VERSION = 2
SHARD_ROWS = 512
_LISTED = 20


def prepare(
    source: str,
    out: str,
    *,
    shard_rows: int = SHARD_ROWS,
    limit: int | None = None,
    skip_invalid: bool = False,
    reference_texts: str | None = None,
) -> dict[str, Any]:
    """Write the store of `source` (see `sources.load`) to a folder or URI; returns its manifest.

    Everything is checked before anything is written, and a store has its manifest last: one that
    was interrupted is none, and is written again. The same source again changes nothing.

    Raises:
        ValueError: bad rows without `skip_invalid`; a source that cannot be used;
            `out` already holds another store.
    """
    if shard_rows < 1 or (limit is not None and limit < 1):
        raise ValueError(f"shard rows and limit must be at least 1, got {shard_rows} and {limit}")
    content = sources.load(source, limit)
    if content.invalid and not skip_invalid:
        raise ValueError(
            f"{len(content.invalid)} bad rows, nothing was written. Mend them, or leave them out "
            "with --skip-invalid.\n" + _listed(content.invalid)
        )
    if not content.records:
        raise ValueError(f"{source} holds no valid record")
    benchmark = sources.benchmarks().get(source)
    location = reference_texts or (benchmark and benchmark.reference_texts)
    texts = sources.reference_texts(location) if location else content.texts
    manifest: dict[str, Any] = {
        "name": content.name,
        "version": content.version,
        "rows": len(content.records),
        "rows_per_shard": shard_rows,
        "reference_texts": len(texts),
        "sha256": content.sha256,
        "schema_version": SCHEMA_VERSION,
        "limit": limit,
        "skipped": content.invalid,
        "fingerprint": _fingerprint(content.records, texts),
    }
    store = Store(out)
    if store.exists(MANIFEST):
        _refuse_another(out, json.loads(store.read_bytes(MANIFEST)), manifest)
        say(f"{out} already holds {content.name}, {len(content.records):,} records: nothing to do")
        return manifest
    _write(store, content.records, texts, manifest)
    say(f"{out}: {content.name} {content.version}, {len(content.records):,} records written")
    return manifest


def _write(
    store: Store,
    records: Sequence[Record],
    texts: Sequence[ReferenceText],
    manifest: dict[str, Any],
) -> None:
    # What an interrupted preparation left may have other borders.
    for name in [*store.list("shard-", ".parquet"), *store.list("reference_", ".parquet")]:
        store.delete(name)
    size = manifest["rows_per_shard"]
    starts = range(0, len(records), size)
    for i, start in enumerate(track(starts, "write shards", console=sources.CONSOLE)):
        store.write_table(f"shard-{i:05d}.parquet", to_table(records[start : start + size]))
    if texts:
        rows = [asdict(text) for text in texts]
        table = pa.Table.from_pylist(rows, schema=REFERENCE_TEXT_SCHEMA)
        store.write_table("reference_texts.parquet", table)
        store.write_table("reference_tfidf.parquet", fit_tfidf([text.text for text in texts]))
    store.write_bytes(MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")


def _fingerprint(records: Iterable[Record], texts: Iterable[ReferenceText]) -> str:
    """sha256 over all records and reference texts in their order, whatever the shards."""
    digest = hashlib.sha256()
    for row in chain[Record | ReferenceText](records, texts):
        digest.update(json.dumps(asdict(row), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _refuse_another(out: str, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    # The fingerprint knows what was skipped; the messages name the path of the source.
    differences = [
        f"  {key}: {there.get(key)!r} there, {value!r} asked for"
        for key, value in wanted.items()
        if key != "skipped" and there.get(key) != value
    ]
    if differences:
        raise ValueError(
            f"{out} already holds another store:\n"
            + "\n".join(differences)
            + "\nGive another --out, or remove the store first."
        )


def describe(store: Store) -> list[tuple[str, int, float | None, float | None]]:
    """The composition of a store in the shape of the paper's Table 2.

    One row per item: its distinct values in all records, their mean number within a relation, and
    within a record. As in the paper, objects are the new targets, and counterfactual statements
    are told apart by prompt and subject.
    """
    names = store.list("shard-", ".parquet")
    records = [record for name in names for record in from_table(store.read_table(name))]
    relations: dict[str, list[Record]] = {}
    for record in records:
        if record.relation_id is not None:
            relations.setdefault(record.relation_id, []).append(record)
    items: dict[str, Callable[[Record], Iterable[Any]]] = {
        "Records": lambda record: [record.case_id],
        "Subjects": lambda record: [record.subject],
        "Objects": lambda record: [record.target_new],
        "Counterfactual statements": lambda record: [(record.prompt, record.subject)],
        "Paraphrase prompts": lambda record: record.paraphrase_prompts,
        "Neighborhood prompts": lambda record: record.neighborhood_prompts,
        "Attribute prompts": lambda record: record.attribute_prompts,
        "Generation prompts": lambda record: record.generation_prompts,
    }

    def distinct(values: Callable[[Record], Iterable[Any]], part: Iterable[Record]) -> int:
        return len({value for record in part for value in values(record)})

    rows: list[tuple[str, int, float | None, float | None]] = [
        ("Relations", len(relations), None, None)
    ]
    for name, values in items.items():
        groups = [distinct(values, part) for part in relations.values()] or [0]
        each = fmean(distinct(values, [record]) for record in records)
        rows.append((name, distinct(values, records), fmean(groups), each))
    return rows


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
) -> None:
    """Turn a source into a store of records (the default command)."""
    with cli.errors():
        manifest = prepare(
            source,
            out,
            shard_rows=shard_rows,
            limit=limit,
            skip_invalid=skip_invalid,
            reference_texts=reference_texts,
        )
    if skipped := manifest["skipped"]:
        say(f"{len(skipped)} bad rows were left out, all in {MANIFEST}:\n{_listed(skipped)}")


@app.command("describe")
def _describe(store: Annotated[str, typer.Argument(help="Folder or URI of a store.")]) -> None:
    """Print what a store is composed of, in the shape of the paper's Table 2."""
    try:
        manifest = json.loads(Store(store).read_bytes(MANIFEST))
    except FileNotFoundError as error:
        say(f"{store} is no store: it has no {MANIFEST}. Write one with `jobs.prepare`.")
        raise typer.Exit(1) from error
    table = Table("Item", title=f"{manifest['name']} {manifest['version']}")
    for heading in ("Total", "Per relation", "Per record"):
        table.add_column(heading, justify="right")
    for item, total, per_relation, per_record in describe(Store(store)):
        means = ("" if mean is None else f"{mean:.1f}" for mean in (per_relation, per_record))
        table.add_row(item, f"{total:,}", *means)
    Console().print(table)


def _listed(messages: Sequence[str]) -> str:
    rest = len(messages) - _LISTED
    return "\n".join([*messages[:_LISTED], *([f"... and {rest} more"] if rest > 0 else [])])


if __name__ == "__main__":
    app()
