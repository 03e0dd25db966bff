"""Fixtures that more than one test file uses."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

ROOT = Path(__file__).parents[1]


# A test is of these kinds by what it uses. Those that start Ray or a model by a command say so.
_KINDS = {"ray_address": "ray", "browser": "browser"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in _KINDS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(_KINDS[fixture])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray of four CPUs on this machine, joined by this process; its address is for others.

    Its workers can import the packages and the tests' own modules.
    """
    folder = tempfile.mkdtemp(dir="/tmp")  # Ray puts sockets in it, whose paths must be short.
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=100_000_000,
            log_to_driver=False,
            _node_ip_address="127.0.0.2",
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
