"""Names that tell runs and their editors apart wherever several stand side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

UNEDITED = "unedited"
"""The name of the editor `none` in front of readers."""

Runs = Mapping[str, Mapping[str, Any]]
"""Address of a run directory -> its manifest."""


def run_labels(runs: Runs) -> dict[str, str]:
    """Address -> the run's name or, where two have one name, as much of the end of their folders
    as tells all of them apart."""
    names = {uri: str(manifest["name"]) for uri, manifest in runs.items()}
    if len(set(names.values())) == len(runs):
        return names
    folders = {uri: folder(uri).split("/") for uri in runs}
    for depth in range(1, max(map(len, folders.values())) + 1):
        ends = {uri: "/".join(parts[-depth:]) for uri, parts in folders.items()}
        if len(set(ends.values())) == len(runs):
            return ends
    return {uri: uri for uri in runs}


def row_labels(runs: Runs, editors: Mapping[str, list[str]]) -> dict[tuple[str, str], str]:
    """(address, editor) -> the editor's name, after the run's where two runs have that editor.

    `editors`: of each run, in the order in which they are to be shown; so is the result.
    """
    of_runs = run_labels(runs)
    taken = [_shown(name, editors[uri]) for uri in runs for name in editors[uri]]
    labels = {}
    for uri in runs:
        for name in editors[uri]:
            shown = _shown(name, editors[uri])
            labels[uri, name] = shown if taken.count(shown) == 1 else f"{of_runs[uri]}/{shown}"
    return labels


def _shown(name: str, beside: list[str]) -> str:
    return UNEDITED if name == "none" and UNEDITED not in beside else name


def differing_notes(runs: Runs) -> list[str]:
    """What readers of several runs have to know: one sentence, or none."""
    if not (lines := differing_keys(runs)):
        return []
    return [f"{' | '.join(run_labels(runs).values())} differ in {'; '.join(lines)}."]


def differing_keys(runs: Runs) -> list[str]:
    """What the configs of runs differ in, a line a key: `model.dtype: float32 | bfloat16`.

    In the order of the runs. Left out are names, and editors that not all of them have.
    """
    flat = [dict(_flat(manifest.get("config", {}))) for manifest in runs.values()]
    common = set.intersection(*({*_editors(keys)} for keys in flat)) if flat else set()
    lines = []
    for key in dict.fromkeys(key for keys in flat for key in keys):
        parts = key.split(".")
        if key == "name" or (parts[0] == "editors" and parts[1] not in common):
            continue
        values = [str(keys.get(key, "–")) for keys in flat]
        if len(set(values)) > 1:
            lines.append(f"{key}: {' | '.join(values)}")
    return lines


def _editors(keys: Mapping[str, Any]) -> Iterator[str]:
    return (key.split(".")[1] for key in keys if key.startswith("editors."))


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def folder(uri: str) -> str:
    """The path of a run directory, without what it is reached by."""
    return unquote(urlsplit(uri).path if "://" in uri else uri).rstrip("/")
