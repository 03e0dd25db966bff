"""Training of KE and MEND: edits are made, and judged by what the edited model says.

The published objective (Mitchell et al. 2022, Section 3.2; eric-mitchell/mend `EditTrainer`):
c_edit * NLL of the target on the request and a paraphrase of it, under the edit, plus
c_loc * KL(unedited || edited) at every token of a text that the edit should leave alone.

Legend: E edits, B rows, T tokens, N tokens of all rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from rome.data.records import Request
from rome.editors import gradients
from rome.editors.gradients import Rows
from rome.editors.hypernetwork import Network, first_layer
from rome.edits.deltas import Edit, applied
from rome.models import EditableModel
from rome.settings import configurable


@dataclass(frozen=True)
class Example:
    """An edit to train on; what should follow from it, and what should not."""

    request: Request
    rephrased: tuple[str, ...] = ()
    """Other prompts that the target should follow."""
    local: tuple[tuple[str, str], ...] = ()
    """(prompt, what follows it), which the edit should not change."""


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


@dataclass(frozen=True)
class _Observed:
    """A batch of examples as rows, run up to the edited layers, unedited."""

    requests: list[Request]
    edited: Rows
    rephrased: Rows | None
    rephrased_of: list[int]
    """The edit of each row."""
    local: Rows | None
    local_of: list[int]


class Trainer:
    """A network, its optimiser and the step they are at.

    Which examples and prompts a step takes depends on the seed and the step alone, so that a
    training which goes on from a checkpoint is the one that was never interrupted.
    """

    def __init__(
        self,
        model: EditableModel,
        network: Network,
        examples: Sequence[Example],
        settings: TrainingSettings,
    ) -> None:
        if len(examples) < settings.validation + settings.batch:
            raise ValueError(
                f"there must be examples for {settings.validation} of validation and a batch of "
                f"{settings.batch}, got {len(examples)}"
            )
        self.model, self.network, self.settings = model, network, settings
        self.step = 0
        self._drawn: tuple[int, Sequence[int]] = -1, ()
        self.examples = examples[settings.validation :]
        held_out = [_chosen(example, None) for example in examples[: settings.validation]]
        # Validated again and again on the same texts: these run through the lower layers once.
        self.validated = [
            self._observe(held_out[i : i + settings.batch])
            for i in range(0, len(held_out), settings.batch)
        ]
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
        observed = self._observe(self._batch())
        figures, loss = self._judge(observed)
        self.adam.zero_grad()
        loss.backward()
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
        all_figures = [self._judge(observed, edited)[0] for observed in self.validated]
        weights = [len(observed.requests) for observed in self.validated]
        total = sum(weights)
        return Figures(
            *(
                sum(w * getattr(one, f.name) for w, one in zip(weights, all_figures, strict=True))
                / total
                for f in fields(Figures)
            )
        )

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

    def _observe(self, examples: Sequence[Example]) -> _Observed:
        requests = [example.request for example in examples]
        rephrased = [
            (e, (prompt, x.request.target))
            for e, x in enumerate(examples)
            for prompt in x.rephrased
        ]
        local = [(e, pair) for e, x in enumerate(examples) for pair in x.local]
        edited = self._rows([(request.text, request.target) for request in requests])
        assert edited is not None
        return _Observed(
            requests,
            edited,
            self._rows([pair for _, pair in rephrased]),
            [e for e, _ in rephrased],
            self._rows([pair for _, pair in local]),
            [e for e, _ in local],
        )

    def _rows(self, pairs: list[tuple[str, str]]) -> Rows | None:
        if not pairs:
            return None
        start = first_layer(self.model, self.network)
        return gradients.observe(
            self.model, start, self.model.encode_targets([(*pair, " ") for pair in pairs])
        )

    def _judge(self, observed: _Observed, edited: bool = True) -> tuple[Figures, Tensor]:
        """Edit, and see what the edited model says: figures, and the loss to be minimised."""
        model, settings = self.model, self.settings
        edits = [Edit(request) for request in observed.requests]
        if edited:
            found = gradients.gradients(model, self.network.weights, observed.edited)
            changes = self.network(found)
            edits = [Edit(e.request, deltas) for e, deltas in zip(edits, changes, strict=True)]
        nll_B, right_B = self._edited_nll(edits, observed.edited)
        accuracy, paraphrase_accuracy = float(right_B.double().mean()), float("nan")
        if observed.rephrased is not None:
            others = [edits[e] for e in observed.rephrased_of]
            other_nll_B, other_right_B = self._edited_nll(others, observed.rephrased)
            paraphrase_accuracy = float(other_right_B.double().mean())
            nll_B = torch.cat([nll_B, other_nll_B])
        edit_loss = nll_B.mean()
        local_loss = torch.zeros_like(edit_loss)
        if observed.local is not None:
            local_loss = self._drift([edits[e] for e in observed.local_of], observed.local)
        loss = settings.c_edit * edit_loss + settings.c_loc * local_loss
        figures = Figures(
            edit_loss.item(), local_loss.item(), loss.item(), accuracy, paraphrase_accuracy
        )
        return figures, loss

    def _edited_nll(self, edits: list[Edit], rows: Rows) -> tuple[Tensor, Tensor]:
        with applied(self.model, edits):
            hidden_BTH = gradients.last_hidden(self.model, rows)
        return gradients.target_nll(self.model, hidden_BTH, rows)

    def _drift(self, edits: list[Edit], rows: Rows) -> Tensor:
        """KL(unedited || edited), mean over the tokens of a row, then over rows. [kl_loc_loss]"""
        with torch.no_grad():
            before_BTH = gradients.last_hidden(self.model, rows)
        with applied(self.model, edits):
            after_BTH = gradients.last_hidden(self.model, rows)
        mask_BT = rows.batch.mask_BT.bool()
        with torch.no_grad():
            before_NV = self.model.logits(before_BTH[mask_BT]).log_softmax(1)
        after_NV = self.model.logits(after_BTH[mask_BT]).log_softmax(1)
        kl_N = (before_NV.exp() * (before_NV - after_NV)).sum(1)
        lengths_B = mask_BT.sum(1)
        weights_BT = mask_BT / (lengths_B[:, None] * len(lengths_B))
        return (kl_N * weights_BT[mask_BT]).sum()

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
