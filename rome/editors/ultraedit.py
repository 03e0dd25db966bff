"""UltraEdit: a change of MLP weights from one gradient, normalised over all edits of a chain
(Gu et al. 2025, arXiv 2505.14679). No search for v*: one pass forward and back.

The formulas, for each edited weight, with a row for each position after which a token of a target
is predicted: H [N, K] its inputs there, G [N, D] the gradients of -log p at its outputs.

- [H^ | G^] = ([H | G] - mean) / deviation, both over all rows so far, those of the batch included
  (lifelong normalisation; Welford's sums, exactly).
- V = -lr |H^|^2 G^, row by row.
- Delta^T = (H^T H + I)^-1 H^T V, with H as it is. It equals H^T (H H^T + I)^-1 V, of rank N.

Every token of a target weighs the same in -log p. The released code shares the sums among weights
of one shape, and merges unbiased variances as if they were sums; here each weight has its own, as
in the paper.

Legend: N label positions, K input size, D output size, F = K + D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rome.data.records import RecordError, Request
from rome.editors import gradients
from rome.edits.deltas import Delta, Edit, LowRankDelta, cheapest, total_norm
from rome.models import EditableModel, costs, memory
from rome.models.families import UnsupportedModelError
from rome.models.prompts import Text
from rome.settings import configurable


@configurable(learning_rate=(1e-12, 100))
class UltraEditSettings:
    """Hyperparameters of UltraEdit; the defaults are the published ones for GPT-J."""

    gate: tuple[int, ...] = ()
    """The layers, counted from 0, whose gate is edited; only gated MLPs have one."""
    up: tuple[int, ...] = ()
    """The layers whose up-projection is edited."""
    down: tuple[int, ...] = tuple(range(18, 27))
    """The layers whose down-projection is edited."""
    learning_rate: float = 1e-6

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("gate, up or down must name a layer, got none")

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that are edited, ascending."""
        return tuple(sorted({*self.gate, *self.up, *self.down}))


@dataclass(frozen=True)
class _Running:
    """Mean and sum of squared distances to it of the rows so far, by Welford's formulas."""

    count: int
    mean_F: Tensor
    squares_F: Tensor

    def followed_by(self, rows_NF: Tensor) -> _Running:
        count = self.count + len(rows_NF)
        mean_F = rows_NF.mean(0)
        apart_F = mean_F - self.mean_F
        squares_F = self.squares_F + (rows_NF - mean_F).square().sum(0)
        squares_F += apart_F.square() * (self.count * len(rows_NF) / count)
        return _Running(count, self.mean_F + apart_F * (len(rows_NF) / count), squares_F)

    def normalised(self, rows_NF: Tensor) -> Tensor:
        """An input that is always the same, such as a neuron that is off, is 0."""
        deviation_F = (self.squares_F / (self.count - 1)).sqrt()
        return (rows_NF - self.mean_F) / (deviation_F + torch.finfo(torch.float32).eps)


class UltraEdit:
    """Edits the requests of a batch together; alone, each is a batch of one.

    `token_budget`: tokens of a forward pass at most. Raises UnsupportedModelError where gates are
    to be edited and the model's MLPs have none of their own.
    """

    def __init__(
        self, model: EditableModel, settings: UltraEditSettings, token_budget: int
    ) -> None:
        self.model, self.settings = model, settings
        self.tokens = token_budget // costs.of(model.device).backward
        family = model.family
        if settings.gate and family.gate_projection is None:
            raise UnsupportedModelError(
                f"gate must be empty for {model.name}, whose MLPs have no gate projection of their "
                f"own, got {settings.gate}; edit up or down"
            )
        modules = [(family.gate_projection or "", settings.gate)]
        modules += [(family.up_projection, settings.up), (family.down_projection, settings.down)]
        self.weights = [
            f"{model.module_name(layer, path)}.weight"
            for path, layers in modules
            for layer in layers
        ]

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        """One edit per request, each from the unedited model and normalised by its own rows alone.

        Raises RecordError for a target of one token, which has no deviation.
        """
        return [self.edit_together([request]) for request in requests]

    def edit_together(self, requests: Sequence[Request]) -> Edit:
        """One edit for all requests. It carries the last of them; raises as `edit_batch` does."""
        return self.edit_batch(requests, self.begin())[0]

    def begin(self) -> dict[str, Tensor]:
        """The state before the first batch: no rows."""
        state: dict[str, Tensor] = {}
        for name in self.weights:
            nothing_F = torch.zeros(sum(self.model.sizes(name)), dtype=torch.float64)
            running = _Running(0, nothing_F, nothing_F.clone())
            state |= _named(name, running)
        return state

    def edit_batch(
        self, requests: Sequence[Request], state: Mapping[str, Tensor]
    ) -> tuple[Edit, dict[str, Tensor]]:
        """One edit of all requests, normalised by all rows so far, and the state with its rows.

        Raises RecordError where there has been but one row.
        """
        texts = self.model.encode_targets([(r.text, r.target, r.separator) for r in requests])
        found = memory.in_batches(
            texts,
            memory.by_length([len(text.ids) for text in texts], self.tokens),
            self._rows,
        )
        deltas: dict[str, Delta] = {}
        after: dict[str, Tensor] = {}
        wide = torch.promote_types(self.model.dtype, torch.float32)
        for i, name in enumerate(self.weights):
            D, K = self.model.sizes(name)
            rows_NF = torch.cat([rows[i] for rows, _ in found])
            running = _of(state, name, rows_NF.device).followed_by(rows_NF)
            if running.count < 2:
                raise RecordError(
                    "UltraEdit divides by a deviation, so its first batch must have at least two "
                    "tokens of targets, got 1; edit more records together (edits_per_model)"
                )
            after |= _named(name, running)
            normal_NK, gradient_ND = running.normalised(rows_NF).split([K, D], dim=1)
            lengths_N1 = normal_NK.square().sum(1, keepdim=True)
            value_ND = -self.settings.learning_rate * lengths_N1 * gradient_ND
            input_NK = rows_NF[:, :K]
            inner_NN = input_NK @ input_NK.T + torch.eye(len(input_NK)).to(input_NK)
            left_ND = torch.linalg.solve(inner_NN, value_ND)
            deltas[name] = cheapest(LowRankDelta(left_ND.T.to(wide), input_NK.T.to(wide)))
        loss = sum(loss for _, loss in found) / len(found)
        return Edit(requests[-1], deltas, {"loss": loss, "norm": total_norm(deltas)}), after

    def _rows(self, texts: Sequence[Text]) -> list[tuple[list[Tensor], float]]:
        """Each text's rows [N, F] for each weight, float64, and its loss."""
        first = self.settings.layers[0]
        observed = gradients.observe(self.model, first, texts)
        batch = gradients.side_by_side(self.model, first, observed)
        loss_E, factors = gradients.at_tokens(self.model, self.weights, batch)
        at_ET = batch.label_weights_BT > 0
        # The loss is a mean over a target's tokens.
        tokens_E = at_ET.sum(1)
        rows = []
        for e, loss in enumerate(loss_E.tolist()):
            of_weights = []
            for name in self.weights:
                x_ETK, delta_ETD = factors[name]
                gradient_ND = delta_ETD[e, at_ET[e]] * tokens_E[e]
                both_NF = torch.cat([x_ETK[e, at_ET[e]], gradient_ND], dim=1)
                of_weights.append(both_NF.double())
            rows.append((of_weights, loss))
        return rows


def _named(weight: str, running: _Running) -> dict[str, Tensor]:
    """Welford's sums of a weight as tensors of a chain's state."""
    return {
        f"{weight}.count": torch.tensor(running.count),
        f"{weight}.mean": running.mean_F,
        f"{weight}.squares": running.squares_F,
    }


def _of(state: Mapping[str, Tensor], weight: str, device: torch.device) -> _Running:
    mean_F, squares_F = (state[f"{weight}.{name}"].to(device) for name in ("mean", "squares"))
    return _Running(int(state[f"{weight}.count"]), mean_F, squares_F)
