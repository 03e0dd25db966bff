"""C^-1 k, and how well C can be solved.

Legend: G groups, N rows of a group, E edits, K key size, b vectors of a basis.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class UnsolvableError(ValueError):
    """C has no inverse: its keys do not span the space of keys."""


class Solver:
    """C^-1 k by Cholesky in float64, factored once, on the device of C.

    `mean_KK`: C of so many tokens.

    Raises UnsolvableError where C is singular; the error says how many tokens are lacking.
    """

    def __init__(self, mean_KK: Tensor, count: int) -> None:
        factor_KK, failed = torch.linalg.cholesky_ex(mean_KK)
        # Rounding may let a singular C through: its factor then ends in noise.
        pivots_K = factor_KK.diagonal().square()
        noise = len(pivots_K) * torch.finfo(torch.float64).eps
        singular = bool(failed) or bool(pivots_K.min() <= noise * pivots_K.max())
        if count < len(pivots_K) or singular:
            raise UnsolvableError(_what_is_lacking(mean_KK, count))
        self.factor_KK = factor_KK
        """C = L L^T with this L, lower triangular."""

    @classmethod
    def of_factor(cls, factor_KK: Tensor) -> Solver:
        """A solver from the factor of another."""
        solver = cls.__new__(cls)
        solver.factor_KK = factor_KK
        return solver

    def solve(self, keys_EK: Tensor) -> Tensor:
        """C^-1 k of each row [E, K], float64, on the device of the keys."""
        right_KE = keys_EK.to(self.factor_KK).T
        return torch.cholesky_solve(right_KE, self.factor_KK).T.to(keys_EK.device)

    def solve_with(self, keys_GNK: Tensor, weight: float) -> Tensor:
        """(weight C + sum of k k^T)^-1 k of each row [G, N, K], each sum over the N rows of a group
        (Meng et al. 2023, Equation 14): float64, on the device of the keys.

        In the space of the rows or in that of the keys, whichever is smaller.
        """
        G, N, K = keys_GNK.shape
        if N <= K:
            # (weight C + K K^T)^-1 K = U (1 + K^T U)^-1 with U = (weight C)^-1 K.
            solved_GNK = self.solve(keys_GNK.flatten(0, 1)).view(G, N, K) / weight
            identity_NN = torch.eye(N, dtype=torch.float64, device=keys_GNK.device)
            return torch.linalg.solve(identity_NN + keys_GNK @ solved_GNK.mT, solved_GNK)
        keys = keys_GNK.to(self.factor_KK)
        sum_GKK = weight * (self.factor_KK @ self.factor_KK.T) + keys.mT @ keys
        return torch.cholesky_solve(keys.mT, torch.linalg.cholesky(sum_GKK)).mT.to(keys_GNK.device)

    def condition_number(self, steps: int = 30) -> float:
        """Largest over smallest eigenvalue of C, estimated from below by steps of power iteration
        with C and with its inverse, each on a few vectors: the cost of some solves."""
        generator = torch.Generator().manual_seed(0)
        begin_Kb = torch.randn(len(self.factor_KK), 8, generator=generator, dtype=torch.float64)

        def largest(of: Callable[[Tensor], Tensor]) -> float:
            basis_Kb = begin_Kb.to(self.factor_KK)
            for _ in range(steps):
                basis_Kb = torch.linalg.qr(of(basis_Kb)).Q
            return float(torch.linalg.eigvalsh(basis_Kb.T @ of(basis_Kb))[-1])

        return largest(lambda x: self.factor_KK @ (self.factor_KK.T @ x)) * largest(
            lambda x: torch.cholesky_solve(x, self.factor_KK)
        )


def _what_is_lacking(mean_KK: Tensor, count: int) -> str:
    key_size = len(mean_KK)
    rank = min(int(torch.linalg.matrix_rank(mean_KK, hermitian=True)), count, key_size - 1)
    return (
        f"the second moment cannot be solved: {count} tokens span {rank} of {key_size} key "
        f"dimensions. It needs at least {key_size - rank} more tokens, and ten times {key_size} in "
        "all are advisable. Take a larger corpus, or edit without the "
        "second moment."
    )
