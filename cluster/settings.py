"""Settings of a run's use of the cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_BOUNDS = {
    "workers": (0, 100_000),
    "num_cpus": (0, 10_000),
    "num_gpus": (0, 1000),
    "memory_gib": (0, 1_000_000),
    "max_attempts": (1, 1000),
    "in_flight": (1, 1000),
    "record_seconds": (0.1, 1e7),
    "boot_seconds": (1, 1e7),
    "boots_at_once": (1, 100_000),
    "store_seconds": (0, 1e7),
}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of a run's use of the cluster; none of them changes a result."""

    workers: int | Literal["auto"] = "auto"
    """`"auto"`: as many as fit into the cluster, also when it grows. Of a number, those that do not
    fit wait for a node. 0: in this process, without Ray, on what torch sees there."""
    num_cpus: float = 1
    num_gpus: float | None = None
    """Of one worker; a fraction shares a GPU. With 0, the worker sees no GPU. Null: one where the
    cluster has GPUs when the run begins, else none."""
    memory_gib: float = 0
    """Memory that a worker without a GPU takes: `"auto"` starts no more than the nodes have room
    for together, and at least one for each."""
    max_attempts: int = 3
    """Failures of a record in a lease of its own before it becomes a dead letter."""
    in_flight: int = 2
    """Leases that a worker has at a time: one that it does and the next ones."""
    record_seconds: float = 600
    """A worker that takes longer than this times the records of its lease ends itself."""
    boot_seconds: float = 1800
    """A worker that takes longer to build its task ends itself."""
    boots_at_once: int | None = None
    """Workers that may build their task at a time, so that a share of checkpoints is not read by
    all of them together; null: any number."""
    store_seconds: float = 120
    """A run ends when nothing could be written to the store for so long."""
    retry_dead: bool = False
    """Do dead letters of former runs again."""
    logs: Literal["text", "json"] = "text"
    """`"json"`: a JSON object a line on stderr, and from each worker in Ray's logs, with the run,
    the lease and its case ids."""

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not least <= value <= most:  # A NaN is not.
                raise ValueError(f"{name} must be from {least:g} to {most:g}, got {value}")
