"""AlphaEdit: many facts, one change of several MLP weights that leaves alone what C says is in use
(Fang et al. 2025, arXiv 2410.02355).

The formulas, K being the keys of a batch and R their residuals (`spreading`), of the released code:

- P = U0 U0^T (Section 3.2), U0 the eigenvectors of the mean C = E[k k^T] whose eigenvalue is below
  the threshold. The paper has C as a sum; the code's C is the mean, so `threshold` is on that.
- Delta^T = [P (K K^T + H) + L2 I]^-1 P K R^T (Equation 14, in which L2 is 1).
- H += K K^T with the keys of the model in which all layers are edited. [cache_c]

Delta^T is in the range of P, so with k = U0^T K and h the same of earlier keys it is
U0 [(k k^T + h h^T) + L2 I]^-1 k R^T: smaller and symmetric. With A = [h, k] the inverse times A is
A (A^T A + L2 I)^-1, smaller still where keys are fewer than directions.

Legend: G groups that are written together, N requests of a group, M keys of earlier batches, K key
size, R kept directions, A = M + N keys.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rome.editors.history import History
from rome.editors.spreading import Remembering, SpreadingSettings
from rome.models import EditableModel
from rome.settings import configurable
from rome.solver import Solver

_log = logging.getLogger(__name__)


@configurable(threshold=(1e-12, 1e12), l2=(1e-12, 1e12))
class AlphaEditSettings(SpreadingSettings):
    """Hyperparameters of AlphaEdit; the defaults are the published ones for GPT-2 XL."""

    threshold: float = 2e-2
    """Directions of C whose eigenvalue is below it may change. [nullspace_threshold]"""
    relative: bool = False
    """The threshold is one of the mean C itself, as published, so that it means something else
    for each model. True: it is times C's median eigenvalue, which one large direction cannot move
    as it moves the mean and the largest."""
    l2: float = 10.0
    """Weight of the identity. The paper's equation has 1. [L2]"""


class AlphaEdit(Remembering):
    """AlphaEdit; `solvers`: of C = E[k k^T] at each of the layers. The rest as `Spreading` has it.

    Raises ValueError where the threshold keeps no direction of a layer.
    """

    settings: AlphaEditSettings

    def __init__(
        self,
        model: EditableModel,
        settings: AlphaEditSettings,
        templates: Sequence[str],
        solvers: Mapping[int, Solver],
        token_budget: int,
    ) -> None:
        super().__init__(model, settings, templates, token_budget)
        self.directions = {n: self._kept(n, solvers[n]) for n in settings.layers}
        """U0 [K, R] of each layer, float64."""

    def _kept(self, layer: int, solver: Solver) -> Tensor:
        values_K, vectors_KK = solver.spectrum(self.model.device)
        threshold = self.settings.threshold
        if self.settings.relative:
            threshold *= float(values_K.median())
        rank = int((values_K < threshold).sum())
        if rank == 0:
            raise ValueError(
                f"threshold must be above the smallest eigenvalue of C at layer {layer}, "
                f"{float(values_K[0]):.3g}, or no direction may change; got {threshold:.3g}. "
                "Choose a larger one, or `relative: true`"
            )
        _log.info(
            "AlphaEdit may change %d of %d directions at layer %d", rank, len(values_K), layer
        )
        return vectors_KK[:, :rank]

    def _own_health(self) -> dict[str, float]:
        return {"rank": min(kept_KR.shape[1] for kept_KR in self.directions.values())}

    def _most_keys(self, layer: int) -> float:
        return self.directions[layer].shape[1] / 2

    def _adjusted(self, layer: int, keys_GNK: Tensor, past: History | None) -> Tensor:
        """U0 [(k k^T + h h^T) + L2 I]^-1 k."""
        kept_KR, l2 = self.directions[layer], self.settings.l2
        keys_GNR = keys_GNK.to(kept_KR) @ kept_KR
        G, N, R = keys_GNR.shape
        past_MR = keys_GNR.new_zeros(0, R) if past is None else past.keys_MK.to(kept_KR) @ kept_KR
        all_GAR = torch.cat([past_MR.expand(G, -1, -1), keys_GNR], dim=1)
        A = all_GAR.shape[1]
        if A <= R and (past is None or past.sum_KK is None):
            inner_GAA = all_GAR @ all_GAR.mT + l2 * torch.eye(A).to(kept_KR)
            last_AN = torch.eye(A).to(kept_KR)[:, A - N :].expand(G, -1, -1)
            shares_GAN = torch.cholesky_solve(last_AN, torch.linalg.cholesky(inner_GAA))
            adjusted_GNR = shares_GAN.mT @ all_GAR
        else:
            whole_GRR = all_GAR.mT @ all_GAR + l2 * torch.eye(R).to(kept_KR)
            if past is not None and past.sum_KK is not None:
                whole_GRR += kept_KR.T @ past.sum_KK.to(kept_KR) @ kept_KR
            factor_GRR = torch.linalg.cholesky(whole_GRR)
            adjusted_GNR = torch.cholesky_solve(keys_GNR.mT, factor_GRR).mT
        return (adjusted_GNR @ kept_KR.T).to(keys_GNK.device)
