"""Fine-tuning in its plainest form: one request, the real weights, torch's Adam, autograd.

Written from the rules of the released code (`baselines/ft`), to be read and not to be fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rome.data.records import Request
from rome.editors.fine_tuning import FineTuningSettings
from rome.models import EditableModel
from tests.support import oracle


@dataclass
class Outcome:
    changes: dict[str, Tensor]
    """What was added to each parameter, in its own layout."""
    losses: list[float]


def fine_tune(model: EditableModel, settings: FineTuningSettings, request: Request) -> Outcome:
    """Fine-tune on one request; the weights are put back afterwards."""
    paths = [model.family.down_projection]
    if settings.weights == "attention":
        paths = list(model.family.attention)
    weights = {
        name: parameter
        for name, parameter in model.hf.named_parameters()
        if any(f".{settings.layer}.{path}." in name for path in paths)
    }
    before = {name: weight.clone() for name, weight in weights.items()}
    ids, target = oracle.prompt_and_target(model.tokenizer, request.text, request.target)
    for weight in weights.values():
        weight.requires_grad_()
    adam = torch.optim.Adam(
        weights.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    losses = []
    for _ in range(settings.steps):
        if settings.target_loss == "published":
            loss = -oracle.log_probabilities(model, ids)[-1][target].mean()
        else:
            log_p_TV = oracle.log_probabilities(model, ids + target[:-1])[-len(target) :]
            loss = -torch.stack([log_p_TV[i, token] for i, token in enumerate(target)]).mean()
        losses.append(loss.item())
        if losses[-1] < settings.stop_loss:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        if settings.norm_constraint is not None:
            with torch.no_grad():
                for name, weight in weights.items():
                    low = before[name] - settings.norm_constraint
                    high = before[name] + settings.norm_constraint
                    weight.copy_(weight.clamp(low, high))
    changes = {name: weight.detach() - before[name] for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.requires_grad_(False).copy_(before[name])
        weight.grad = None
    return Outcome(changes, losses)
