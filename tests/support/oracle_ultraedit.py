"""UltraEdit in its plainest form: one text at a time, autograd, all rows, explicit inverses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rome.data.records import Request
from rome.models import EditableModel
from tests.support import oracle

Rows = dict[str, list[tuple[Tensor, Tensor]]]
"""By weight: the input [K] and the gradient of the output [D] at each label position."""


def rows(model: EditableModel, names: Sequence[str], requests: Sequence[Request]) -> Rows:
    found: Rows = {name: [] for name in names}
    for request in requests:
        ids, target = oracle.prompt_and_target(model.tokenizer, request.text, request.target)
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def watch(name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> object:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output_1TD: Tensor) -> Tensor:
                inputs[name] = args[0][0]
                outputs[name] = output_1TD.clone().requires_grad_()
                return outputs[name]

            module = model.hf.get_submodule(name.removesuffix(".weight"))
            return module.register_forward_hook(hook)

        handles = [watch(name, inputs, outputs) for name in names]
        log_p_TV = oracle.log_probabilities(model, ids + target[:-1])
        at = range(len(ids) - 1, len(ids) - 1 + len(target))
        loss = -torch.stack([log_p_TV[t, token] for t, token in zip(at, target, strict=True)]).sum()
        gradients = torch.autograd.grad(loss, [outputs[name] for name in names])
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
        for name, gradient_1TD in zip(names, gradients, strict=True):
            for t in at:
                found[name].append((inputs[name][t].detach(), gradient_1TD[0, t]))
    return found


def ultraedit(batch: Rows, before: Sequence[Rows], rate: float) -> dict[str, Tensor]:
    """The change [D, K] of each weight for a batch, after others."""
    changes = {}
    for name, pairs in batch.items():
        every = [torch.cat(pair) for part in [*before, batch] for pair in part[name]]
        mean_F, deviation_F = torch.stack(every).mean(0), torch.stack(every).std(0)
        H_NK = torch.stack([x_K for x_K, _ in pairs])
        values = []
        for x_K, g_D in pairs:
            normal_F = (torch.cat([x_K, g_D]) - mean_F) / (deviation_F + 1.1920929e-07)
            h_K, v_D = normal_F.split([len(x_K), len(g_D)])
            values.append(-rate * h_K.dot(h_K) * v_D)
        V_ND = torch.stack(values)
        inverse_KK = torch.linalg.inv(H_NK.T @ H_NK + torch.eye(H_NK.shape[1], dtype=H_NK.dtype))
        changes[name] = (inverse_KK @ H_NK.T @ V_ND).T
    return changes
