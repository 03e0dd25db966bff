"""Attention caches: the one place that knows how transformers keeps keys and values.

Legend: B rows, T tokens, P tokens of a prefix, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

KeysValues = tuple[Tensor, Tensor]
"""Of a layer, each [B, heads, T, d]."""


def recording() -> Cache:
    """An empty cache, which keeps the keys and values of the passes that it is given to."""
    return DynamicCache()


def recorded(cache: Cache) -> list[KeysValues]:
    """The keys and values of each layer."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def with_prefix(layers: Sequence[KeysValues | None], length: int) -> Cache:
    """A cache that answers with `length` tokens and the pass's own, and keeps only the former.

    None stands for a layer that does not run. A pass may have several times the rows of a prefix:
    its rows are then repeated as a whole.
    """
    made: list[Any] = [_Prefix(layer, length) for layer in layers]
    return Cache(layers=made)


def with_room(layers: Sequence[KeysValues], length: int) -> Cache:
    """A cache that begins with these tokens and has room for `length`; none is copied again.

    Rows at the end may leave: theirs is the only room that is not written then.
    """
    made: list[Any] = [_Growing(keys, values, length) for keys, values in layers]
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
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return self.length


class _Growing(DynamicLayer):
    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        B, H, self.used, _ = keys.shape
        self.room_keys = keys.new_empty(B, H, length, keys.shape[3])
        self.room_values = values.new_empty(B, H, length, values.shape[3])
        self.room_keys[:, :, : self.used] = keys
        self.room_values[:, :, : self.used] = values
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        before, self.used = self.used, self.used + key_states.shape[2]
        n = len(key_states)
        self.room_keys[:n, :, before : self.used] = key_states
        self.room_values[:n, :, before : self.used] = value_states
        return self.room_keys[:n, :, : self.used], self.room_values[:n, :, : self.used]

    def get_seq_length(self) -> int:
        return self.used
