"""The nodes of a run as Ray knows them, and the placement of workers on them."""

from __future__ import annotations

from typing import Any

import ray
from ray._private.state import state as cluster_state
from ray.exceptions import ActorUnavailableError, RayActorError

from cluster.settings import RunSettings


def worker_options(settings: RunSettings) -> dict[str, Any]:
    """Ray's options of a worker, or of a function that runs where a worker would."""
    environment = {"OMP_WAIT_POLICY": "PASSIVE"}  # Idle threads that spin slow their neighbours.
    if not settings.num_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # num_gpus=0 alone hides none.
    return {
        "num_cpus": settings.num_cpus,
        "num_gpus": settings.num_gpus or 0,
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": environment},
    }


def workers_that_fit(settings: RunSettings) -> int:
    """The number of workers that the cluster's nodes have room for, whoever uses it now."""
    needs = {"CPU": settings.num_cpus, "GPU": settings.num_gpus or 0}
    fits = 0
    for there in (node["Resources"] for node in ray.nodes() if node["Alive"]):
        # The small term is for fractions: 1 // 0.1 is 9.
        here = min(
            (int(there.get(name, 0) / need + 1e-9) for name, need in needs.items() if need),
            default=1,
        )
        if settings.memory_gib and not settings.num_gpus:
            room = int(there.get("memory", 0) / 2**30 / settings.memory_gib)
            here = min(here, max(room, 1))
        fits += here
    return fits


def lacking(settings: RunSettings) -> str | None:
    """What a worker needs and no node has, in words; None if one of them has room."""
    if workers_that_fit(settings):
        return None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (max((node.get(kind, 0) for node in nodes), default=0) for kind in ("CPU", "GPU"))
    return (
        f"a worker takes workers.num_cpus={settings.num_cpus:g} and "
        f"workers.num_gpus={settings.num_gpus or 0:g}, but of {len(nodes)} nodes none has both: "
        f"the most are {cpus:g} CPUs and {gpus:g} GPUs"
    )


def started_here() -> bool:
    """True if this process started its Ray: then no other node will ever join."""
    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def draining_nodes() -> set[str]:
    """The nodes that will be taken away soon, such as preempted ones; nothing new starts there."""
    return set(cluster_state.get_draining_nodes())


def node_was_lost(error: BaseException) -> bool:
    """True if an actor died because its node did, and not because of its own work.

    Before Ray is sure of a node's death, its actors are unavailable: nobody there says how they
    ended, while a living node reports the end of a process at once.
    """
    return isinstance(error, ActorUnavailableError) or (
        isinstance(error, RayActorError) and (error.preempted or "its node has died" in str(error))
    )
