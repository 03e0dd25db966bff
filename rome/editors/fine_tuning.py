"""Fine-tuning (FT), with an L-infinity constraint (FT+L), and of attention weights (AttnEdit).

Adam on the weights of one module of one layer until the target is likely after the prompt (Meng et
al. 2022, Section 3.2 and Appendix E.1; AttnEdit is Appendix I). The numbers follow the released
code (`baselines/ft`), which made the tables.

Legend: E edits, T tokens, M positions that are read, N tokens of a target, D hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rome.data.records import Request
from rome.editors.gradients import entering
from rome.edits import regularised
from rome.edits.deltas import Delta, DenseDelta, Edit, total_norm
from rome.models import EditableModel, costs, memory, prompts
from rome.models.hooks import hooked
from rome.models.prompts import Batch, Text
from rome.settings import configurable


@configurable(
    layer=0,
    steps=(1, 100_000),
    learning_rate=(1e-12, 100),
    weight_decay=(0, 100),
    norm_constraint=(1e-12, 1e6),
)
class FineTuningSettings:
    """Hyperparameters of FT; the defaults are the published ones for GPT-2 XL.

    The names in brackets are those of the reference code.
    """

    layer: int = 1
    """Counted from 0."""
    weights: Literal["mlp", "attention"] = "mlp"
    """`mlp`: the down-projection. `attention`: the projections to queries, keys and values. Both
    with their biases, which the reference's match by name takes in. [rewrite_module_tmp]"""
    steps: int = 25
    """Updates at most, each after an evaluation of the loss."""
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    """Times the edited weight, added to its gradient."""
    norm_constraint: float | None = None
    """Bound on the change of an element (L-infinity); null for none."""
    target_loss: Literal["published", "sequence"] = "published"
    """`published`: mean of -log p over the target's tokens, all read at the prompt's last position
    as in the released code, which for targets of several tokens asks for all of them at once.
    `sequence`: each token after those before it, as targets are scored."""
    stop_loss: float = 1e-2
    """An edit with a loss below it is done. The paper's text: 0.03."""
    rect: bool = False
    """RECT: keep the 40 % of an edit's change that are largest beside their weight."""


@dataclass(frozen=True)
class ConstrainedSettings(FineTuningSettings):
    """Hyperparameters of FT+L; the defaults are the published ones for GPT-2 XL."""

    layer: int = 0
    norm_constraint: float | None = 5e-4


@dataclass(frozen=True)
class AttentionSettings(FineTuningSettings):
    """Hyperparameters of AttnEdit; the defaults are the published ones for GPT-2 XL.

    Causal tracing also finds late attention decisive (layer 33 is the centre of its effect); edited
    like FT+L, it learns to repeat the prompt's answer but not the fact, which is the paper's case
    for the MLPs.
    """

    layer: int = 33
    weights: Literal["mlp", "attention"] = "attention"
    learning_rate: float = 1e-3
    norm_constraint: float | None = 1e-3


@dataclass(frozen=True)
class _Row:
    """The tokens of a request, and after which of them the target's tokens are read."""

    ids: list[int]
    target: list[int]
    columns: list[int]


@dataclass(frozen=True)
class _Observed:
    """The tensors that no step changes; everything has E as its first dimension."""

    batch: Batch
    entering_ETD: Tensor | None
    columns_EM: Tensor
    target_EN: Tensor
    weights_EN: Tensor
    """1 / tokens of the target, and 0 for padding."""

    def __getitem__(self, kept: list[int]) -> _Observed:
        entering = None if self.entering_ETD is None else self.entering_ETD[kept]
        rest = self.columns_EM[kept], self.target_EN[kept], self.weights_EN[kept]
        return _Observed(self.batch[torch.tensor(kept)], entering, *rest)


_Weights = Mapping[str, Tensor]


class FineTuning:
    """Edits many requests side by side, each exactly as it would be alone.

    Every edit has its own copy of the weights. Layers before the edited one run once per batch.
    `token_budget`: tokens of a forward pass at most.
    """

    def __init__(
        self, model: EditableModel, settings: FineTuningSettings, token_budget: int
    ) -> None:
        self.model, self.settings = model, settings
        self.wide = torch.promote_types(model.dtype, torch.float32)
        paths = model.family.attention
        if settings.weights == "mlp":
            paths = (model.family.down_projection,)
        names = [model.module_name(settings.layer, path) for path in paths]
        self.modules = {name: model.hf.get_submodule(name) for name in names}
        self.tokens = token_budget // costs.of(model.device).backward
        # Weights, gradients and Adam's two moments of a batch take no more memory than the model.
        tuned = sum(p.numel() for module in self.modules.values() for p in module.parameters())
        self.edits = max(1, model.hf.num_parameters() // (4 * tuned))

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        """One edit per request, all computed from the unedited model.

        Raises ValueError where a target has no token before it.
        """
        texts = self.model.encode_targets([(r.text, r.target, r.separator) for r in requests])
        rows = [_row(text, self.settings.target_loss) for text in texts]
        return memory.in_batches(
            list(zip(requests, rows, strict=True)),
            memory.by_length([len(row.ids) for row in rows], self.tokens, self.edits),
            lambda part: self._edit(*zip(*part, strict=True)),
        )

    def _edit(self, requests: Sequence[Request], rows: Sequence[_Row]) -> list[Edit]:
        original = {
            f"{name}.{kind}": parameter.detach().to(self.wide)
            for name, module in self.modules.items()
            for kind, parameter in module.named_parameters()
        }
        copies = [{name: w.clone().requires_grad_() for name, w in original.items()} for _ in rows]
        losses = self._optimise(self._observe(rows), original, copies)
        edits = []
        for request, copy, loss in zip(requests, copies, losses, strict=True):
            deltas: dict[str, Delta] = {
                name: self._delta(copy[name] - w) for name, w in original.items()
            }
            if self.settings.rect:
                deltas = regularised.rect_all(self.model, deltas)
            health = {"steps": len(loss), "loss": loss[-1], "norm": total_norm(deltas)}
            edits.append(Edit(request, deltas, health))
        return edits

    def _delta(self, change: Tensor) -> DenseDelta:
        change = change.detach()
        if change.dim() == 1:
            return DenseDelta(change[:, None])
        return DenseDelta(change.T.contiguous() if self.model.family.transposed else change)

    def _optimise(
        self, observed: _Observed, original: _Weights, copies: Sequence[_Weights]
    ) -> list[list[float]]:
        """Change each edit's copies of the weights in place; the losses of each edit.

        The reference's loop: a loss below `stop_loss` ends it before a step, and the last
        evaluation is followed by a step. Finished edits leave the batch.
        """
        settings = self.settings
        # Elementwise, and blind to weights without a gradient: those of edits that are done.
        adam = torch.optim.Adam(
            [weight for copy in copies for weight in copy.values()],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        losses: list[list[float]] = [[] for _ in copies]
        running = list(range(len(copies)))
        for _ in range(settings.steps):
            loss_E = self._losses(observed[running], [copies[e] for e in running])
            for e, loss in zip(running, loss_E.tolist(), strict=True):
                losses[e].append(loss)
            running = [e for e in running if losses[e][-1] >= settings.stop_loss]
            if not running:
                break
            tuned = [weight for e in running for weight in copies[e].values()]
            gradients = torch.autograd.grad(loss_E.sum(), tuned)
            for weight, gradient in zip(tuned, gradients, strict=True):
                weight.grad = gradient
            adam.step()
            adam.zero_grad()
            if settings.norm_constraint is not None:
                _constrain([copies[e] for e in running], original, settings.norm_constraint)
        return losses

    def _losses(self, observed: _Observed, copies: Sequence[_Weights]) -> Tensor:
        """-log p [E] of the targets, row e running with the weights `copies[e]`."""
        model, batch = self.model, observed.batch
        hooks = [
            module.register_forward_hook(
                self._hook([(c[f"{name}.weight"], c.get(f"{name}.bias")) for c in copies])
            )
            for name, module in self.modules.items()
        ]
        base = model.only_layers(self.settings.layer, observed.entering_ETD)
        with hooked(*hooks):
            hidden_ETD = model.run(batch.ids_BT, batch.mask_BT, batch.positions_BT, base=base)
        rows_E1 = torch.arange(len(copies), device=model.device)[:, None]
        log_p_EMV = model.logits(hidden_ETD[rows_E1, observed.columns_EM]).log_softmax(2)
        # With the published loss one position answers for all tokens.
        log_p_ENV = log_p_EMV.expand(-1, observed.target_EN.shape[1], -1)
        chosen_EN = log_p_ENV.gather(2, observed.target_EN[..., None]).squeeze(2)
        return -(chosen_EN * observed.weights_EN).sum(1)

    def _hook(
        self, weights: Sequence[tuple[Tensor, Tensor | None]]
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        transposed = self.model.family.transposed

        def hook(module: nn.Module, args: tuple[Tensor, ...], y_ETD: Tensor) -> Tensor:
            outputs = [
                functional.linear(x_TK.to(w.dtype), w.T if transposed else w, bias_D)
                for x_TK, (w, bias_D) in zip(args[0], weights, strict=True)
            ]
            return torch.stack(outputs).to(y_ETD.dtype)

        return hook

    @torch.no_grad()
    def _observe(self, rows: Sequence[_Row]) -> _Observed:
        """One pass of the unedited model up to the layer, and what the loss reads."""
        device = self.model.device
        batch = prompts.pad([row.ids for row in rows], device)
        columns = prompts.pad([row.columns for row in rows], device)
        target = prompts.pad([row.target for row in rows], device)
        mask_EN = target.mask_BT.to(self.wide)
        return _Observed(
            batch,
            entering(self.model, self.settings.layer, batch),
            columns.ids_BT,
            target.ids_BT,
            mask_EN / mask_EN.sum(1, keepdim=True),
        )


def _row(text: Text, target_loss: str) -> _Row:
    ids, start = text.ids, text.start
    if target_loss == "published":
        return _Row(ids[:start], ids[start:], [start - 1])
    return _Row(ids[:-1], ids[start:], list(range(start - 1, len(ids) - 1)))


@torch.no_grad()
def _constrain(copies: Sequence[_Weights], original: _Weights, limit: float) -> None:
    for name, weight in original.items():
        lowest, highest = weight - limit, weight + limit
        for copy in copies:
            copy[name].clamp_(lowest, highest)
