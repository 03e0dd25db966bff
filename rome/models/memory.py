"""Batches that fit into memory, and halves of those that do not."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Answer = TypeVar("Answer")

# What a token costs when its activations are kept, in tokens of which none are: on a GPU the budget
# is one of memory, on a CPU of what its caches hold.
BACKWARD = {"cpu": 1, "cuda": 8}

_log = logging.getLogger(__name__)


def by_length(
    lengths: Sequence[int],
    token_budget: float,
    most: int | None = None,
    order: Sequence[Any] | None = None,
) -> Iterator[list[int]]:
    """Batches of indices in ascending order of length, or of what `order` says of each.

    A batch has at most `token_budget` tokens, padding included, unless one item alone has more, and
    at most `most` items.
    """
    keys = lengths if order is None else order
    batch: list[int] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=keys.__getitem__):
        longest = max(longest, lengths[i])
        if batch and ((len(batch) + 1) * longest > token_budget or len(batch) == most):
            yield batch
            batch, longest = [], lengths[i]
        batch.append(i)
    if batch:
        yield batch


def in_batches(
    items: Sequence[Item],
    batches: Iterable[Sequence[int]],
    run: Callable[[Sequence[Item]], Sequence[Answer]],
) -> list[Answer]:
    """The answers of `run` to all items, in their order, batch by batch of indices.

    A batch that does not fit into memory is halved, see `in_halves`.
    """
    found: dict[int, Answer] = {}
    for batch in batches:
        found |= zip(batch, in_halves(run, [items[i] for i in batch]), strict=True)
    return [found[i] for i in range(len(items))]


def in_halves(
    run: Callable[[Sequence[Item]], Sequence[Answer]], batch: Sequence[Item]
) -> list[Answer]:
    """`run(batch)`, or where memory does not suffice the answers to its halves, in order.

    Each halving is logged as a warning. Raises what `run` raised where one item alone does not fit.
    """
    try:
        return list(run(batch))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if len(batch) == 1 or not _out_of_memory(error):
            raise
    # Out of the `except`, whose traceback holds the tensors of the failed run.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(batch) // 2
    _log.warning(
        "out of memory with a batch of %d: going on with halves; a smaller token_budget avoids "
        "the failed attempt",
        len(batch),
    )
    return in_halves(run, batch[:half]) + in_halves(run, batch[half:])


def _out_of_memory(error: Exception) -> bool:
    # On a CPU torch raises a RuntimeError of its allocator.
    return not isinstance(error, RuntimeError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )
