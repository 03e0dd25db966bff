"""How far workers are within their leases, so that a bar moves before the first one ends.

A task tells it by `tell`. It counts for nothing but what people see: done is what is in the store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import ray
from ray.experimental import internal_kv

from cluster.grid import Lease

EVERY_SECONDS = 1.0
"""A worker says no more often how far it is, and nothing of a lease that is done before."""
_NAMESPACE = b"told"

_hears: ContextVar[Callable[[float], object]] = ContextVar("hears", default=lambda rows: None)


def tell(rows: float) -> None:
    """So many rows of the lease are done, or as much work as they are."""
    _hears.get()(rows)


@contextmanager
def heard(by: Callable[[float], object]) -> Iterator[None]:
    """In the block, what is told is said to `by`."""
    token = _hears.set(by)
    try:
        yield
    finally:
        _hears.reset(token)


@contextmanager
def heard_by_driver(run: str, lease: Lease) -> Iterator[None]:
    """In the block, in a worker of Ray, the driver can read what is told of a lease (`read`)."""
    key, began, said = _key(run, lease), time.monotonic(), 0.0

    def put(rows: float) -> None:
        nonlocal said
        now = time.monotonic() - began
        if now - said >= EVERY_SECONDS:
            said = now
            with suppress(Exception):  # No lease fails because nobody hears of it.
                internal_kv._internal_kv_put(key, repr(rows).encode(), namespace=_NAMESPACE)

    try:
        with heard(put):
            yield
    finally:
        with suppress(Exception):
            if said:
                internal_kv._internal_kv_del(key, namespace=_NAMESPACE)


def read(run: str, leases: Iterable[Lease]) -> dict[Lease, float]:
    """How many rows are done of each lease that a worker tells of."""
    keys = {_key(run, lease): lease for lease in leases}
    client = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
    found = client.internal_kv_multi_get([*keys], _NAMESPACE) if keys else {}
    return {keys[key]: min(float(text), keys[key].rows) for key, text in found.items() if text}


def _key(run: str, lease: Lease) -> bytes:
    return f"{run}/{lease.part}".encode()
