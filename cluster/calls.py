"""Functions that a worker calls for the driver, such as those that need the model."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cluster.joining import joined
from cluster.nodes import lacking, worker_options
from cluster.progress import LOG_SECONDS
from cluster.settings import RunSettings
from cluster.signals import stop_signals
from cluster.words import deliberate, note, shown


class FaultError(RuntimeError):
    """A worker's function failed by a fault of this project; the message is its traceback."""


def once(function: Callable[..., Any], *args: Any, settings: RunSettings) -> Any:
    """Call a function in a worker of these settings and return its answer.

    Raises the error that it raises if that is meant for the user (see `words.deliberate`), and
    FaultError in place of others, and RayError where the worker dies; without workers it is called
    here, and raises what it raises.
    """
    if settings.workers == 0:
        return function(*args)
    settings = joined(settings)
    ref = ray.remote(_called).options(**worker_options(settings)).remote(function, *args)
    _await(ref, settings)
    return _answer(ref)


def _await(first: Any, settings: RunSettings) -> None:
    """Wait for a task's first value, and say every ten seconds if no node has room for it."""
    while not ray.wait([first], timeout=LOG_SECONDS, fetch_local=False)[0]:
        if lack := lacking(settings):
            note(f"waiting for a node to join: {lack}")


def _called(function: Callable[..., Any], *args: Any) -> Any:
    with _told_apart():
        return function(*args)


def _generated(function: Callable[..., Any], *args: Any) -> Iterator[Any]:
    with _told_apart():
        yield from function(*args)


@contextmanager
def _told_apart() -> Iterator[None]:
    """Errors meant for the user from those that are not, in a worker: on the way to the driver they
    lose where they were raised."""
    try:
        yield
    except Exception as error:
        if deliberate(error):
            raise
        text = "".join(traceback.format_exception(error))
        raise FaultError(f"in a worker:\n{shown(text)}") from None


def _answer(ref: ray.ObjectRef[Any]) -> Any:
    """Get a task's answer, or raise what ended it, without Ray's traceback."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise


def stream(function: Callable[..., Any], *args: Any, settings: RunSettings) -> Iterator[Any]:
    """Run a generator function in a worker of these settings and yield its values as they come.

    Ends early after SIGINT or SIGTERM. Raises as `once` does.
    """
    if settings.workers != 0:
        settings = joined(settings)
    with stop_signals() as stop:
        for value in _values(function, args, settings):
            yield value
            if stop.is_set():
                return


def _values(
    function: Callable[..., Any], args: Sequence[Any], settings: RunSettings
) -> Iterator[Any]:
    if settings.workers == 0:
        return iter(function(*args))
    # A retry would yield again from its own start, which Ray takes for what it has seen.
    options = {"num_returns": "streaming", "max_retries": 0, **worker_options(settings)}
    values = ray.remote(_generated).options(**options).remote(function, *args)
    _await(values, settings)
    return map(_answer, values)
