"""ROME's values: the v* of many edits optimised side by side (Meng et al. 2022, Equation 4).

What no delta can change was computed once (`contexts.observe`). Each step runs the edited layer and
those after it, on the subject's last token and those after it, and nothing else.

Legend: E edits, C contexts, R = C + 1 rows of an edit (the last one is the KL prompt), B = E R,
P prefix columns, S suffix columns (the subject's last token is column 0), N tokens of a target,
D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rome.editors.contexts import Observed
from rome.models import EditableModel, caches
from rome.models.hooks import hooked
from rome.settings import configurable


@configurable(steps=1, learning_rate=0, weight_decay=0, kl_factor=0, clamp=0)
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


@dataclass(frozen=True)
class Value:
    """The outcome for one edit: v* = initial + delta, and how it was reached."""

    delta_D: Tensor
    initial_D: Tensor
    losses: list[float]
    clamp_hits: int


def _tail(model: EditableModel, layer: int, observed: Observed, delta_ED: Tensor) -> Tensor:
    """The last hidden states [B, S, D] with a delta added to the MLP output at column 0."""
    R = observed.ids_ERS.shape[1]
    P = observed.mask_ERT.shape[2] - observed.ids_ERS.shape[2]
    delta_B1D = delta_ED.repeat_interleave(R, dim=0).unsqueeze(1)

    def add_delta(module: Any, args: Any, output_BSD: Tensor) -> Tensor:
        first_B1D = output_BSD[:, :1] + delta_B1D.to(output_BSD.device)
        first_B1D = first_B1D.to(output_BSD.dtype)
        return torch.cat([first_B1D, output_BSD[:, 1:]], dim=1)

    prefix = [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in observed.prefix]
    cache = caches.with_prefix([*[None] * layer, *prefix], P)
    entering = observed.entering_ERSD
    base = model.only_layers(layer, None if entering is None else entering.flatten(0, 1))
    ids_BS, mask_BT, positions_BS = (
        x.flatten(0, 1) for x in (observed.ids_ERS, observed.mask_ERT, observed.positions_ERS)
    )
    with hooked(model.down_projection(layer).register_forward_hook(add_delta)):
        return model.run(ids_BS, mask_BT, positions_BS, cache, base)


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
        head_VD = model.hf.get_output_embeddings().weight
        ctx.save_for_backward((gradient_NV.to(head_VD) @ head_VD).to(hidden_ND.device))
        return nll_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        scaled_ND = gradient_ND * gradients[0][:, None]
        return scaled_ND.to(gradient_ND.dtype), None, None


def _log_probabilities(
    model: EditableModel, layer: int, observed: Observed, delta_ED: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted NLL of the targets [E], and the KL prompt's log-probabilities [E, V]."""
    hidden_BSD = _tail(model, layer, observed, delta_ED)
    hidden_ERSD = hidden_BSD.unflatten(0, observed.ids_ERS.shape[:2])
    E, C, N = observed.label_ids_ECN.shape
    D = hidden_ERSD.shape[-1]
    columns_ECND = observed.label_columns_ECN[..., None].expand(E, C, N, D)
    label_ECND = hidden_ERSD[:, :C].gather(2, columns_ECND)
    # Padding of shorter targets is left out, not weighed with 0.
    scored_ECN = observed.label_weights_ECN > 0
    nll_ECN = torch.zeros_like(observed.label_weights_ECN)
    nll_ECN[scored_ECN] = _LabelNLL.apply(
        label_ECND[scored_ECN], model, observed.label_ids_ECN[scored_ECN]
    )
    kl_logits_EV = model.logits(hidden_ERSD[:, C, 0])
    return (nll_ECN * observed.label_weights_ECN).sum((1, 2)), kl_logits_EV.log_softmax(1)


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
    model: EditableModel, layer: int, observed: Observed, settings: ValueSettings
) -> list[Value]:
    """Minimise Equation 4 for each edit, exactly as it would be alone.

    The reference's loop: stop when the loss is below `stop_below` (before stepping) or at the last
    evaluation (without stepping); after a step, rescale a delta longer than `clamp` * |v0|. The
    weight decay is `weight_decay * |delta| / |v0|^2`. Finished edits leave the batch.
    """
    start_ED = observed.output_ERD[:, 0].to(torch.promote_types(model.dtype, torch.float32))
    E = len(start_ED)
    running_E, length_E = torch.arange(E, device=model.device), start_ED.norm(dim=1)
    delta_ED, adam = torch.zeros_like(start_ED), _Adam(start_ED, settings.learning_rate)
    final_ED = torch.zeros_like(start_ED)
    losses: list[list[float]] = [[] for _ in range(E)]
    hits_E = torch.zeros(E, dtype=torch.long, device=model.device)
    before_EV: Tensor | None = None
    for step in range(1, settings.steps + 1):
        delta_ED.requires_grad_()
        nll_E, log_p_EV = _log_probabilities(model, layer, observed, delta_ED)
        if before_EV is None:
            before_EV = log_p_EV.detach()
        # The reference passes its arguments to kl_div so that the edited distribution weighs.
        kl_E = (log_p_EV.exp() * (log_p_EV - before_EV)).sum(1)
        decay_E = settings.weight_decay * delta_ED.norm(dim=1) / length_E**2
        loss_E = nll_E + settings.kl_factor * kl_E + decay_E
        for e, loss in zip(running_E.tolist(), loss_E.tolist(), strict=True):
            losses[e].append(loss)
        final_ED[running_E] = delta_ED.detach()
        # On the CPU, an index suits tensors of any device.
        kept = (loss_E >= settings.stop_below).nonzero().flatten().cpu()
        if step == settings.steps or len(kept) == 0:
            break
        (gradient_ED,) = torch.autograd.grad(loss_E.sum(), delta_ED)
        delta_ED = delta_ED.detach()
        if len(kept) < len(running_E):
            observed, running_E, length_E = observed[kept], running_E[kept], length_E[kept]
            before_EV, gradient_ED, delta_ED = before_EV[kept], gradient_ED[kept], delta_ED[kept]
            adam.keep(kept)
        delta_ED = adam.step(delta_ED, gradient_ED)
        excess_E = delta_ED.norm(dim=1) / (settings.clamp * length_E)
        delta_ED = delta_ED / excess_E.clamp(min=1)[:, None]
        hits_E[running_E] += excess_E > 1
    return [Value(*row) for row in zip(final_ED, start_ED, losses, hits_E.tolist(), strict=True)]
