"""Batches that fit into memory, and halves of those that do not.

Legend: D hidden size, K key size, L layers.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rome.models import costs

if TYPE_CHECKING:
    from rome.models import EditableModel

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_log = logging.getLogger(__name__)


def token_budget(model: EditableModel, share: float = 1.0) -> int:
    """Tokens of a forward pass that suit a model's device, and there the memory that is free now.

    `share`: of a GPU that several workers share.
    """
    device, most = model.device, costs.of(model.device).token_budget
    if device.type != "cuda":
        return most
    used = torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - used  # What the allocator keeps can be had again.
    free = min(free, int(share * total) - used)
    return max(1, min(most, int(_USED * free / bytes_per_token(model))))


# The rest is for what the allocator cannot use, and for what is no batch.
_USED = 0.6


def bytes_per_token(model: EditableModel) -> float:
    """Memory that batches of any kind take for each token of their budget, roughly and at most.

    An optimisation keeps about twelve hidden states and three of the MLP for each token and layer,
    and logits of every third token; a decoding keeps keys and values.
    """
    config, cost = model.hf.config, costs.of(model.device)
    D, K = model.sizes(model.weight_name(0))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or D // config.num_attention_heads
    L, size = len(model.layers), model.dtype.itemsize
    optimised = L * (12 * D + 3 * K) * size + config.vocab_size * (8 + size) / 3
    decoded = 2 * L * heads * head_size * size
    return max(optimised / cost.backward, decoded * cost.cached)


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
        if len(batch) == 1 or not out_of_memory(error):
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


def out_of_memory(error: Exception) -> bool:
    """True if an error says that memory does not suffice."""
    # On a CPU torch raises a RuntimeError of its allocator.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )
