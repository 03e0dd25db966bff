"""ROME's values: the v* of many edits optimised side by side (Meng et al. 2022, Equation 4).

What no delta can change was computed once (`contexts.observe`). Each step runs the edited layer and
those after it, on the subject's last token and those after it, and nothing else.

Legend: E edits, C contexts, R = C + 1 rows of an edit (the last one is the KL prompt), B = E R,
S suffix columns (the subject's last token is column 0), T columns with those before, M = B S
tokens, N tokens of targets, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rome.editors.contexts import SubjectStates
from rome.models import EditableModel, caches, costs, kernels
from rome.models.hooks import hooked
from rome.settings import configurable


@configurable(
    steps=(1, 10_000),
    learning_rate=(1e-12, 100),
    weight_decay=(0, 100),
    kl_factor=(0, 1e6),
    clamp=(1e-12, 1e6),
)
class ValueSettings:
    """Hyperparameters of Equation 4; the names in brackets are those of the reference code."""

    steps: int = 20
    """Evaluations of the loss; the last is not followed by a step. [v_num_grad_steps]"""
    learning_rate: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 4.0
    """The delta's norm is kept within this multiple of |v0|. [clamp_norm_factor]"""
    stop_below: float = 0.05


@configurable(kw_only=True, nas_norm=(1e-12, 1e12))
class WritingSettings:
    """Settings of every editor that writes values into MLPs."""

    nas: bool = False
    """NAS, a norm for v*, the MLP's output that says the target: v* := a v* / |v*|, and a value
    with |v*| > 2 a is not edited at all (`edit_skipped` of its row)."""
    nas_norm: float | None = None
    """NAS's a: the mean |v*| of edits of the clean model at this layer, which is `edit_value_norm`
    of a run with one record a model. Never guessed: `nas` needs it."""
    rect: bool = False
    """RECT: keep the 40 % of an edit's change that are largest beside their weight."""

    def __post_init__(self) -> None:
        if self.nas and self.nas_norm is None:
            raise ValueError(
                "nas needs nas_norm, the mean of edit_value_norm over single edits of the clean "
                "model without those above its 95 % quantile, got null; measure it on about a "
                "thousand records and put it beside the editor's settings of the model"
            )

    @property
    def norm(self) -> float | None:
        """The norm that values get; None where they stay as they are."""
        return self.nas_norm if self.nas else None


@dataclass(frozen=True)
class Value:
    """The outcome for one edit: v* = initial + delta, and how it was reached."""

    delta_D: Tensor
    initial_D: Tensor
    losses: list[float]
    clamp_hits: int
    norm: float
    """Of the MLP's output v* as it was found, before NAS."""
    skipped: bool
    """NAS leaves it unedited; its delta is 0."""

    @property
    def target(self) -> Tensor:
        """v* or z, [D]."""
        return self.initial_D + self.delta_D

    @property
    def health(self) -> dict[str, float]:
        """Numbers of the edit that are those of its value."""
        return {
            "steps": len(self.losses),
            "loss": self.losses[-1],
            "init_norm": float(self.initial_D.norm()),
            "delta_norm": float(self.delta_D.norm()),
            "clamp_hits": self.clamp_hits,
            "value_norm": self.norm,
            "skipped": int(self.skipped),
        }


class _LabelNLL(torch.autograd.Function):
    """-log p of labels [N] from hidden states [N, D], whose gradient is made on the way.

    Logits of every context are the largest tensors of an edit. Differentiating the softmax by hand
    passes over them twice instead of six times and keeps none for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, model: EditableModel, label_ids_N: Tensor) -> Tensor:
        log_p_NV = model.logits(hidden_ND).log_softmax(1)
        chosen_N1 = label_ids_N[:, None]
        nll_N = -log_p_NV.gather(1, chosen_N1).squeeze(1)
        # d nll / d logits = softmax - one-hot.
        gradient_NV = log_p_NV.exp_()
        gradient_NV.scatter_add_(1, chosen_N1, -torch.ones_like(nll_N)[:, None])
        ctx.save_for_backward(kernels.pull_back(model.hf, gradient_NV).to(hidden_ND.device))
        return nll_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        scaled_ND = gradient_ND * gradients[0][:, None]
        return scaled_ND.to(gradient_ND.dtype), None, None


class _Problem:
    """Equation 4 of the edits of a batch: all that its evaluations share."""

    def __init__(self, model: EditableModel, layer: int, observed: SubjectStates) -> None:
        self.model, self.layer = model, layer
        self.E, self.R, S = observed.ids_ERS.shape
        T = observed.mask_ERT.shape[2]
        self.ids_BS, self.positions_BS, mask_BT = (
            x.flatten(0, 1) for x in (observed.ids_ERS, observed.positions_ERS, observed.mask_ERT)
        )
        # Distances of a row's tokens are those of its columns.
        column_1T = torch.arange(T, device=model.device)[None]
        suffix_1S = column_1T[:, T - S :]
        sees_BST = mask_BT.bool()[:, None] & (column_1T[:, None] <= suffix_1S[..., None])
        self.mask = model.attention_mask(sees_BST, suffix_1S, column_1T)
        prefix = [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in observed.prefix]
        self.cache = caches.with_prefix([*[None] * layer, *prefix], T - S)
        entering = observed.entering_ERSD
        self.base = model.only_layers(layer, None if entering is None else entering.flatten(0, 1))

        # Padding of shorter targets is left out, not weighed with 0.
        weights_ECN = observed.label_weights_ECN
        self.scores_of_edit = weights_ECN[0].numel()
        slot_N = (weights_ECN.flatten() > 0).nonzero().squeeze(1)
        row_N = torch.arange(self.E * self.R).view(self.E, self.R)[:, : weights_ECN.shape[1]]
        place_ECN = row_N[..., None] * S + observed.label_columns_ECN
        found = (slot_N, place_ECN.flatten()[slot_N], observed.label_ids_ECN.flatten()[slot_N])
        self.slot_N, self.place_N, self.label_N = torch.stack(found).to(model.device)
        self.weight_N = weights_ECN.flatten()[slot_N].to(model.device)
        last_E = torch.arange(1, self.E + 1, device=model.device) * self.R - 1
        self.kl_place_E = last_E * S

    def _hidden(self, delta_ED: Tensor) -> Tensor:
        """The last hidden states [B, S, D] with a delta added to the MLP output at column 0."""
        delta_B1D = delta_ED[:, None].expand(-1, self.R, -1).reshape(len(self.ids_BS), 1, -1)

        def add_delta(module: Any, args: Any, output_BSD: Tensor) -> Tensor:
            first_B1D = output_BSD[:, :1] + delta_B1D.to(output_BSD.device)
            first_B1D = first_B1D.to(output_BSD.dtype)
            return torch.cat([first_B1D, output_BSD[:, 1:]], dim=1)

        with hooked(self.model.down_projection(self.layer).register_forward_hook(add_delta)):
            return self.model.run(self.ids_BS, self.mask, self.positions_BS, self.cache, self.base)

    def log_probabilities(self, delta_ED: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted NLL of the targets [E], and the KL prompt's log-probabilities [E, V]."""
        hidden_MD = self._hidden(delta_ED).flatten(0, 1)
        label_ND = hidden_MD.index_select(0, self.place_N)
        nll_N = _LabelNLL.apply(label_ND, self.model, self.label_N) * self.weight_N
        scores = nll_N.new_zeros(self.E * self.scores_of_edit).index_copy(0, self.slot_N, nll_N)
        kl_logits_EV = self.model.logits(hidden_MD.index_select(0, self.kl_place_E))
        return scores.view(self.E, -1).sum(1), kl_logits_EV.log_softmax(1)


class _Adam:
    """Adam with its default betas on rows that may leave (torch.optim.Adam, elementwise)."""

    def __init__(self, like_ED: Tensor, learning_rate: float) -> None:
        self.mean_ED, self.square_ED = torch.zeros_like(like_ED), torch.zeros_like(like_ED)
        self.learning_rate = learning_rate
        self.steps = 0

    def keep(self, kept: Tensor) -> None:
        self.mean_ED, self.square_ED = self.mean_ED[kept], self.square_ED[kept]

    def step(self, delta_ED: Tensor, gradient_ED: Tensor) -> Tensor:
        self.steps += 1
        self.mean_ED = self.mean_ED.lerp(gradient_ED, 1 - 0.9)
        self.square_ED = self.square_ED * 0.999 + gradient_ED**2 * (1 - 0.999)
        scale_ED = (self.square_ED / (1 - 0.999**self.steps)).sqrt() + 1e-8
        rate = self.learning_rate / (1 - 0.9**self.steps)
        return delta_ED - rate * self.mean_ED / scale_ED


def optimise(
    model: EditableModel,
    layer: int,
    observed: SubjectStates,
    settings: ValueSettings,
    norm: float | None = None,
    start_ED: Tensor | None = None,
) -> list[Value]:
    """Minimise Equation 4 for each edit, exactly as it would be alone.

    The reference's loop: stop when the loss is below `stop_below` (before stepping) or at the last
    evaluation (without stepping); after a step, rescale a delta longer than `clamp` * |v0|. The
    weight decay is `weight_decay * |delta| / |v0|^2`. Edits that are done leave the batch when
    they are enough of it, and stay as they are until then.

    `norm`: NAS's a, see WritingSettings. `start_ED`: v0, if it is another vector than the MLP's
    output, to which the delta is added all the same.
    """
    wide = torch.promote_types(model.dtype, torch.float32)
    output_ED = observed.output_ERD[:, 0].to(wide)
    start_ED = output_ED if start_ED is None else start_ED.to(wide)
    E, device = len(start_ED), model.device
    problem, length_E = _Problem(model, layer, observed), start_ED.norm(dim=1)
    members, member_E = list(range(E)), torch.arange(E, device=device)
    active, active_E1 = [True] * E, torch.ones(E, 1, dtype=torch.bool, device=device)
    delta_ED, adam = torch.zeros_like(start_ED), _Adam(start_ED, settings.learning_rate)
    final_ED = torch.zeros_like(start_ED)
    losses: list[list[float]] = [[] for _ in range(E)]
    hits_E = torch.zeros(E, dtype=torch.long, device=device)
    before_EV: Tensor | None = None
    for step in range(1, settings.steps + 1):
        delta_ED.requires_grad_()
        nll_E, log_p_EV = problem.log_probabilities(delta_ED)
        if before_EV is None:
            before_EV = log_p_EV.detach()
        # The reference passes its arguments to kl_div so that the edited distribution weighs.
        kl_E = (log_p_EV.exp() * (log_p_EV - before_EV)).sum(1)
        decay_E = settings.weight_decay * delta_ED.norm(dim=1) / length_E**2
        loss_E = nll_E + settings.kl_factor * kl_E + decay_E
        found = loss_E.tolist()  # The one time in a step that the device is waited for.
        for place in (place for place, on in enumerate(active) if on):
            losses[members[place]].append(found[place])
        going = [on and loss >= settings.stop_below for on, loss in zip(active, found, strict=True)]
        if step == settings.steps or not any(going):
            break
        (gradient_ED,) = torch.autograd.grad(loss_E.sum(), delta_ED)
        delta_ED = delta_ED.detach()
        if going.count(False) > costs.of(device).leaving * len(going):
            final_ED[member_E] = delta_ED
            # On the CPU, an index suits tensors of any device.
            kept = torch.tensor([place for place, on in enumerate(going) if on])
            observed, members = observed[kept], [members[place] for place in kept.tolist()]
            problem, going = _Problem(model, layer, observed), [True] * len(kept)
            member_E, length_E, before_EV = member_E[kept], length_E[kept], before_EV[kept]
            gradient_ED, delta_ED = gradient_ED[kept], delta_ED[kept]
            adam.keep(kept)
        if going != active:
            active, active_E1 = going, torch.tensor(going)[:, None].to(device)
        stepped_ED = adam.step(delta_ED, gradient_ED)
        excess_E1 = (stepped_ED.norm(dim=1) / (settings.clamp * length_E))[:, None]
        delta_ED = torch.where(active_E1, stepped_ED / excess_E1.clamp(min=1), delta_ED)
        hits_E[member_E] += ((excess_E1 > 1) & active_E1).squeeze(1)
    final_ED[member_E] = delta_ED.detach()
    norm_E = (output_ED + final_ED).norm(dim=1)
    skipped_E = torch.zeros_like(norm_E, dtype=torch.bool)
    if norm is not None:
        skipped_E = norm_E > 2 * norm
        scaled_ED = (output_ED + final_ED) * (norm / norm_E)[:, None] - output_ED
        final_ED = torch.where(skipped_E[:, None], 0, scaled_ED)
    numbers = hits_E.tolist(), norm_E.tolist(), skipped_E.tolist()
    return [Value(*row) for row in zip(final_ED, start_ED, losses, *numbers, strict=True)]
