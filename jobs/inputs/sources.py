"""Sources of records: named benchmarks, files, URLs, `datasets` and fact tables."""

from __future__ import annotations

import hashlib
import json
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml
from rich.progress import wrap_file

from jobs.cli import CONSOLE
from jobs.inputs import formats
from rome.data import fact_tables, facts
from rome.data.facts import ReferenceText
from rome.data.records import Record
from rome.data.rows import from_row
from rome.data.texts import check_whole
from rome.paths import CONFIGS

_TIMEOUT_S = 60


@dataclass(frozen=True)
class Benchmark:
    """One file of `configs/benchmarks`; `bytes` and `sha256` are those of the full source."""

    name: str
    version: str
    source: str
    bytes: int | None = None
    sha256: str | None = None
    reference_texts: str | None = None


@dataclass(frozen=True)
class Source:
    """The content of a source. `sha256` is that of the whole source, uncompressed."""

    name: str
    version: str
    sha256: str
    records: list[Record]
    invalid: list[str]
    texts: list[ReferenceText] = field(default_factory=list)


def benchmarks() -> dict[str, Benchmark]:
    """The benchmarks of `configs/benchmarks` by name."""
    paths = sorted((CONFIGS / "benchmarks").glob("*.yaml"))
    found = [Benchmark(**yaml.safe_load(path.read_text("utf-8"))) for path in paths]
    return {benchmark.name: benchmark for benchmark in found}


def reversed_prompts() -> dict[str, str]:
    """Relation -> reversed prompt, with `{}` for the object: `configs/facts/reversed.yaml`."""
    path = CONFIGS / "facts" / "reversed.yaml"
    prompts: dict[str, str] = yaml.safe_load(path.read_text("utf-8"))
    return prompts


def load(source: str, limit: int | None = None) -> Source:
    """The first `limit` records of a source, checked, and what is wrong with the others.

    `source` is tried as the name of a benchmark, a URL, a file (rows in a format of
    `rome.data.rows.from_row`, as `jobs.inputs.formats` reads them, or fact table in YAML or
    CSV), a `datasets` folder, a `datasets` id.

    Raises:
        ValueError: the source as a whole cannot be used: wrong digest, not JSON, not found.
    """
    benchmark = benchmarks().get(source)
    location = benchmark.source if benchmark else source
    if benchmark and not _is_url(location):
        location = str(CONFIGS / location)
    if not _is_url(location) and not Path(location).is_file():
        return _from_datasets(location, limit)
    data = read(location)
    digest = hashlib.sha256(data).hexdigest()
    benchmark = benchmark or _published(location, data)
    if benchmark and benchmark.sha256 not in (None, digest):
        raise ValueError(
            f"{location}: this is not {benchmark.name} {benchmark.version}, or it is damaged: "
            f"sha256 must be {benchmark.sha256} ({benchmark.bytes:,} bytes), "
            f"got {digest} ({len(data):,} bytes). Fetch it again from {benchmark.source}."
        )
    path = PurePosixPath(urlsplit(location).path if _is_url(location) else location)
    path = path.with_suffix("") if path.suffix in (".gz", ".zip") else path
    name, version = (benchmark.name, benchmark.version) if benchmark else (path.stem, digest[:12])
    if (suffix := path.suffix.lower()) in (".yaml", ".yml", ".csv"):
        records, texts, invalid = _from_facts(location, suffix, data)
        return Source(name, version, digest, records[:limit], invalid, texts)
    named = ((f"{location}, {place}", row) for place, row in _rows(location, data))
    return Source(name, version, digest, *_check(islice(named, limit)))


def reference_texts(location: str) -> list[ReferenceText]:
    """The texts of a file in the form of the authors' `attribute_snippets.json`.

    Raises:
        ValueError: with file and entry, where one has not the form
            `{relation_id, target_id, samples: [{name, text}]}`.
    """
    texts = []
    for place, entry in _rows(location, read(location)):
        try:
            key = [entry["relation_id"], entry["target_id"]]
            rows = [[*key, sample["name"], sample["text"]] for sample in entry["samples"]]
            if not all(isinstance(value, str) for row in rows for value in row):
                raise TypeError("all four must be texts")
            for value in chain.from_iterable(rows):
                check_whole("a text", value)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{location}, {place}: must be {{relation_id, target_id, samples: "
                f"[{{name, text}}]}}, got {str(entry)[:200]} ({error!r})"
            ) from error
        texts += [ReferenceText(*row) for row in rows]
    return texts


def read(location: str) -> bytes:
    """The bytes of a file or URL, unzipped if they are a gzip, or a zip of one file.

    Raises:
        ValueError: they are not there, or not whole.
    """
    try:
        data = _download(location) if _is_url(location) else Path(location).read_bytes()
        return formats.unzipped(data)
    except (OSError, HTTPException, ValueError) as error:
        way_out = ". Fetch it by other means and give its path." if _is_url(location) else ""
        raise ValueError(f"{location} cannot be read: {error}{way_out}") from error


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
        total = int(response.headers.get("Content-Length") or 0)
        with wrap_file(response, total, description="download", console=CONSOLE) as file:
            data = file.read()
    if total and len(data) != total:
        raise OSError(f"the connection ended after {len(data):,} of {total:,} bytes")
    return data


def _published(location: str, data: bytes) -> Benchmark | None:
    """The benchmark that `data` claims to be, by its address or its size."""
    for benchmark in benchmarks().values():
        if benchmark.sha256 and (benchmark.source == location or benchmark.bytes == len(data)):
            return benchmark
    return None


def _check(rows: Iterable[tuple[str, Any]]) -> tuple[list[Record], list[str]]:
    """Records, and messages about the rows that are none; each row comes with its place."""
    records: list[Record] = []
    invalid: list[str] = []
    places: dict[int, str] = {}
    for i, (where, row) in enumerate(rows):
        case_id = row.get("case_id") if isinstance(row, dict) else None
        try:
            record = from_row(row, i)
            if record.case_id in places:
                raise ValueError(f"case_id must be unique, also in {places[record.case_id]}")
        except ValueError as error:
            invalid.append(f"{where} (case_id {i if case_id is None else case_id!r}): {error}")
        else:
            places[record.case_id] = where
            records.append(record)
    return records, invalid


def _from_facts(
    location: str, suffix: str, data: bytes
) -> tuple[list[Record], list[ReferenceText], list[str]]:
    bundled = CONFIGS / "facts" / "everyday.yaml"
    try:
        table = fact_tables.read_csv(data) if suffix == ".csv" else fact_tables.read_yaml(data)
        distractors = fact_tables.read_yaml(bundled.read_bytes()).distractors
        records, texts, invalid = facts.build(table, distractors)
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
    return records, texts, [f"{location}, {message}" for message in invalid]


def _from_datasets(location: str, limit: int | None) -> Source:
    """A folder of `save_to_disk`, a folder of data files or a hub id, in either schema."""
    path = Path(location)
    if not path.is_dir() and (location.count("/") != 1 or path.suffix):
        raise ValueError(
            f"{location!r} is no file or folder, no URL, no `datasets` id (owner/name) and none of "
            f"the benchmarks {sorted(benchmarks())}"
        )
    import datasets  # slow, and needed here alone

    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        loaded = datasets.load_from_disk(location) if saved else datasets.load_dataset(location)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ValueError(f"`datasets` cannot load {location!r}: {error}{cause}") from error
    splits = loaded if isinstance(loaded, dict) else {"all": loaded}

    def rows() -> Iterator[tuple[str, Any]]:
        for split, part in splits.items():
            for i, row in enumerate(part, 1):
                yield f"{location}, split {split}, row {i}", row

    digest = hashlib.sha256()
    for _, row in rows():
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    sha256 = digest.hexdigest()
    return Source(path.name, sha256[:12], sha256, *_check(islice(rows(), limit)))


def _rows(location: str, data: bytes) -> Iterator[tuple[str, Any]]:
    try:
        yield from formats.rows(data)
    except ValueError as error:
        raise ValueError(f"{location} cannot be used: {error}") from error


def _is_url(location: str) -> bool:
    return location.startswith(("http://", "https://"))
