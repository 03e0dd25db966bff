"""Join the cluster that is named, or start Ray on this machine; how many workers there are then."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.authentication import authentication_token_setup

from cluster.nodes import lacking, started_here, workers_that_fit
from cluster.settings import RunSettings


def ensure_ray(settings: RunSettings) -> None:
    """Join the cluster that RAY_ADDRESS names (as in a Ray job), else start Ray on this machine.

    Never joins by itself some other cluster that happens to run here.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if settings.logs == "json":
        quiet["logging_config"] = ray.LoggingConfig(encoding="JSON")
    # Nothing of size passes through the object store. Workers' errors come back as values.
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # As on Windows and macOS: at 127.0.0.1, where Ray listens alone, and not at the address by
        # which others reach this machine.
        ray_constants.ENABLE_RAY_CLUSTER = False
        quiet["_node_ip_address"] = "127.0.0.1"
        # Ray says at length that only this user gets in, which is as it should be.
        authentication_token_setup.logger.addFilter(
            lambda record: not record.getMessage().startswith("Token authentication is enabled")
        )
        ray.init(address="local", include_dashboard=False, object_store_memory=200_000_000, **quiet)


def joined(settings: RunSettings) -> RunSettings:
    """Join the cluster as `ensure_ray` does; the settings with what the cluster decides.

    Raises ValueError where Ray was started here and this machine cannot hold a worker.
    """
    ensure_ray(settings)
    if settings.num_gpus is None:
        settings = replace(settings, num_gpus=int(ray.cluster_resources().get("GPU", 0) >= 1))
    if started_here() and (lack := lacking(settings)):
        raise ValueError(
            f"{lack}, and no other node joins a Ray that a command starts for itself. Set "
            "workers.num_gpus=0 to work on CPUs and workers.num_cpus to what there is; or join a "
            "cluster that has more (RAY_ADDRESS)"
        )
    return settings


def number_of_workers(settings: RunSettings) -> int:
    """The workers that a run has now: those asked for, or those that fit; at least one, which
    stands for this process if there are to be none."""
    if settings.workers != "auto":
        return max(settings.workers, 1)
    return max(workers_that_fit(joined(settings)), 1)
