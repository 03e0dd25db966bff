"""Attention caches: the one place that knows how transformers keeps keys and values.

Legend: B rows, T tokens, P tokens of a prefix, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from rome.models.attention import Pieces

KeysValues = tuple[Tensor, Tensor]
"""Of a layer, each [B, heads, T, d]."""


def recording() -> Cache:
    """An empty cache, which keeps the keys and values of the one pass that it is given to."""
    return Cache(layer_class_to_replicate=_Recording)


def recorded(cache: Cache) -> list[KeysValues]:
    """The keys and values of each layer."""
    layers: list[Any] = cache.layers
    return [layer.found for layer in layers]


class _Recording(DynamicLayer):
    """Like a DynamicLayer for one pass, without its copy."""

    found: KeysValues

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> KeysValues:
        self.found = key_states, value_states
        return self.found

    def get_seq_length(self) -> int:
        return 0


def with_prefix(layers: Sequence[KeysValues | None], length: int) -> Cache:
    """A cache that answers with `length` tokens and the pass's own, and keeps only the former.

    None stands for a layer that does not run. A pass may have several times the rows of a prefix:
    its rows are then repeated as a whole.
    """
    made: list[Any] = [_Prefix(layer, length) for layer in layers]
    return Cache(layers=made)


class _Prefix(DynamicLayer):
    def __init__(self, prefix: KeysValues | None, length: int) -> None:
        super().__init__()
        self.prefix, self.length = prefix, length
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        assert self.prefix is not None
        keys, values = self.prefix
        if (times := len(key_states) // len(keys)) > 1:
            keys, values = (x.repeat(times, 1, 1, 1) for x in self.prefix)
        return Pieces(keys, key_states), Pieces(values, value_states)

    def get_seq_length(self) -> int:
        return self.length


class Room(Cache):
    """A cache with all its room from the start, filled column by column without a copy.

    `layers`: the keys and values of B rows that it begins with. `place_B`: which of those rows each
    of its own begins with. `length`: of its room. Before a pass, say by `at` where its token goes.
    """

    def __init__(self, layers: Sequence[KeysValues], place_B: Tensor, length: int) -> None:
        made: list[Any] = [_Room(keys, values, place_B, length) for keys, values in layers]
        super().__init__(layers=made)

    def at(self, column_1: Tensor, rows: int, seen: int) -> None:
        """The next pass has the first `rows` rows, whose token goes to `column_1` (read when the
        pass runs) and which see the first `seen` columns."""
        layers: list[Any] = self.layers
        for layer in layers:
            layer.column_1, layer.rows, layer.seen = column_1, rows, seen


class _Room(DynamicLayer):
    column_1: Tensor
    rows: int
    seen: int

    def __init__(self, keys: Tensor, values: Tensor, place_B: Tensor, length: int) -> None:
        super().__init__()
        self.room = [_roomy(x, place_B, length) for x in (keys, values)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        found = []
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            rows = room[: self.rows]
            rows.index_copy_(2, self.column_1.to(room.device), states)
            found.append(rows[:, :, : self.seen])
        return tuple(found)

    def get_seq_length(self) -> int:
        return self.seen - 1


def _roomy(states: Tensor, place_B: Tensor, length: int) -> Tensor:
    _, heads, T, d = states.shape
    # Zeros, since what a mask hides is still multiplied, by nothing.
    room = states.new_zeros(len(place_B), heads, length, d)
    room[:, :, :T] = states[place_B.to(states.device)]
    return room
