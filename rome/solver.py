"""C^-1 k, and how well C can be solved.

Legend: G groups, N rows of a group, M rows before, E edits, K key size, b vectors of a basis.
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

    def solve_with(self, keys_GNK: Tensor, weight: float, past_MK: Tensor | None = None) -> Tensor:
        """(weight C + H + sum of k k^T)^-1 k of each row [G, N, K], each sum over the N rows of a
        group (Meng et al. 2023, Equation 14): float64, on the device of the keys.

        H is the sum of k k^T over keys that were written before, `past_MK`, and 0 without them. In
        the space of the rows or in that of the keys, whichever is smaller.
        """
        G, N, K = keys_GNK.shape
        if N <= K:
            # (B + K K^T)^-1 K = U (1 + K^T U)^-1 with U = B^-1 K, once for K and B = weight C + H,
            # and once for the earlier keys and B = weight C.
            solved_GNK = self.solve(keys_GNK.flatten(0, 1)).view(G, N, K) / weight
            if past_MK is not None and len(past_MK):
                past_MK = past_MK.to(solved_GNK)
                across_MK = self.solve(past_MK) / weight
                inner_MM = torch.eye(len(past_MK)).to(past_MK) + past_MK @ across_MK.T
                shares_MN = torch.linalg.solve(inner_MM, past_MK @ solved_GNK.flatten(0, 1).T)
                solved_GNK = solved_GNK - (shares_MN.T @ across_MK).view(G, N, K)
            identity_NN = torch.eye(N, dtype=torch.float64, device=keys_GNK.device)
            return torch.linalg.solve(identity_NN + keys_GNK @ solved_GNK.mT, solved_GNK)
        keys = keys_GNK.to(self.factor_KK)
        sum_GKK = weight * self._mean() + keys.mT @ keys
        if past_MK is not None:
            past_MK = past_MK.to(self.factor_KK)
            sum_GKK = sum_GKK + past_MK.T @ past_MK
        return torch.cholesky_solve(keys.mT, torch.linalg.cholesky(sum_GKK)).mT.to(keys_GNK.device)

    def plus(self, weight: float, sum_KK: Tensor) -> Solver:
        """A solver of weight C + `sum_KK`, factored anew."""
        whole_KK = weight * self._mean() + sum_KK.to(self.factor_KK)
        return Solver.of_factor(torch.linalg.cholesky(whole_KK))

    def spectrum(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """The eigenvalues of C [K], ascending, and its eigenvectors [K, K], a column each, computed
        on `device` and left where C is."""
        found = torch.linalg.eigh(self._mean().to(device))
        return found.eigenvalues.to(self.factor_KK), found.eigenvectors.to(self.factor_KK)

    def _mean(self) -> Tensor:
        return self.factor_KK @ self.factor_KK.T

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
