"""The terms of the loss that KE and MEND are trained on, example by example.

Mitchell et al. 2022, Section 3.2; eric-mitchell/mend `EditTrainer`.

Legend: E edits, B rows, T tokens, N tokens of all rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rome.data.records import Request
from rome.editors import gradients
from rome.editors.gradients import Gradient, Row, Rows
from rome.editors.hypernetwork import Network, first_layer
from rome.edits.deltas import Edit, applied
from rome.models import EditableModel, memory


@dataclass(frozen=True)
class Example:
    """An edit to train on; what should follow from it, and what should not."""

    request: Request
    rephrased: tuple[str, ...] = ()
    """Other prompts that the target should follow."""
    local: tuple[tuple[str, str], ...] = ()
    """(prompt, what follows it), which the edit should not change."""


@dataclass(frozen=True)
class Observed:
    """An example's texts, run up to the edited layers, unedited."""

    request: Request
    edited: Row
    rephrased: Sequence[Row]
    local: Sequence[Row]

    @property
    def tokens(self) -> int:
        rows = (self.edited, *self.rephrased, *self.local)
        return sum(len(row.text.ids) for row in rows)


def observe(
    model: EditableModel, network: Network, examples: Sequence[Example], token_budget: int
) -> list[Observed]:
    """Run examples up to the edited layers."""
    asked = [
        [
            (x.request.text, x.request.target),
            *((prompt, x.request.target) for prompt in x.rephrased),
            *x.local,
        ]
        for x in examples
    ]
    texts = model.encode_targets([(*pair, " ") for pairs in asked for pair in pairs])
    rows = iter(
        memory.in_batches(
            texts,
            memory.by_length([len(text.ids) for text in texts], token_budget),
            partial(gradients.observe, model, first_layer(model, network)),
        )
    )
    return [
        Observed(
            x.request, next(rows), [next(rows) for _ in x.rephrased], [next(rows) for _ in x.local]
        )
        for x in examples
    ]


def gradients_of(
    model: EditableModel, network: Network, observed: Sequence[Observed], token_budget: int
) -> list[Gradient]:
    """The gradient of each example's request."""
    rows = [one.edited for one in observed]
    return memory.in_batches(
        rows,
        memory.by_length([len(row.text.ids) for row in rows], token_budget),
        lambda part: gradients.gradients(
            model, network.weights, _side_by_side(model, network, part)
        ),
    )


def _side_by_side(model: EditableModel, network: Network, rows: Sequence[Row]) -> Rows:
    return gradients.side_by_side(model, first_layer(model, network), rows)


def said(
    model: EditableModel, network: Network, some: Sequence[Observed], edits: Sequence[Edit]
) -> tuple[Tensor, Tensor, Tensor]:
    """The NLL of each edit's target, summed over its request and paraphrases [E]; whether it is the
    greedy answer to the request, and to how many paraphrases [E]."""

    def nll(edits: Sequence[Edit], rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        batch = _side_by_side(model, network, rows)
        with applied(model, edits):
            hidden_BTH = gradients.last_hidden(model, batch)
        return gradients.target_nll(model, hidden_BTH, batch)

    nll_E, right_E = nll(edits, [one.edited for one in some])
    rephrased_right_E = torch.zeros_like(nll_E)
    of_B = [e for e, one in enumerate(some) for _ in one.rephrased]
    if of_B:
        rows = [row for one in some for row in one.rephrased]
        nll_B, right_B = nll([edits[e] for e in of_B], rows)
        index_B = torch.tensor(of_B, device=nll_B.device)
        nll_E = nll_E.index_add(0, index_B, nll_B)
        rephrased_right_E = rephrased_right_E.index_add(0, index_B, right_B.to(nll_E))
    return nll_E, right_E.to(nll_E), rephrased_right_E.detach()


def drift(
    model: EditableModel, network: Network, some: Sequence[Observed], edits: Sequence[Edit]
) -> Tensor:
    """KL(unedited || edited), mean over the tokens of a local text, summed over those of each edit
    [E]. [kl_loc_loss]"""
    of_B = [e for e, one in enumerate(some) for _ in one.local]
    wide = torch.promote_types(model.dtype, torch.float32)
    drift_E = torch.zeros(len(some), dtype=wide, device=model.device)
    if not of_B:
        return drift_E
    rows = _side_by_side(model, network, [row for one in some for row in one.local])
    with torch.no_grad():
        before_BTH = gradients.last_hidden(model, rows)
    with applied(model, [edits[e] for e in of_B]):
        after_BTH = gradients.last_hidden(model, rows)
    mask_BT = rows.batch.mask_BT.bool()
    with torch.no_grad():
        before_NV = model.logits(before_BTH[mask_BT]).log_softmax(1)
    after_NV = model.logits(after_BTH[mask_BT]).log_softmax(1)
    kl_N = (before_NV.exp() * (before_NV - after_NV)).sum(1)
    lengths = mask_BT.sum(1).tolist()
    kl_B = torch.stack([kl.mean() for kl in kl_N.split(lengths)])
    return drift_E.index_add(0, torch.tensor(of_B, device=kl_B.device), kl_B)
