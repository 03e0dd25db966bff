"""MEMIT in its plainest form: one prompt at a time, explicit matrices, weights changed in place.

Written from the release of the paper (`compute_z`, `compute_ks`, `execute_memit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from rome.data.records import Request
from rome.editors.memit import MemitSettings
from rome.models import EditableModel
from tests.support.oracle import (
    edited,
    first,
    log_probabilities,
    prompt_and_target,
    subject_last,
    tokens,
)


def run(
    model: EditableModel, layer: int, ids: list[int], at: int, delta_D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log p [T, V] and a layer's output at token `at`, with `delta_D` added to that output."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> object:
        hidden_1TD = output[0] if isinstance(output, tuple) else output
        seen.append(hidden_1TD[0, at])
        changed = hidden_1TD.clone()
        if delta_D is not None:
            changed[0, at] += delta_D
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = model.layers[layer].register_forward_hook(hook)
    try:
        return log_probabilities(model, ids), seen[0]
    finally:
        handle.remove()


def key(model: EditableModel, layer: int, ids: list[int], at: int) -> Tensor:
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0][0, at])

    handle = model.down_projection(layer).register_forward_pre_hook(hook)
    try:
        log_probabilities(model, ids)
    finally:
        handle.remove()
    return seen[0]


def bare(model: EditableModel, context: str, subject: str) -> tuple[list[int], int]:
    """Tokens of a context without a target, and the subject's last."""
    ids, _ = prompt_and_target(model.tokenizer, context.replace("{}", subject), "")
    return ids, subject_last(model.tokenizer, context, subject)


def target_state(
    model: EditableModel, settings: MemitSettings, templates: Sequence[str], request: Request
) -> tuple[Tensor, list[float], int]:
    """z [D], the losses on the way, and how often the delta was too long."""
    tokenizer, value, layer = model.tokenizer, settings.value, settings.layers[-1]
    contexts = [template.replace("{}", request.prompt) for template in templates]
    at = [subject_last(tokenizer, context, request.subject) for context in contexts]
    pairs = [
        prompt_and_target(tokenizer, context.replace("{}", request.subject), request.target)
        for context in contexts
    ]
    kl_ids = [*first(tokenizer), *tokens(tokenizer, f"{request.subject} is a")]
    kl_at = subject_last(tokenizer, "{} is a", request.subject)
    initial_D = run(model, layer, pairs[0][0], at[0])[1]
    before_V = run(model, layer, kl_ids, kl_at)[0][kl_at]
    delta_D = torch.zeros_like(initial_D, requires_grad=True)
    adam = torch.optim.Adam([delta_D], lr=value.learning_rate)
    losses: list[float] = []
    hits = 0
    for step in range(value.steps):
        nlls = []
        for (before, target), token in zip(pairs, at, strict=True):
            last_NV = run(model, layer, before + target[:-1], token, delta_D)[0][-len(target) :]
            nlls.append(-last_NV[torch.arange(len(target)), torch.tensor(target)].mean())
        after_V = run(model, layer, kl_ids, kl_at, delta_D)[0][kl_at]
        loss = (
            torch.stack(nlls).mean()
            + value.kl_factor * (after_V.exp() * (after_V - before_V)).sum()
            + value.weight_decay * delta_D.norm() / initial_D.norm() ** 2
        )
        losses.append(loss.item())
        if losses[-1] < value.stop_below or step == value.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            longest = value.clamp * initial_D.norm()
            if delta_D.norm() > longest:
                hits += 1
                delta_D *= longest / delta_D.norm()
    return initial_D + delta_D.detach(), losses, hits


def memit(
    model: EditableModel,
    settings: MemitSettings,
    templates: Sequence[str],
    C_KK: dict[int, Tensor],
    requests: Sequence[Request],
) -> dict[int, Tensor]:
    """The change [D, K] of each layer's weight that writes all the requests."""
    layers = settings.layers
    z_DE = torch.stack([target_state(model, settings, templates, r)[0] for r in requests], dim=1)
    changes: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            keys, states = [], []
            for request in requests:
                ks = [
                    key(
                        model,
                        layer,
                        *bare(model, template.replace("{}", request.prompt), request.subject),
                    )
                    for template in templates
                ]
                keys.append((ks[0] + torch.stack(ks[1:]).mean(0)) / 2)
                states.append(run(model, layers[-1], *bare(model, request.prompt, request.subject)))
            K_KE = torch.stack(keys, dim=1).double()
            R_DE = (z_DE - torch.stack([state for _, state in states], dim=1)).double()
            whole_KK = settings.second_moment_weight * C_KK[layer] + K_KE @ K_KE.T
            adjusted_KE = torch.linalg.inv(whole_KK) @ K_KE
            changes[layer] = R_DE / (len(layers) - i) @ adjusted_KE.T
            stack.enter_context(edited(model, layer, changes[layer]))
    return changes
