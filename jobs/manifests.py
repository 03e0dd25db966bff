"""The manifest of a store: what its rows are of, and whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from cluster.store import Store

MANIFEST = "manifest.json"
_OF_A_RUN = ("name", "records", "editors")


def read(
    store: Store,
    keys: Collection[str] = _OF_A_RUN,
    way_out: str = "Give the directory that jobs.evaluate wrote to.",
) -> dict[str, Any]:
    """Raises ValueError with the way out where there is none, or it is not whole."""
    try:
        manifest: dict[str, Any] = json.loads(store.read_bytes(MANIFEST))
    except FileNotFoundError:
        raise ValueError(
            f"{store.uri} is not a run directory: it has no {MANIFEST}. {way_out}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{store.uri}/{MANIFEST} is damaged ({error}). {way_out}") from None
    if not isinstance(manifest, dict) or (missing := set(keys) - manifest.keys()):
        lacks = ", ".join(sorted(missing)) if isinstance(manifest, dict) else "everything"
        raise ValueError(
            f"{store.uri}/{MANIFEST} is damaged or of something else: it lacks {lacks}. {way_out}"
        )
    return manifest


def benchmark(records: Store) -> dict[str, Any]:
    """Which records these are, as the manifest of what is made of them says it."""
    keys = ("name", "version", "fingerprint")
    manifest = read(records, keys, "Prepare the records again with jobs.prepare.")
    return {key: manifest[key] for key in keys}


def write(store: Store, manifest: Mapping[str, Any]) -> None:
    """Commit a run's manifest."""
    store.write_bytes(MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
