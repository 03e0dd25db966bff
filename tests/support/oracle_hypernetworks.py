"""MEND and KE in their plainest form: one edit, whole matrices, the model's weights by autograd.

Written from the papers and the published code (eric-mitchell/mend: `algs/mend.py`, `nn.py`,
`algs/efk.py`), to be read and not to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from rome.data.records import Request
from rome.editors.knowledge_editor import KnowledgeEditorNetwork
from rome.editors.mend import MendNetwork
from rome.models import EditableModel
from tests.support import oracle


def texts(model: EditableModel, request: Request) -> tuple[list[int], list[int]]:
    return oracle.prompt_and_target(model.tokenizer, request.text, request.target)


def loss(model: EditableModel, request: Request) -> Tensor:
    """Mean NLL of the target's tokens."""
    prompt, target = texts(model, request)
    log_p_TV = model.hf(torch.tensor([[*prompt, *target]])).logits[0].log_softmax(1)
    places = range(len(prompt) - 1, len(prompt) + len(target) - 1)
    return -torch.stack([log_p_TV[t, i] for t, i in zip(places, target, strict=True)]).mean()


def weight_gradients(
    model: EditableModel, request: Request, weights: Sequence[str]
) -> dict[str, Tensor]:
    """d loss / d W, as the weights are stored."""
    parameters = [model.hf.get_parameter(name).requires_grad_() for name in weights]
    try:
        found = torch.autograd.grad(loss(model, request), parameters)
    finally:
        model.hf.requires_grad_(False)
    return dict(zip(weights, found, strict=True))


def token_gradients(
    model: EditableModel, request: Request, weights: Sequence[str]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(x_t, delta_t) of every token with a gradient."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in weights:

            def hook(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                inputs[name], outputs[name] = args[0], output
                output.retain_grad()

            module = model.hf.get_submodule(name.removesuffix(".weight"))
            module.requires_grad_()
            stack.callback(module.register_forward_hook(hook).remove)
        loss(model, request).backward()
    model.hf.requires_grad_(False)
    pairs = {}
    for name in weights:
        deltas = outputs[name].grad
        assert deltas is not None
        rows = zip(inputs[name][0].detach(), deltas[0], strict=True)
        pairs[name] = [(x, delta) for x, delta in rows if x.any() and delta.any()]
    for parameter in model.hf.parameters():
        parameter.grad = None
    return pairs


def mend(model: EditableModel, network: MendNetwork, request: Request) -> dict[str, Tensor]:
    """The change [D, K] of each weight: sum over tokens of the transformed gradient."""
    changes = {}
    for i, (name, pairs) in enumerate(token_gradients(model, request, network.weights).items()):
        shape, mode = network.places[name]
        transform: Any = network.transforms[shape]
        terms = [
            torch.outer(
                _through(transform.delta_layers, _normal(transform.delta_statistics, delta), mode),
                _through(transform.x_layers, _normal(transform.x_statistics, x), mode),
            )
            for x, delta in pairs
        ]
        changes[name] = network.rates[i] * torch.stack(terms).sum(0)
    return changes


def _normal(statistics: Any, value: Tensor) -> Tensor:
    deviation = (statistics.squares_S / (statistics.count - 1)) ** 0.5
    return (value - statistics.mean_S) / (deviation + 1e-7)


def _through(layers: Any, value: Tensor, mode: int) -> Tensor:
    for layer in layers:
        inner = layer.left_SR @ (layer.right_RS @ value) + layer.bias_S
        value = value + (inner * layer.scale_MS[mode] + layer.shift_MS[mode]).clamp(min=0)
    return value


def knowledge_editor(
    model: EditableModel, network: KnowledgeEditorNetwork, request: Request
) -> dict[str, Tensor]:
    """The change of each weight as it is stored: s (a * G + b)."""
    prompt, target = texts(model, request)
    embedded = model.hf.get_input_embeddings()(torch.tensor([[*prompt, *target]]))
    _, (forward_and_back, _) = network.lstm(embedded)
    condition = torch.tanh(network.condition(forward_and_back.flatten()))
    changes = {}
    gradients = weight_gradients(model, request, network.weights)
    for conditioner, (name, gradient) in zip(network.conditioners, gradients.items(), strict=True):
        rows, columns = gradient.shape
        column_a, row_a, column_b, row_b, norm = conditioner(condition).split(
            [columns, rows, columns, rows, 1]
        )
        a = torch.outer(row_a.softmax(0), column_a)
        b = torch.outer(row_b.softmax(0), column_b)
        changes[name] = norm.sigmoid() * (gradient * a + b)
    return changes
