"""KnowledgeEditor: a recurrent network reads the edit and says how to bend its gradient.

De Cao et al. 2021, Section 3, as in the published code (`OneShotLearner`, in eric-mitchell/mend as
`efk`): W' = W + s (a * G + b), with G the gradient, a and b outer products of a softmax and a row,
and s in (0, 1). Multiplied elementwise by a rank-one matrix, G keeps its rank.

Legend: E edits, N tokens of an edit, F first and S second dimension of a weight as it is stored,
C condition, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from rome.editors.gradients import Factors, Gradient
from rome.edits.deltas import LowRankDelta
from rome.models import EditableModel
from rome.settings import configurable


@configurable(hidden=(1, 100_000), condition=(1, 100_000))
class KnowledgeEditorSettings:
    """The network's shape; the defaults are the published ones."""

    hidden: int = 512
    """Of the LSTM, in each direction, and of the conditioners. [hidden_dim]"""
    condition: int = 768
    """Size of what is known of the edit. [condition_dim]"""


class KnowledgeEditorNetwork(nn.Module):
    """A conditioner per weight, all given the same reading of prompt and target.

    The published code reads `old target >> new target || prompt` where a data set has it, and
    prompt and target where it has not: a request has not. Its token embeddings, the model's own,
    are trained further; here they stay what they are.
    """

    def __init__(
        self, model: EditableModel, weights: list[str], settings: KnowledgeEditorSettings
    ) -> None:
        super().__init__()
        self.weights, self.transposed = weights, model.family.transposed
        # In a tuple they are no part of this module, and not saved with it.
        self.embeddings = (model.hf.get_input_embeddings(),)
        hidden = settings.hidden
        (width,) = self.embeddings[0](torch.zeros((), dtype=torch.long, device=model.device)).shape
        self.lstm = nn.LSTM(width, hidden, bidirectional=True, batch_first=True)
        self.condition = nn.Linear(2 * hidden, settings.condition)
        self.shapes = [model.hf.get_parameter(name).shape for name in weights]
        self.conditioners = nn.ModuleList(
            nn.Sequential(
                weight_norm(nn.Linear(settings.condition, hidden)),
                nn.Tanh(),
                weight_norm(nn.Linear(hidden, 2 * (F + S) + 1)),
            )
            for F, S in self.shapes
        )

    def rate_parameters(self) -> list[nn.Parameter]:
        """None has a learning rate of its own."""
        return []

    def normalised(self, gradients: Sequence[Gradient]) -> list[Gradient]:
        """As they are: nothing is normalised here."""
        return list(gradients)

    def forward(self, gradients: Sequence[Gradient]) -> list[dict[str, LowRankDelta]]:
        """Each edit's change of each weight, of a rank for every token that has a gradient and one.

        Equal to reading each text alone.
        """
        condition_EC = self._read([gradient.text.ids for gradient in gradients])
        changes: list[dict[str, LowRankDelta]] = [{} for _ in gradients]
        weights = zip(self.weights, self.shapes, self.conditioners, strict=True)
        for name, (F, S), conditioner in weights:
            bends = conditioner(condition_EC).split([S, F, S, F, 1], dim=1)
            for change, gradient, *bend in zip(changes, gradients, *bends, strict=True):
                change[name] = self._bent(gradient.factors[name], *bend)
        return changes

    def _read(self, ids: list[list[int]]) -> Tensor:
        (embeddings,) = self.embeddings
        wide = self.condition.weight.dtype
        embedded = [
            embeddings(torch.tensor(row, device=self.condition.weight.device)).to(wide)
            for row in ids
        ]
        packed = nn.utils.rnn.pack_sequence(embedded, enforce_sorted=False)
        _, (last_2EH, _) = self.lstm(packed)
        condition_EC: Tensor = self.condition(torch.cat([*last_2EH], dim=1)).tanh()
        return condition_EC

    def _bent(
        self,
        factors: Factors,
        a_S: Tensor,
        a_F: Tensor,
        b_S: Tensor,
        b_F: Tensor,
        s: Tensor,
    ) -> LowRankDelta:
        """s (a * G + b) for one edit."""
        a, b = (a_F.softmax(0), a_S), (b_F.softmax(0), b_S)
        if self.transposed:
            a, b = a[::-1], b[::-1]
        left_RD = torch.cat([factors.delta_ND * a[0], b[0][None]])
        right_RK = torch.cat([factors.x_NK * a[1], b[1][None]])
        return LowRankDelta(s.sigmoid() * left_RD.T, right_RK.T)
