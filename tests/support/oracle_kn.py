"""Knowledge neurons in their plainest form: one neuron, one step, one forward pass at a time.

Written from the release that the ROME paper compared with (`get_scores_for_layer`,
`get_coarse_neurons` and `modify_weights` of EleutherAI/knowledge-neurons, GPT-2 path).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rome.data.records import Request
from rome.editors.knowledge_neurons import KnowledgeNeuronsSettings
from rome.models import EditableModel
from tests.support.oracle import first, prompt_and_target, tokens


def probabilities(
    model: EditableModel, ids: list[int], layer: int, share: float
) -> tuple[Tensor, Tensor]:
    """Next-token probabilities [V] with one layer's neurons scaled at the last token; those [K]."""
    seen: list[Tensor] = []

    def scale(neurons_1TK: Tensor) -> Tensor:
        scaled_K = (neurons_1TK[0, -1] * share).detach().requires_grad_()
        seen.append(scaled_K)
        return torch.cat([neurons_1TK[:, :-1], scaled_K[None, None]], dim=1)

    up = {"gpt2": "mlp.c_fc", "gptj": "mlp.fc_in", "gpt_neox": "mlp.dense_h_to_4h"}
    if name := up.get(model.hf.config.model_type):
        before = model.layers[layer].get_submodule(name)
        hook = before.register_forward_hook(lambda module, args, output: scale(output))
    else:
        down = model.down_projection(layer)
        hook = down.register_forward_pre_hook(lambda module, args: (scale(args[0]),))
    try:
        logits_1TV = model.hf(torch.tensor([ids])).logits
    finally:
        hook.remove()
    return logits_1TV[0, -1].softmax(0), seen[0]


def attributions(
    model: EditableModel, settings: KnowledgeNeuronsSettings, ids: list[int], target: list[int]
) -> Tensor:
    """Integrated gradients [L, K], the mean over the target's tokens."""
    rows = []
    for layer in range(len(model.layers)):
        per_token = []
        for token in target:
            total_K = torch.zeros(())
            for step in range(settings.steps):
                p_V, scaled_K = probabilities(model, ids, layer, step / (settings.steps - 1))
                total_K = total_K + torch.autograd.grad(p_V[token], scaled_K)[0]
            activation_K = scaled_K.detach()  # The last share is 1.
            per_token.append(total_K * activation_K / settings.steps)
        rows.append(torch.stack(per_token).mean(0))
    return torch.stack(rows)


def knowledge_neurons(
    model: EditableModel, settings: KnowledgeNeuronsSettings, request: Request
) -> tuple[list[tuple[int, int]], dict[int, Tensor]]:
    """The neurons (layer, index) and the change [D, K] of each layer's weight."""
    tokenizer = model.tokenizer
    assert request.target_true is not None
    targets = [request.target_true, request.target]
    ids = [*first(tokenizer), *tokens(tokenizer, request.text.rstrip(" "))]
    if settings.target_tokens == "published":
        true, new = (tokens(tokenizer, target) for target in targets)
    else:
        true, new = (prompt_and_target(tokenizer, request.text, target)[1] for target in targets)

    scores_LK = attributions(model, settings, ids, true)
    threshold = scores_LK.max() * settings.adaptive_threshold
    neurons = [(int(layer), int(k)) for layer, k in (scores_LK > threshold).nonzero()]

    embedding_VD = model.hf.get_input_embeddings().weight
    predicted = int(model.hf(torch.tensor([ids])).logits[0, -1].argmax())
    changes: dict[int, Tensor] = {}
    for layer, k in neurons:
        change_DK = changes.setdefault(
            layer, torch.zeros(embedding_VD.shape[1], scores_LK.shape[1], dtype=scores_LK.dtype)
        )
        change_DK[:, k] -= 2 * embedding_VD[predicted]
        for token in new:
            change_DK[:, k] += embedding_VD[token]
    return neurons, changes
