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
    """Tokens of several texts; the token before `ids[n]` is `ids[parents[n]]`, or none for -1."""

    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    _path: list[int] = field(default_factory=list)
    """The places of the last text's tokens."""

    def size_with(self, ids: Sequence[int]) -> int:
        """The number of tokens with this text added."""
        return len(self.ids) + len(ids) - len(self._shared(ids))

    def add(self, ids: Sequence[int]) -> list[int]:
        """The places of a text's tokens. Texts that come sorted share all that they can."""
        path = self._shared(ids)
        for token in ids[len(path) :]:
            self.parents.append(path[-1] if path else -1)
            path.append(len(self.ids))
            self.ids.append(token)
        self._path = path
        return path

    def _shared(self, ids: Sequence[int]) -> list[int]:
        """The places of the tokens that the last text and this one begin with."""
        pairs = zip(self._path, ids, strict=False)
        return [place for place, _ in takewhile(lambda pair: self.ids[pair[0]] == pair[1], pairs)]


def sees(trees: Sequence[Tree]) -> Tensor:
    """The mask of the tokens that each token sees [B, T, T], bool, for trees padded on the right.

    It sees itself and those before it in its texts; padding sees itself.
    """
    T = max(len(tree.ids) for tree in trees)
    sees_BTT = torch.eye(T, dtype=torch.bool).repeat(len(trees), 1, 1)
    for tree, sees_TT in zip(trees, sees_BTT, strict=True):
        for n, parent in enumerate(tree.parents):
            if parent >= 0:
                sees_TT[n] |= sees_TT[parent]
    return sees_BTT
