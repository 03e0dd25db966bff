"""MEMIT and AlphaEdit in their plainest form: one prompt at a time, explicit matrices, weights
changed in place.

Written from the rules of MEMIT's release (`compute_z`, `compute_ks`, `execute_memit`) and from
AlphaEdit's formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType

import torch
from torch import Tensor, nn

from rome.data.records import Request
from rome.editors.alphaedit import AlphaEditSettings
from rome.editors.memit import MemitSettings
from rome.editors.spreading import SpreadingSettings
from rome.models import EditableModel
from tests.support.oracle import (
    edited,
    first,
    log_probabilities,
    prompt_and_target,
    subject_last,
    tokens,
)
from tests.support.oracle import run as oracle_run


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
    model: EditableModel, settings: SpreadingSettings, templates: Sequence[str], request: Request
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


def with_norm(
    model: EditableModel, layer: int, request: Request, z_D: Tensor, norm: float
) -> tuple[Tensor, float]:
    """NAS: z whose part that the MLP makes, v*, has the norm, or is left alone above twice it; and
    the norm of v* before."""
    ids, at = bare(model, request.prompt, request.subject)
    state_D, mlp_D = run(model, layer, ids, at)[1], oracle_run(model, layer, ids, at).output_D
    value_D = mlp_D + z_D - state_D
    found = float(value_D.norm())
    if found > 2 * norm:
        return state_D, found
    return state_D - mlp_D + value_D * norm / found, found


def keys(
    model: EditableModel,
    settings: SpreadingSettings,
    templates: Sequence[str],
    layer: int,
    requests: Sequence[Request],
) -> Tensor:
    """The key of each request at a layer [K, E]."""
    found = []
    for request in requests:
        ks = [
            key(model, layer, *bare(model, template.replace("{}", request.prompt), request.subject))
            for template in templates
        ]
        flat = settings.keys == "mean"
        found.append(torch.stack(ks).mean(0) if flat else (ks[0] + torch.stack(ks[1:]).mean(0)) / 2)
    return torch.stack(found, dim=1).double()


def spread(
    model: EditableModel,
    settings: SpreadingSettings,
    templates: Sequence[str],
    requests: Sequence[Request],
    solve: Callable[[int, Tensor], Tensor],
) -> dict[int, Tensor]:
    """The change [D, K] of each layer's weight that writes all the requests: R times what `solve`
    makes of a layer's keys, transposed."""
    layers, last = settings.layers, settings.layers[-1]
    z = [target_state(model, settings, templates, r)[0] for r in requests]
    if settings.nas:
        assert settings.nas_norm is not None
        pairs = zip(requests, z, strict=True)
        z = [with_norm(model, last, r, z_D, settings.nas_norm)[0] for r, z_D in pairs]
    z_DE = torch.stack(z, dim=1)
    changes: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            states = [run(model, last, *bare(model, r.prompt, r.subject))[1] for r in requests]
            R_DE = (z_DE - torch.stack(states, dim=1)).double() / (len(layers) - i)
            K_KE = keys(model, settings, templates, layer, requests)
            changes[layer] = R_DE @ solve(layer, K_KE).T
            stack.enter_context(edited(model, layer, changes[layer]))
    return changes


def memit(
    model: EditableModel,
    settings: MemitSettings,
    templates: Sequence[str],
    C_KK: dict[int, Tensor],
    requests: Sequence[Request],
    H_KK: Mapping[int, Tensor] = MappingProxyType({}),
) -> dict[int, Tensor]:
    """The change [D, K] of each layer's weight that writes all the requests, given the sum of
    k k^T over what was written before."""

    def solve(layer: int, K_KE: Tensor) -> Tensor:
        whole_KK = settings.second_moment_weight * C_KK[layer] + K_KE @ K_KE.T
        return torch.linalg.inv(whole_KK + H_KK.get(layer, 0)) @ K_KE

    return spread(model, settings, templates, requests, solve)


def alphaedit(
    model: EditableModel,
    settings: AlphaEditSettings,
    templates: Sequence[str],
    C_KK: dict[int, Tensor],
    requests: Sequence[Request],
    H_KK: Mapping[int, Tensor] = MappingProxyType({}),
) -> dict[int, Tensor]:
    """The same by AlphaEdit in the form of its code: a K x K system that is not symmetric."""

    def solve(layer: int, K_KE: Tensor) -> Tensor:
        P_KK = projection(C_KK[layer], settings)
        return alphaedit_solved(P_KK, K_KE, H_KK.get(layer, torch.zeros(())), settings.l2)

    return spread(model, settings, templates, requests, solve)


def projection(C_KK: Tensor, settings: AlphaEditSettings) -> Tensor:
    """P [K, K] onto the singular vectors of C with small singular values."""
    U_KK, S_K, _ = torch.linalg.svd(C_KK)
    limit = settings.threshold * (S_K.median() if settings.relative else 1)
    U0_KR = U_KK[:, limit > S_K]
    return U0_KR @ U0_KR.T


def alphaedit_solved(P_KK: Tensor, K_KE: Tensor, H_KK: Tensor, l2: float) -> Tensor:
    """[P (K K^T + H) + L2 I]^-1 P K by LU."""
    whole_KK = P_KK @ (K_KE @ K_KE.T + H_KK) + l2 * torch.eye(len(P_KK), dtype=P_KK.dtype)
    return torch.linalg.solve(whole_KK, P_KK @ K_KE)
