"""The manifest of a store: what its rows are of, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from cluster.clock import REAL, Clock
from cluster.lock import RunLock
from cluster.origin import Origin
from cluster.store import DamagedError, Store
from jobs.cli import say
from jobs.runs import differences, growth
from rome import options
from rome.files import locked, replacing
from rome.json_text import JsonError, parsed
from rome.paths import ROOT

MANIFEST = "manifest.json"
_OF_A_RUN = ("name", "records", "editors")
_KINDS: dict[str, Any] = {
    "name": str,
    "records": int,
    "editors": list[str],
    "table_rows": dict[str, int],
    "records_store": str,
    "config": dict[str, Any],
    "benchmark": dict[str, str],
    "protocol": str,
    "model_fingerprint": str,
    "model_bytes": int,
    "context_templates": list[str],
    "reversed_prompts": dict[str, str],
    "second_moments": dict[int, dict[Literal["file", "sha256"], str]],
    "weights": dict[str, dict[Literal["file", "sha256"], str]],
    "code": dict[str, str],
    "later_code": list[dict[str, str]],
    "grown": list[dict[Literal["since", "from"], str | int]],
    "parts_say_it": bool,
    "facts": dict[str, str],
    "embedding_std": float,
    "version": str,
    "fingerprint": str,
    "rows": int,
    "rows_per_shard": int,
    "reference_texts": int,
    "shards": dict[str, str],
    "skipped": list[str],
}
"""The types of a manifest's keys, of runs, traces and record stores."""


def read(
    store: Store,
    keys: Collection[str] = _OF_A_RUN,
    way_out: str = "Give the directory that jobs.evaluate wrote to.",
    kinds: Mapping[str, Any] = _KINDS,
) -> dict[str, Any]:
    """Raises DamagedError with the way out where there is none, it is not whole, lacks one of
    `keys`, or has another type than `kinds` says at one of its keys."""
    where = f"{store.uri}/{MANIFEST}"
    try:
        manifest: dict[str, Any] = parsed(store.read_bytes(MANIFEST))
    except FileNotFoundError:
        raise DamagedError(
            f"{store.uri} is not a run directory: it has no {MANIFEST}. {way_out}"
        ) from None
    except JsonError as error:
        raise DamagedError(f"{where} is damaged ({error}). {way_out}") from None
    if not isinstance(manifest, dict) or (missing := set(keys) - manifest.keys()):
        lacks = ", ".join(sorted(missing)) if isinstance(manifest, dict) else "everything"
        raise DamagedError(f"{where} is damaged or of something else: it lacks {lacks}. {way_out}")
    for key in kinds.keys() & manifest.keys():
        try:
            options.validate(kinds[key], manifest[key], key)
        except options.ConfigError as error:
            raise DamagedError(f"{where} is damaged: {error}. {way_out}") from None
    return manifest


def rows(manifest: Mapping[str, Any]) -> dict[str, int]:
    """The rows that a run is to have, for each row of its table; an older manifest has one number
    for all."""
    of_each = dict.fromkeys(manifest["editors"], manifest["records"])
    return {**of_each, **manifest.get("table_rows", {})}


def of_runs(run_dirs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Address -> manifest of each run directory, in their order.

    Raises ValueError as `read`, and where a directory is given twice.
    """
    stores = [Store(run_dir) for run_dir in run_dirs]
    found = {store.uri.rstrip("/"): read(store) for store in stores}
    if len(found) < len(stores):
        raise ValueError(
            f"each run directory must be given once, got {', '.join(s.uri for s in stores)}"
        )
    return found


def benchmark(records: Store) -> dict[str, Any]:
    """The fields that identify a record store; runs copy them into their own manifest."""
    keys = ("name", "version", "fingerprint")
    manifest = read(records, keys, "Prepare the records again with jobs.prepare.")
    return {key: manifest[key] for key in keys}


def refuse_another(store: Store, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ConfigError if the manifest in a run directory is not what this run has `now`, but for
    more records."""
    if growth.grows(there, now):
        now = growth.but_for_limit(now, there)
    differences.refuse_another(store.uri, {key: there[key] for key in now}, dict(now), "run")


def claim(
    store: Store,
    manifest: dict[str, Any],
    of_another: Callable[[dict[str, Any]], None],
    clock: Clock = REAL,
) -> dict[str, Any]:
    """Commit a run's manifest, under the lock of its results, with the code that made it, and
    return it.

    A driver that came at the same time may have been first: then its manifest is returned, if
    `of_another` does not refuse it. Raises LockedError while another driver works there.
    """
    with RunLock(store.sub("results"), clock=clock):
        # No part of it is older than this version.
        manifest = {**manifest, "code": code(), "parts_say_it": True}
        # A driver that was stopped here for long finds its lock, and the manifest, taken.
        if store.create(MANIFEST, _encoded(manifest)):
            return manifest
        there = read(store, manifest.keys())
        of_another(there)
        return there


def write(store: Store, manifest: Mapping[str, Any]) -> None:
    """Commit a manifest in a folder whose lock is held."""
    store.write_bytes(MANIFEST, _encoded(manifest))


def _encoded(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, ensure_ascii=False).encode()


def code() -> dict[str, str]:
    """Versions, and a hash of the project's own files: which code makes rows, also without git."""
    digest = hashlib.sha256()
    for folder in ("rome", "cluster", "jobs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    names = ("rome-bench", "torch", "transformers", "ray")
    return {name: version(name) for name in names} | {"source": digest.hexdigest()}


_MADE_OF = ("config", "benchmark", "protocol", "facts", "model_fingerprint", "context_templates")


def origin(manifest: Mapping[str, Any]) -> Origin:
    """What the parts of a run say of themselves: its name and short hashes of what makes its
    numbers."""
    values = {key: manifest[key] for key in _MADE_OF if key in manifest}
    if "config" in manifest:
        values["config"] = growth.first_config(manifest)
    for key in ("second_moments", "weights"):  # By content: files may lie elsewhere.
        values[key] = {name: known["sha256"] for name, known in manifest.get(key, {}).items()}
    facts = {key: _short(value) for key, value in values.items()}
    return Origin(
        {"run": manifest.get("name", ""), **facts},
        code()["source"][:16],
        manifest.get("parts_say_it", False),
    )


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def grow(store: Store, now: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
    """Record in a run's manifest that it takes more records, if it does, and say so; its lock is
    held.

    `now`: what the run is of, see `refuse_another`; `counts`: its `records` and `table_rows`.
    """
    there = read(store, now)
    refuse_another(store, there, now)  # Another driver may have been here.
    if growth.grows(there, now):
        say(f"note: the run takes {counts['records']} records, and had {there['records']}")
        write(store, growth.grown(there, {**now, **counts}))


def goes_on(store: Store) -> None:
    """Record in a run's manifest that other code goes on with it, and say so; its lock is held."""
    there, now = read(store, ()), code()
    known = [there.get("code", {}), *there.get("later_code", [])]
    if now.items() <= known[-1].items():
        return
    changed = [name for name in now if now[name] != known[-1].get(name)]
    since = datetime.now(UTC).isoformat(timespec="seconds")
    later = [*there.get("later_code", []), {"since": since, **now}]
    write(store, {**there, "later_code": later})
    say(
        f"note: the code is not what this run began with or went on with ({', '.join(changed)} "
        f"changed): its rows are of both, and each part says of which; {MANIFEST} has it in "
        "later_code"
    )


def unchanged(known: dict[str, str], what: str) -> str:
    """A `file` whose content still has the `sha256` that the manifest says.

    Raises DamagedError where it is another, and MissingError.
    """
    if (now := file_sha256(known["file"])) != known["sha256"]:
        raise DamagedError(
            f"{known['file']} must be the {what} that the run began with: its sha256 "
            f"was {known['sha256'][:16]} and is {now[:16]}; restore it, or begin another run"
        )
    return known["file"]


def file_sha256(file: str) -> str:
    """sha256 of the content of a file, which a path or a URI names."""
    digest = hashlib.sha256()
    for piece in Store(file).pieces(""):
        digest.update(piece)
    return digest.hexdigest()


def at_hand(known: dict[str, str], what: str) -> Path:
    """A `file` of a manifest on this machine, checked by its `sha256`.

    A file in an object store is downloaded once for all processes of a machine, into the cache; it
    gets its name there when it is whole. Raises as `unchanged`.
    """
    store, sha256 = Store(known["file"]), known["sha256"]
    if store.is_local:
        unchanged(known, what)
        return Path(store.address(""))
    from rome.models.files import cache_folder  # Imports torch, which most readers do without.

    copy = cache_folder() / "copies" / f"{sha256}{Path(known['file']).suffix}"
    with locked(copy):
        if not copy.exists():
            with replacing(copy) as temporary:
                with temporary.open("wb") as opened:
                    for piece in store.pieces(""):
                        opened.write(piece)
                unchanged({"file": str(temporary), "sha256": sha256}, f"copy of {store.uri},")
    return copy
