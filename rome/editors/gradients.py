"""The gradient of a target's NLL with respect to MLP weights, as the factors it consists of.

A weight's gradient is sum_t delta_t x_t^T: its input x_t and the gradient delta_t of its output, at
each token. Only the layers that hold such weights, and those after them, are run backwards.

Legend: E edits, B rows, T tokens, N tokens that are predicted, or of one edit, H hidden size,
V vocabulary, D output size of a weight, K input size of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rome.models import EditableModel, prompts
from rome.models.hooks import hooked
from rome.models.prompts import Text


def mlp_weights(model: EditableModel, layers: int) -> list[str]:
    """Names of the MLP's in and out weights of the last so many layers.

    Raises ValueError where the model has fewer layers.
    """
    if not 1 <= layers <= len(model.layers):
        raise ValueError(
            f"{model.name}: layers must be from 1 to {len(model.layers)}, got {layers}"
        )
    family = model.family
    return [
        f"{model.module_name(layer, module)}.weight"
        for layer in range(len(model.layers) - layers, len(model.layers))
        for module in (family.up_projection, family.down_projection)
    ]


def module_of(model: EditableModel, weight: str) -> nn.Module:
    """The module that owns a weight."""
    return model.hf.get_submodule(weight.removesuffix(".weight"))


@dataclass(frozen=True)
class Row:
    """A text, run without gradients up to the first layer that holds an edited weight.

    Its last token is predicted but never read.
    """

    text: Text
    entering_TH: Tensor | None
    """The hidden states that enter that layer; None for the embeddings."""


@dataclass(frozen=True)
class Rows:
    """Rows side by side, padded."""

    texts: Sequence[Text]
    first_layer: int
    batch: prompts.Batch
    entering_BTH: Tensor | None
    label_ids_BT: Tensor
    """The token after each."""
    label_weights_BT: Tensor
    """1 / (target tokens) where the next token is the target's, else 0."""


@torch.no_grad()
def observe(model: EditableModel, first_layer: int, texts: Sequence[Text]) -> list[Row]:
    """Run texts up to `first_layer`, in one pass."""
    if first_layer == 0:
        return [Row(text, None) for text in texts]
    batch = prompts.pad([text.ids[:-1] for text in texts], model.device)
    entering_BTH = entering(model, first_layer, batch)
    assert entering_BTH is not None
    return [
        Row(text, entering_TH[: len(text.ids) - 1])
        for text, entering_TH in zip(texts, entering_BTH, strict=True)
    ]


def side_by_side(model: EditableModel, first_layer: int, rows: Sequence[Row]) -> Rows:
    """Rows of one layer as a batch."""
    texts = [row.text for row in rows]
    batch = prompts.pad([text.ids[:-1] for text in texts], model.device)
    label_ids_BT = torch.zeros_like(batch.ids_BT)
    wide = torch.promote_types(model.dtype, torch.float32)
    label_weights_BT = torch.zeros(label_ids_BT.shape, dtype=wide, device=model.device)
    for b, text in enumerate(texts):
        last = len(text.ids) - 1
        label_ids_BT[b, :last] = torch.tensor(text.ids[1:])
        label_weights_BT[b, text.start - 1 : last] = 1 / (len(text.ids) - text.start)
    states = [row.entering_TH for row in rows if row.entering_TH is not None]
    entering_BTH = nn.utils.rnn.pad_sequence(states, batch_first=True) if states else None
    return Rows(texts, first_layer, batch, entering_BTH, label_ids_BT, label_weights_BT)


def entering(model: EditableModel, layer: int, batch: prompts.Batch) -> Tensor | None:
    """The hidden states [B, T, H] that enter a layer; None for the embeddings."""
    if layer == 0:
        return None
    seen: list[Tensor] = []
    with hooked(model.on_leaving(layer - 1, seen.append)):
        model.run(batch.ids_BT, batch.mask_BT, batch.positions_BT, base=model.up_to(layer - 1))
    return seen[0]


def last_hidden(model: EditableModel, rows: Rows) -> Tensor:
    """The last hidden states [B, T, H]: what is left of the pass, with whatever is hooked in."""
    batch, base = rows.batch, model.only_layers(rows.first_layer, rows.entering_BTH)
    return model.run(batch.ids_BT, batch.mask_BT, batch.positions_BT, base=base)


def target_nll(model: EditableModel, hidden_BTH: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Mean NLL of each row's target [B], and whether its every token is the likeliest one [B]."""
    b_N, t_N = rows.label_weights_BT.nonzero(as_tuple=True)
    logits_NV = model.logits(hidden_BTH[b_N, t_N])
    labels_N = rows.label_ids_BT[b_N, t_N]
    nll_N = nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
    B = len(hidden_BTH)
    nll_B = nll_N.new_zeros(B).index_add(0, b_N, nll_N * rows.label_weights_BT[b_N, t_N])
    wrong_B = torch.zeros(B, dtype=torch.long, device=b_N.device)
    wrong_B = wrong_B.index_add(0, b_N, (logits_NV.argmax(1) != labels_N).long())
    return nll_B, wrong_B == 0


@dataclass(frozen=True)
class Factors:
    """One weight's gradient for one edit: the sum over tokens of delta_t x_t^T.

    Of the tokens that the target depends on through the weight, padding not among them.
    """

    x_NK: Tensor
    delta_ND: Tensor


@dataclass(frozen=True)
class Gradient:
    """The input of hypernetworks: an edit's text, its loss, and its gradient by weight."""

    text: Text
    loss: Tensor
    factors: Mapping[str, Factors]


def at_tokens(
    model: EditableModel, weights: Sequence[str], rows: Rows
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The loss of every row [B], each as if it were alone; and by weight, at every token, padding
    included, its input x [B, T, K] and the loss's gradient by its output [B, T, D]."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y_ETD: Tensor) -> Tensor:
            nothing_ETD = torch.zeros_like(y_ETD, requires_grad=True)
            seen[name] = args[0].detach(), nothing_ETD
            return y_ETD + nothing_ETD

        return hook

    handles = [module_of(model, name).register_forward_hook(watch(name)) for name in weights]
    with torch.enable_grad(), hooked(*handles):
        loss_E, _ = target_nll(model, last_hidden(model, rows), rows)
        deltas = torch.autograd.grad(loss_E.sum(), [seen[name][1] for name in weights])
    found = {
        name: (seen[name][0].to(loss_E), delta_ETD.to(loss_E))
        for name, delta_ETD in zip(weights, deltas, strict=True)
    }
    return loss_E.detach(), found


def gradients(model: EditableModel, weights: Sequence[str], rows: Rows) -> list[Gradient]:
    """The factors of d NLL / d W of every row, each of them as if it were alone."""
    loss_E, factors_of = at_tokens(model, weights, rows)
    found: list[dict[str, Factors]] = [{} for _ in rows.texts]
    for name, (x_ETK, delta_ETD) in factors_of.items():
        mask_ET = (x_ETK != 0).any(2) & (delta_ETD != 0).any(2)
        counts = mask_ET.sum(1).tolist()
        parts = zip(x_ETK[mask_ET].split(counts), delta_ETD[mask_ET].split(counts), strict=True)
        for factors, (x_NK, delta_ND) in zip(found, parts, strict=True):
            factors[name] = Factors(x_NK, delta_ND)
    return [Gradient(*one) for one in zip(rows.texts, loss_E, found, strict=True)]
