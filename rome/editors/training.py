"""Training of KE and MEND: edits are made, and judged by what the edited model says.

The published objective (Mitchell et al. 2022, Section 3.2; eric-mitchell/mend `EditTrainer`):
c_edit * NLL of the target on the request and a paraphrase of it, under the edit, plus
c_loc * KL(unedited || edited) at every token of a text that the edit should leave alone.

Legend: E edits, F figures of an example.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from rome.editors import objective
from rome.editors.gradients import Gradient
from rome.editors.hypernetwork import Network
from rome.editors.objective import Example, Observed
from rome.edits.deltas import Edit
from rome.models import EditableModel, memory
from rome.settings import configurable


@configurable(
    kw_only=True,
    steps=1,
    rate=(1e-12, 100),
    rate_of_rates=(0, 100),
    batch=(1, 100_000),
    c_edit=(0, 1e6),
    c_loc=(0, 1e6),
    clip=(1e-12, 1e12),
    validate_every=1,
    validation=1,
    patience=1,
)
class TrainingSettings:
    """Hyperparameters; the defaults are the published ones of MEND, where it has them."""

    steps: int
    """Of the optimiser, at most."""
    rate: float = 1e-6
    """Adam's. [lr]"""
    rate_of_rates: float = 1e-4
    """Adam's for the learnt rate of each weight. [lr_lr]"""
    batch: int = 10
    """Edits of a step. [accumulate_bs: ten batches of two, which are an edit and a local text]"""
    c_edit: float = 0.1
    c_loc: float = 1.0
    clip: float = 100.0
    """The gradient's norm at most. [grad_clip]"""
    validate_every: int = 25
    """Steps. Then a checkpoint is written."""
    validation: int = 40
    """Examples that are validated on and never trained on: the first ones."""
    patience: int = 8
    """Validations without a lower loss before training ends."""
    seed: int = 0


@dataclass(frozen=True)
class Figures:
    """The effect of edits, as means over a batch."""

    edit_loss: float
    """NLL of the targets under the edits."""
    local_loss: float
    """KL(unedited || edited) a token."""
    loss: float
    edit_accuracy: float
    """Requests whose target is the greedy answer under the edit. [edit/acc]"""
    paraphrase_accuracy: float
    """The same of the paraphrases; NaN where there is none."""


class Trainer:
    """A network, its optimiser and the step they are at.

    Which examples and prompts a step takes depends on the seed and the step alone, so that a
    training which goes on from a checkpoint is the one that was never interrupted.

    `token_budget`: tokens of the texts of a forward and backward pass at most. A step of more is
    the sum of several.
    """

    def __init__(
        self,
        model: EditableModel,
        network: Network,
        examples: Sequence[Example],
        settings: TrainingSettings,
        token_budget: int,
    ) -> None:
        if len(examples) < settings.validation + settings.batch:
            raise ValueError(
                f"there must be examples for {settings.validation} of validation and a batch of "
                f"{settings.batch}, got {len(examples)}"
            )
        self.model, self.network, self.settings = model, network, settings
        self.token_budget = token_budget
        self.step = 0
        self._drawn: tuple[int, Sequence[int]] = -1, ()
        self.examples = examples[settings.validation :]
        held_out = [_chosen(example, None) for example in examples[: settings.validation]]
        # Validated again and again on the same texts: these run through the lower layers once.
        self.validated = objective.observe(model, network, held_out, token_budget)
        rates = network.rate_parameters()
        groups: list[dict[str, Any]] = [
            {"params": [p for p in network.parameters() if not any(p is rate for rate in rates)]},
            {"params": rates, "lr": settings.rate_of_rates},
        ]
        self.adam = torch.optim.Adam([g for g in groups if g["params"]], lr=settings.rate)

    def train(self) -> Figures:
        """One step of the optimiser. Raises FloatingPointError where the gradient is not finite."""
        self.step += 1
        self.network.train()
        self.adam.zero_grad()
        observed = objective.observe(self.model, self.network, self._batch(), self.token_budget)
        figures = self._judge(observed, learn=True)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip)
        if not norm.isfinite():
            raise FloatingPointError(
                f"the gradient of step {self.step} is not finite; lower training.rate"
            )
        self.adam.step()
        return figures

    @torch.no_grad()
    def validate(self, edited: bool = True) -> Figures:
        """Means over the examples that are never trained on; or those of the unedited model."""
        self.network.eval()
        return self._judge(self.validated, edited=edited)

    def _batch(self) -> list[Example]:
        """The examples of this step: every one is taken once before any is taken again."""
        settings, chosen = self.settings, []
        for place in range((self.step - 1) * settings.batch, self.step * settings.batch):
            epoch, i = divmod(place, len(self.examples))
            example = self.examples[self._order(epoch)[i]]
            chosen.append(_chosen(example, random.Random(f"{settings.seed} {epoch} {i}")))
        return chosen

    def _order(self, epoch: int) -> Sequence[int]:
        """The examples' order in an epoch, drawn when it begins."""
        if self._drawn[0] != epoch:
            draw = random.Random(f"{self.settings.seed} {epoch}")
            self._drawn = epoch, draw.sample(range(len(self.examples)), len(self.examples))
        return self._drawn[1]

    def _judge(
        self, observed: Sequence[Observed], edited: bool = True, learn: bool = False
    ) -> Figures:
        """Edit, and see what the edited model says; if it is to `learn`, leave the gradient of the
        loss with the network's parameters.

        The loss is a mean over all rows, so that its gradient is a sum over any parts of them.
        """
        model, network, settings = self.model, self.network, self.settings
        targets = sum(1 + len(one.rephrased) for one in observed)
        locals_ = sum(len(one.local) for one in observed)
        found: list[Gradient] = []
        if edited:
            found = objective.gradients_of(model, network, observed, self.token_budget)
            found = network.normalised(found)
        parameters = list(network.parameters())

        def run(part: Sequence[int]) -> list[list[float]]:
            some = [observed[i] for i in part]
            edits = [Edit(one.request) for one in some]
            if edited:
                changes = network([found[i] for i in part])
                edits = [Edit(e.request, deltas) for e, deltas in zip(edits, changes, strict=True)]
            nll_E, right_E, rephrased_right_E = objective.said(model, network, some, edits)
            drift_E = objective.drift(model, network, some, edits)
            if learn:
                loss = settings.c_edit * nll_E.sum() / targets
                if locals_:
                    loss = loss + settings.c_loc * drift_E.sum() / locals_
                # Added when all are there: a part that memory ends in leaves nothing.
                grads = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, grad in zip(parameters, grads, strict=True):
                    if grad is not None:
                        parameter.grad = grad if parameter.grad is None else parameter.grad + grad
            figures_FE = torch.stack([nll_E.detach(), drift_E.detach(), right_E, rephrased_right_E])
            answer: list[list[float]] = figures_FE.T.tolist()
            return answer

        batches = memory.by_length([one.tokens for one in observed], self.token_budget)
        said = memory.in_batches(range(len(observed)), batches, run)
        nll, drift, right, rephrased_right = map(math.fsum, zip(*said, strict=True))
        edit_loss, local_loss = nll / targets, drift / max(locals_, 1)
        rephrased = targets - len(observed)
        return Figures(
            edit_loss,
            local_loss,
            settings.c_edit * edit_loss + settings.c_loc * local_loss,
            right / len(observed),
            rephrased_right / rephrased if rephrased else math.nan,
        )

    def serialised(self) -> bytes:
        """Network, optimiser and step as the content of a safetensors file."""
        tensors = {"step": torch.tensor(self.step)}
        tensors |= {f"network.{k}": t.contiguous() for k, t in self.network.state_dict().items()}
        for place, state in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{place}.{key}": value for key, value in state.items()}
        return to_bytes(tensors)

    def restore(self, data: bytes) -> None:
        """Go on from what `serialised` gave."""
        tensors = from_bytes(data)
        self.step = int(tensors.pop("step"))
        prefix = "network."
        self.network.load_state_dict(
            {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        )
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if not key.startswith(prefix):
                _, place, name = key.split(".")
                state.setdefault(int(place), {})[name] = tensor
        self.adam.load_state_dict({**self.adam.state_dict(), "state": state})


def _chosen(example: Example, rng: random.Random | None) -> Example:
    """With one of its paraphrases and local texts at most: the first, or one drawn."""

    def one(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return values[:1] if rng is None or not values else (rng.choice(values),)

    return Example(example.request, one(example.rephrased), one(example.local))
