"""Texts with equal beginnings as one row of tokens, in which each beginning stands once.

Legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor


@dataclass
class Tree:
    """Tokens of several texts that come sorted, in which what they begin with alike stands once.

    `ids[n]` comes before all of `ids[n + 1 : ends[n]]` in their texts, and before no others.
    """

    ids: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    """The number of tokens before each in its texts."""
    _path: list[int] = field(default_factory=list)
    """The places of the last text's tokens."""

    def size_with(self, ids: Sequence[int]) -> int:
        """The number of tokens with this text added."""
        return len(self.ids) + len(ids) - len(self._shared(ids))

    def add(self, ids: Sequence[int]) -> list[int]:
        """The places of a text's tokens, which must not sort before the texts that are there."""
        path = self._shared(ids)
        size = len(self.ids) + len(ids) - len(path)
        for place in path:
            self.ends[place] = size
        for token in ids[len(path) :]:
            self.depths.append(len(path))
            path.append(len(self.ids))
            self.ids.append(token)
            self.ends.append(size)
        self._path = path
        return path

    def _shared(self, ids: Sequence[int]) -> list[int]:
        """The places of the tokens that the last text and this one begin with."""
        pairs = zip(self._path, ids, strict=False)
        return [place for place, _ in takewhile(lambda pair: self.ids[pair[0]] == pair[1], pairs)]


def sees(trees: Sequence[Tree], device: torch.device) -> Tensor:
    """The mask of the tokens that each token sees [B, T, T], bool, for trees padded on the right.

    It sees itself and those before it in its texts; padding sees itself.
    """
    T = max(len(tree.ids) for tree in trees)
    ends = [[*tree.ends, *range(len(tree.ends) + 1, T + 1)] for tree in trees]
    ends_B1T = torch.tensor(ends)[:, None].to(device)
    place_T = torch.arange(T, device=device)
    return (place_T[:, None] >= place_T) & (place_T[:, None] < ends_B1T)
