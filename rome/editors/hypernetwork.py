"""Editors that were trained: a network turns the gradient of an edit into the edit.

Legend: E edits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from rome.data.records import Request
from rome.editors import gradients
from rome.editors.knowledge_editor import KnowledgeEditorNetwork, KnowledgeEditorSettings
from rome.editors.mend import MendNetwork, MendSettings
from rome.edits.deltas import Edit, total_norm
from rome.json_text import JsonError, parsed
from rome.models import EditableModel, memory
from rome.models.prompts import Text
from rome.settings import configurable

Network = MendNetwork | KnowledgeEditorNetwork

NETWORKS: dict[str, tuple[type, type]] = {
    "ke": (KnowledgeEditorSettings, KnowledgeEditorNetwork),
    "mend": (MendSettings, MendNetwork),
}


@configurable()
class HypernetworkSettings:
    """Settings of a trained editor; everything else is in the file that its training wrote."""

    weights: str
    """Name of a training, such as `mend-smollm2-counterfact`, or a .safetensors file."""


class HypernetworkEditor:
    """Edits many requests in one batch, each exactly as it would be alone.

    `token_budget`: tokens of a forward pass at most, padding included.
    """

    def __init__(self, model: EditableModel, network: Network, token_budget: int) -> None:
        self.model, self.network, self.token_budget = model, network.eval(), token_budget

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        """One edit per request, all computed from the unedited model."""
        texts = self.model.encode_targets([(r.text, r.target, r.separator) for r in requests])
        return memory.in_batches(
            list(zip(requests, texts, strict=True)),
            memory.by_length([len(text.ids) for text in texts], self.token_budget),
            lambda part: make_edits(self.model, self.network, *zip(*part, strict=True)),
        )


@torch.no_grad()
def make_edits(
    model: EditableModel, network: Network, requests: Sequence[Request], texts: Sequence[Text]
) -> list[Edit]:
    """One edit per request, in one batch; `texts` are theirs."""
    start = first_layer(model, network)
    rows = gradients.side_by_side(model, start, gradients.observe(model, start, texts))
    found = network.normalised(gradients.gradients(model, network.weights, rows))
    losses = torch.stack([gradient.loss for gradient in found]).tolist()
    return [
        Edit(request, deltas, {"loss": loss, "norm": total_norm(deltas)})
        for request, loss, deltas in zip(requests, losses, network(found), strict=True)
    ]


def first_layer(model: EditableModel, network: Network) -> int:
    """The first layer that holds a weight which the network edits."""
    return len(model.layers) - len(network.weights) // 2  # Two a layer, of the last layers.


def build(model: EditableModel, kind: str, layers: int, settings: Any, seed: int) -> Network:
    """An untrained network for the MLPs of the model's last `layers` layers.

    Raises ValueError where the model has fewer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: Network = NETWORKS[kind][1](model, gradients.mlp_weights(model, layers), settings)
    return network.to(model.device, torch.promote_types(model.dtype, torch.float32))


@dataclass(frozen=True)
class NetworkOrigin:
    """The origin of trained weights.

    model_fingerprint: of the model's weights rounded to bfloat16, so that what was trained in
    float32 also serves the same model in bfloat16.
    """

    training: str
    kind: str
    layers: int
    settings: dict[str, Any]
    model: str
    model_fingerprint: str
    step: int


def serialised(network: Network, origin: NetworkOrigin) -> bytes:
    """A trained network as the content of a safetensors file."""
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    return to_bytes(tensors, {"origin": json.dumps(asdict(origin))})


def origin_for(file: Path, model: EditableModel, kind: str) -> NetworkOrigin:
    """Read the origin of a file that a training wrote.

    Raises ValueError where it is damaged, of another kind or of another model.
    """
    from rome import options  # Needs pydantic, and is needed for files alone.

    try:
        with safe_open(file, "pt") as opened:
            written = parsed((opened.metadata() or {})["origin"])
            origin: NetworkOrigin = options.validate(NetworkOrigin, written, "origin: ")
    except (SafetensorError, KeyError, JsonError, options.ConfigError) as error:
        raise ValueError(
            f"{file} is damaged or no trained network ({error!r}); restore it, or train it again"
        ) from None
    if origin.kind != kind:
        raise ValueError(f"{file} must be a trained {kind}, but is a {origin.kind}")
    if origin.model_fingerprint != model.origin:
        raise ValueError(
            f"{file} must have been trained for {model.name} with these weights, but was for "
            f"{origin.model} with others; train one for this model"
        )
    return origin


def load(file: Path, model: EditableModel, kind: str) -> Network:
    """The network of a file that a training wrote. Raises ValueError as `origin_for` does."""
    origin = origin_for(file, model, kind)
    tensors = load_file(file)
    settings = NETWORKS[kind][0](**origin.settings)
    network = build(model, kind, origin.layers, settings, seed=0)
    network.load_state_dict(tensors)
    return network
