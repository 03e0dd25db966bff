"""Stores of records: shards, reference texts and, last, `manifest.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
from rich.progress import track

from cluster.grid import Grid
from cluster.lock import RunLock
from cluster.store import Store
from cluster.words import redacted
from jobs import cli
from jobs.cli import say
from jobs.inputs import SHARD_ROWS, Separator, sources
from jobs.inputs.sources import benchmarks
from jobs.runs import manifests
from jobs.runs.config import SliceConfig
from jobs.runs.manifests import MANIFEST
from rome import options
from rome.data import probes
from rome.data.facts import ReferenceText
from rome.data.records import REFERENCE_TEXT_SCHEMA, Record, by_script, from_table, to_table
from rome.options import ConfigError
from rome.paths import workspace
from rome.scoring.text_metrics import fit_tfidf

SCHEMA_VERSION = 4
_LISTED = 20


def prepare(
    source: str,
    out: str,
    *,
    shard_rows: int = SHARD_ROWS,
    limit: int | None = None,
    skip_invalid: bool = False,
    reference_texts: str | None = None,
    separator: Separator = "space",
    probe_templates: str | None = None,
) -> dict[str, Any]:
    """Write the store of `source` (see `sources.load`) to a folder or URI; returns its manifest.

    `separator`: what stands between prompts and targets; `space` leaves what records say of it.
    `probe_templates`: a YAML file, set -> text with `{}` where each prompt of the set goes, such as
    after examples.

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
            "with --skip-invalid.\n" + listed(content.invalid)
        )
    if not content.records:
        raise ValueError(f"{source} holds no valid record")
    records = _separated(content.records, separator)
    _say_what_cannot_be_scored(records)
    if probe_templates:
        records = _with_templates(records, probe_templates)
    if twice := sum(one.subject in one.prompt for one in records):
        say(
            f"note: the prompts of {twice:,} records hold their subject more than once; what is "
            "edited is where {} stands, in QAEdit the last place"
        )
    benchmark = sources.benchmarks().get(source)
    location = reference_texts or (benchmark and benchmark.reference_texts)
    texts = sources.reference_texts(location) if location else content.texts
    manifest: dict[str, Any] = {
        "name": content.name,
        "version": content.version,
        "rows": len(records),
        "rows_per_shard": shard_rows,
        "reference_texts": len(texts),
        "sha256": content.sha256,
        "schema_version": SCHEMA_VERSION,
        "limit": limit,
        "separator": separator,
        "skipped": [redacted(message) for message in content.invalid],
        "fingerprint": _fingerprint(records, texts),
    }
    store = Store(out)
    with RunLock(store):  # Two that write at once would delete each other's shards.
        if store.exists(MANIFEST):
            there = manifests.read(store, manifest.keys(), "Remove it and prepare it again.")
            _refuse_another(out, there, manifest)
            say(f"{out} already holds {content.name}, {len(records):,} records: nothing to do")
            return there
        _write(store, records, texts, manifest)
    say(f"{out}: {content.name} {content.version}, {len(records):,} records written")
    return manifest


def _separated(records: Sequence[Record], separator: Separator) -> list[Record]:
    """The records with what stands between their prompts and targets, and a note if a space stands
    where no one writes one."""
    by_scripts = [by_script(record) for record in records]
    if separator == "script":
        return by_scripts
    if separator == "none":
        return [replace(record, separator="") for record in records]
    pairs = zip(records, by_scripts, strict=True)
    if odd := sum(one.separator > other.separator for one, other in pairs):
        say(
            f"note: the prompts of {odd:,} records end in a script without spaces, and a space is "
            "assumed before their targets, as the reference code has it; --separator script leaves "
            "it out"
        )
    return list(records)


# What a record needs for the scores that have no value without.
_SCORED_BY = {"paraphrase_prompts": "PS", "neighborhood_prompts": "NS"}


def _say_what_cannot_be_scored(records: Sequence[Record]) -> None:
    for prompts, score in _SCORED_BY.items():
        if lack := sum(not getattr(record, prompts) for record in records):
            say(
                f"note: {lack:,} of {len(records):,} records have no {prompts.replace('_', ' ')}: "
                f"they have no {score}, and a run of none but such records has no S. In a table of "
                "facts they come from "
                + (
                    "a second template of the relation"
                    if prompts == "paraphrase_prompts"
                    else "other subjects with the same object"
                )
            )


def _with_templates(records: Sequence[Record], path: str) -> list[Record]:
    templates = options.read(Path(path))
    probes.check_templates(templates)
    sets = {probe.set for record in records for probe in record.probes}
    if unknown := templates.keys() - sets:
        raise ValueError(f"{path}: {options.unknown('probe set', min(unknown), sets)}")
    return [
        replace(one, probes=tuple(probes.worded(probe, templates) for probe in one.probes))
        for one in records
    ]


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
    shards = {}
    for i, start in enumerate(track(starts, "write shards", console=cli.CONSOLE)):
        name = f"shard-{i:05d}.parquet"
        store.write_table(name, to_table(records[start : start + size]))
        shards[name] = _sha256(store, name)
    manifest["shards"] = shards
    if texts:
        rows = [asdict(text) for text in texts]
        table = pa.Table.from_pylist(rows, schema=REFERENCE_TEXT_SCHEMA)
        store.write_table("reference_texts.parquet", table)
        store.write_table("reference_tfidf.parquet", fit_tfidf([text.text for text in texts]))
    store.write_bytes(MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")


def _sha256(store: Store, name: str) -> str:
    return hashlib.sha256(store.read_bytes(name)).hexdigest()


def check(store: Store) -> None:
    """Raises ValueError where the shards of a store are not those that its manifest says."""
    way_out = "Restore them, or prepare the records again with jobs.prepare."
    manifest = manifests.read(store, ("name", "fingerprint"), way_out)
    there = store.list(prefix="shard-", suffix=".parquet")
    known = manifest.get("shards")
    if known is None:  # Written by an earlier version: the number of records must do.
        rows = sum(store.read_table(name, ["case_id"]).num_rows for name in there)
        if rows != manifest.get("rows", rows):
            raise ValueError(
                f"{store.uri} must have the {manifest['rows']} records that its manifest says, but "
                f"has {rows}. {way_out}"
            )
        return
    if odd := sorted(known.keys() ^ set(there)):
        what = "lacks" if odd[0] in known else "has beside them"
        raise ValueError(
            f"{store.uri} must have the {len(known)} shards that its manifest says, but {what} "
            f"{', '.join(odd[:5])}. {way_out}"
        )
    if changed := [name for name in there if _sha256(store, name) != known[name]]:
        raise ValueError(
            f"{store.uri} has other records than its manifest says, in {', '.join(changed[:5])}. "
            + way_out
        )


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


def record_store(benchmark: str) -> Store:
    """The store of a benchmark: a prepared one, or a named one, prepared if it is not there."""
    if benchmark not in benchmarks():
        store = Store(benchmark)
        if not store.exists(MANIFEST):
            raise ConfigError(
                f"benchmark must be one of {', '.join(benchmarks())} or a prepared store, got "
                f"'{benchmark}'; prepare one with python -m jobs.prepare SOURCE --out {benchmark}"
            )
        return store
    store = Store(str(workspace() / "records" / benchmark))
    if not store.exists(MANIFEST):
        prepare(benchmark, store.uri)
    return store


def grid_of(store: Store, chosen: SliceConfig, lease_records: int, together: int = 1) -> Grid:
    """The case ids of a record store that a run uses, shard by shard.

    Raises ConfigError if a shard before the last is too short for the records that share a model.
    """
    left = chosen.limit if chosen.limit is not None else float("inf")
    shards = []
    for name in store.list(prefix="shard-", suffix=".parquet"):
        ids = store.read_table(name, columns=["case_id"])["case_id"].to_pylist()
        if chosen.case_id_below is not None:
            ids = [i for i in ids if i < chosen.case_id_below]
        shards.append(tuple(ids[: int(min(left, len(ids)))]))
        left -= len(shards[-1])
    used = [len(shard) for shard in shards if shard]
    if short := [size for size in used[:-1] if size < together]:
        raise ConfigError(
            f"{together} records are to share an edited model, but {store.uri} has shards of "
            f"{short[0]}, and a model's records are of one shard: prepare the records again with "
            f"--shard-rows {together} or more"
        )
    return Grid(tuple(shards), lease_records)


def listed(messages: Sequence[str]) -> str:
    """The first messages, a line each, and how many more there are."""
    rest = len(messages) - _LISTED
    return "\n".join([*messages[:_LISTED], *([f"... and {rest} more"] if rest > 0 else [])])
