"""A run may take more records of its store than it began with, by a larger `records.limit`.

Rows that are done stay: the records of a smaller limit are the first of those of a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cluster.grid import Grid
from rome.options import ConfigError

if TYPE_CHECKING:  # It imports torch, which readers of manifests do without.
    from jobs.runs.config import RunConfig

_GROWN = "grown"


def grows(there: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """True if of two manifests the second has the larger limit, whatever else they differ in."""
    return _number(_limit(there)) < _number(_limit(now))


def but_for_limit(now: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest `now` with the limit of the one `there`."""
    return {**now, "config": _limited(now["config"], _limit(there))}


def first_config(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with the limit that the run began with, by which its parts know it."""
    grown, config = manifest.get(_GROWN), manifest["config"]
    return _limited(config, grown[0]["from"]) if grown else config


def grown(there: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest `there` with the records of the larger run, and since when."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    before = [*there.get(_GROWN, []), {"since": since, "from": _limit(there)}]
    return {**there, **now, _GROWN: before}


def refuse(config: RunConfig, before: Grid, grid: Grid) -> None:
    """Raises ConfigError where rows that are done would be others among the records of `grid` than
    among those of the run `before`: orders are drawn over all records, and a group of records that
    share a model may have been cut short."""
    for name in config.editors:
        grouping = config.grouping(name)
        if grouping.checkpoints and grouping.orders > 1:
            raise ConfigError(
                f"editors.{name}: a run whose chains are made in {grouping.orders} orders cannot "
                "take more records, since each order is drawn over all of them; choose another "
                "--out"
            )
        size = config.together(name)
        for old, new in zip(before.shards, grid.shards, strict=True):
            if old != new and len(old) % size:
                raise ConfigError(
                    f"editors.{name}: a run can take more records if those that it has are whole "
                    f"groups of {size}, which share a model, and the last of its {len(before)} has "
                    f"{len(old) % size}; choose another --out"
                )


def _limit(manifest: Mapping[str, Any]) -> Any:
    records = manifest["config"].get("records")  # Of a manifest that anyone may have edited.
    return records.get("limit") if isinstance(records, dict) else None


def _number(limit: Any) -> float:
    return limit if isinstance(limit, int) else math.inf


def _limited(config: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    return {**config, "records": {**config.get("records", {}), "limit": limit}}
