"""MEMIT: many facts, one change of several MLP weights (Meng et al. 2023, Section 4), and with a
history of the facts that earlier batches of a chain have written.

The formulas, K being the keys of a batch, R their residuals (`spreading`), C the second moment:

- MEMIT, Equation 14: Delta = R [(lambda C + K K^T)^-1 K]^T.
- With history (MEMIT_seq of AlphaEdit's code; AlphaEdit's paper, arXiv 2410.02355, has it as
  baseline): Delta = R [(lambda C + H + K K^T)^-1 K]^T, then H += K K^T with the keys of the model
  in which all layers are edited. With H = 0 it is MEMIT.

Legend: G groups that are written together, N requests of a group, K key size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rome.editors.history import History
from rome.editors.spreading import Remembering, Spreading, SpreadingSettings
from rome.models import EditableModel
from rome.settings import configurable
from rome.solver import Solver


@configurable(second_moment_weight=(1e-12, 1e12))
class MemitSettings(SpreadingSettings):
    """Hyperparameters of MEMIT; the defaults are the published ones for GPT-2 XL."""

    second_moment_weight: float = 20_000
    """Lambda: how many tokens the second moment stands for. [mom2_update_weight]"""
    history: bool = False
    """In a chain of batches, also keep the values of the keys of earlier batches."""


class Memit(Spreading):
    """MEMIT; `solvers`: of C = E[k k^T] at each of the layers. The rest as `Spreading` has it."""

    settings: MemitSettings

    def __init__(
        self,
        model: EditableModel,
        settings: MemitSettings,
        templates: Sequence[str],
        solvers: Mapping[int, Solver],
        token_budget: int,
    ) -> None:
        super().__init__(model, settings, templates, token_budget)
        self.solvers = solvers

    def _adjusted(self, layer: int, keys_GNK: Tensor, past: History | None) -> Tensor:
        """(lambda C + H + K K^T)^-1 K."""
        solver, weight = self.solvers[layer], self.settings.second_moment_weight
        if past is None:
            return solver.solve_with(keys_GNK, weight)
        if past.sum_KK is not None:
            solver, weight = solver.plus(weight, past.sum_KK), 1.0
        return solver.solve_with(keys_GNK, weight, past.keys_MK)


class MemitWithHistory(Memit, Remembering):
    """MEMIT that carries the keys of a chain's earlier batches."""

    def _most_keys(self, layer: int) -> float:
        return len(self.solvers[layer].factor_KK) / 2
