"""The keys that earlier batches of a chain have written, as editors carry them on.

Legend: N keys, M keys of earlier batches, K key size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class History:
    """H = sum of k k^T over the keys of a layer that were written before: `sum_KK`, which is None
    as long as there is none, and the `keys_MK` that it lacks."""

    keys_MK: Tensor
    sum_KK: Tensor | None = None

    @classmethod
    def of(cls, state: Mapping[str, Tensor], layer: int) -> History:
        """The history of a layer in the state of a chain."""
        return cls(state[f"layer.{layer}.keys"], state.get(f"layer.{layer}.sum"))

    def named(self, layer: int) -> dict[str, Tensor]:
        """The part of a chain's state that is this layer's."""
        tensors = {f"layer.{layer}.keys": self.keys_MK}
        return tensors if self.sum_KK is None else {**tensors, f"layer.{layer}.sum": self.sum_KK}

    def followed_by(self, keys_NK: Tensor, most: float) -> History:
        """With the keys of another batch: themselves while all are fewer than `most`, which takes
        less memory and time, and added up above."""
        keys_MK = torch.cat([self.keys_MK.to(keys_NK), keys_NK])
        if self.sum_KK is None and len(keys_MK) < most:
            return History(keys_MK)
        sum_KK = keys_MK.T @ keys_MK
        if self.sum_KK is not None:
            sum_KK += self.sum_KK.to(sum_KK)
        return History(keys_MK[:0], sum_KK)
