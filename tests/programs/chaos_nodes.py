"""Clusters of real Ray processes on loopback, whose nodes come and go."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _initialize_internal_kv

ROOT = Path(__file__).parents[2]
PREEMPTION = 2
"""DRAIN_NODE_REASON_PREEMPTION of autoscaler.proto."""


class Nodes:
    """A head without work, and nodes; `new_head` begins another cluster beside it."""

    def __init__(self, nodes: int, cpus: int = 2) -> None:
        self._cpus = cpus
        self._old: list[psutil.Process] = []
        self._start(nodes)

    def _start(self, nodes: int) -> None:
        self._cluster = Cluster(
            initialize_head=True,
            shutdown_at_exit=False,
            head_node_args={"num_cpus": 0, "dashboard_port": _free_port(), **_SMALL},
        )
        self.nodes: list[Any] = []
        for _ in range(nodes):
            self.add()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> Any:
        node = self._cluster.add_node(num_cpus=self._cpus, **_SMALL)
        self.nodes.append(node)
        if ray.is_initialized():
            # Starting a node gives its store of keys to this process, which may have joined another
            # Ray. Ray ends a process that asks a store which is gone.
            _initialize_internal_kv(ray._private.worker.global_worker.gcs_client)  # type: ignore[attr-defined]
        return node

    def power_off(self, node: Any) -> None:
        """All of a node's processes at once, the raylet first, so that it reports nothing."""
        for process in _processes(node):
            _kill(process)
        self.nodes.remove(node)

    def drain(self, node: Any, seconds: float) -> None:
        """The notice of a cloud that takes a node away."""
        deadline = time.time() + seconds
        raylet: Any = ray._raylet
        accepted, why = raylet.GcsClient(address=self.address).drain_node(
            node.node_id, PREEMPTION, "spot", int(deadline * 1000)
        )
        assert accepted, why

    def workers_of(self, node: Any) -> set[int]:
        return {process.pid for process in _processes(node)}

    def kill_head(self) -> None:
        """The head's processes; those of the other nodes live on."""
        self._old += [process for node in self.nodes for process in _processes(node)]
        for process in _processes(self._cluster.head_node):
            _kill(process)

    def new_head(self, nodes: int) -> None:
        self._start(nodes)

    def shut(self) -> None:
        live = [node for node in (*self.nodes, self._cluster.head_node) if node is not None]
        for process in (*self._old, *(p for node in live for p in _processes(node))):
            _kill(process)


_SMALL: dict[str, Any] = {
    "node_ip_address": "127.0.0.2",
    "object_store_memory": 80_000_000,
    "include_dashboard": False,
}


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def _processes(node: Any) -> list[psutil.Process]:
    """A node's own processes, the raylet first, then the workers below them."""
    found = []
    for kind in sorted(node.all_processes, key=lambda kind: kind != "raylet"):
        for info in node.all_processes[kind]:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(info.process.pid))
    return found + [child for p in found for child in _children(p)]


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(process.children(recursive=True))
    return []


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def environment(extra: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """What nodes and drivers start with, also set here, because nodes inherit it."""
    folder = tempfile.mkdtemp(dir="/tmp")  # Ray puts sockets in it, whose paths must be short.
    mine = {
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Workers have their own environment, so those that Ray starts beforehand are never used.
        "RAY_prestart_worker_first_driver": "0",
        **(extra or {}),
    }
    before = {key: os.environ.get(key) for key in (*mine, "RAY_ADDRESS")}
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(mine)
    try:
        yield dict(os.environ)
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
        shutil.rmtree(folder, ignore_errors=True)
