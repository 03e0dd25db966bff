"""The manifest of a store: what its rows are of, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster.clock import REAL, Clock
from cluster.lock import RunLock
from cluster.store import DamagedError, Store
from jobs.runs import config as configs
from rome.files import locked, replacing
from rome.models.files import cache_folder

MANIFEST = "manifest.json"
_OF_A_RUN = ("name", "records", "editors")


def read(
    store: Store,
    keys: Collection[str] = _OF_A_RUN,
    way_out: str = "Give the directory that jobs.evaluate wrote to.",
) -> dict[str, Any]:
    """Raises DamagedError with the way out where there is none, or it is not whole."""
    try:
        manifest: dict[str, Any] = json.loads(store.read_bytes(MANIFEST))
    except FileNotFoundError:
        raise DamagedError(
            f"{store.uri} is not a run directory: it has no {MANIFEST}. {way_out}"
        ) from None
    except ValueError as error:
        raise DamagedError(f"{store.uri}/{MANIFEST} is damaged ({error}). {way_out}") from None
    if not isinstance(manifest, dict) or (missing := set(keys) - manifest.keys()):
        lacks = ", ".join(sorted(missing)) if isinstance(manifest, dict) else "everything"
        raise DamagedError(
            f"{store.uri}/{MANIFEST} is damaged or of something else: it lacks {lacks}. {way_out}"
        )
    return manifest


def rows(manifest: Mapping[str, Any]) -> dict[str, int]:
    """The rows that a run is to have, for each row of its table; before 0.9 as many for each."""
    of_each = dict.fromkeys(manifest["editors"], manifest["records"])
    return {**of_each, **manifest.get("rows", {})}


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
    """Raises ConfigError if the manifest in a run directory is not what this run has `now`."""
    configs.refuse_another(store.uri, {key: there[key] for key in now}, dict(now), "run")


def claim(
    store: Store,
    manifest: dict[str, Any],
    of_another: Callable[[dict[str, Any]], None],
    clock: Clock = REAL,
) -> dict[str, Any]:
    """Commit a run's manifest, under the lock of its results, and return it.

    A driver that came at the same time may have been first: then its manifest is returned, if
    `of_another` does not refuse it. Raises LockedError while another driver works there.
    """
    with RunLock(store.sub("results"), clock=clock):
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
        return Path(unchanged(known, what))
    copy = cache_folder() / "copies" / f"{sha256}{Path(known['file']).suffix}"
    with locked(copy):
        if not copy.exists():
            with replacing(copy) as temporary:
                with temporary.open("wb") as opened:
                    for piece in store.pieces(""):
                        opened.write(piece)
                unchanged({"file": str(temporary), "sha256": sha256}, f"copy of {store.uri},")
    return copy
