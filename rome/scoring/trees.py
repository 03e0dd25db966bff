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
    _last: list[int] = field(default_factory=list)
    _path: list[int] = field(default_factory=list)

    def shared(self, ids: Sequence[int]) -> int:
        """How many of a text's tokens the last one begins with."""
        pairs = zip(self._last, ids, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def add(self, ids: list[int]) -> list[int]:
        """The places of a text's tokens. Texts that come sorted share all that they can."""
        path = self._path[: self.shared(ids)]
        for token in ids[len(path) :]:
            self.parents.append(path[-1] if path else -1)
            path.append(len(self.ids))
            self.ids.append(token)
        self._last, self._path = ids, path
        return path


def pad(trees: Sequence[Tree]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [B, T], which tokens each of them sees [B, T, T], and positions [B, T].

    A token sees itself and those before it in its texts; padding, token 0 on the right, itself.
    """
    B, T = len(trees), max(len(tree.ids) for tree in trees)
    ids_BT = torch.zeros(B, T, dtype=torch.long)
    sees_BTT = torch.eye(T, dtype=torch.bool).repeat(B, 1, 1)
    for tree, ids_T, sees_TT in zip(trees, ids_BT, sees_BTT, strict=True):
        ids_T[: len(tree.ids)] = torch.tensor(tree.ids)
        for n, parent in enumerate(tree.parents):
            if parent >= 0:
                sees_TT[n] |= sees_TT[parent]
    return ids_BT, sees_BTT, sees_BTT.sum(2) - 1
