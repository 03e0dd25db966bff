"""LoRA: fine-tuning of low-rank factors beside weights (Hu et al. 2022), trained on a batch of
facts through `peft` and merged into a change of the weights: a baseline of newer evaluations.

W' = W + alpha / r B A, Section 4.1, Equation 3; the loss is the mean over requests of the mean of
-log p over the target's tokens, each after those before it.

Legend: B rows, K input size, D output size, R rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rome.data.records import Request
from rome.editors import gradients
from rome.edits.deltas import Delta, Edit, LowRankDelta, total_norm
from rome.models import EditableModel, costs, memory
from rome.models.prompts import Text
from rome.settings import configurable


@configurable(
    rank=(1, 10_000),
    alpha=(1e-12, 1e6),
    steps=(1, 100_000),
    learning_rate=(1e-12, 100),
    seed=0,
)
class LoraSettings:
    """Hyperparameters; the defaults are those that EasyEdit publishes for GPT-2 XL, but that its
    ranks do not adapt (AdaLoRA) and nothing drops out, which keeps an edit reproducible."""

    modules: tuple[str, ...] = ("c_attn",)
    """Last parts of the names of the modules that get factors, in every layer."""
    rank: int = 8
    alpha: float = 32
    steps: int = 30
    """Steps of Adam, each on all requests."""
    learning_rate: float = 5e-3
    seed: int = 0
    """Of the first A, together with the requests; the first B is 0."""


class Lora:
    """Trains factors on the requests of a batch together; alone, each is a batch of one.

    `token_budget`: tokens of a forward pass at most. Raises ValueError for a module that the model
    has not, and ImportError without `peft`.
    """

    def __init__(self, model: EditableModel, settings: LoraSettings, token_budget: int) -> None:
        self.model, self.settings = model, settings
        self.tokens = token_budget // costs.of(model.device).backward
        leaves = {
            name.rpartition(".")[2]
            for name, module in model.base.named_modules()
            if getattr(module, "weight", None) is not None and module.weight.dim() == 2
        }
        if unknown := sorted(set(settings.modules) - leaves) or not settings.modules:
            raise ValueError(
                f"modules must be one or more of {', '.join(sorted(leaves))} in {model.name}, "
                f"got {unknown if settings.modules else 'none'}"
            )
        _peft()

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        """One edit per request, all computed from the unedited model."""
        return [self.edit_together([request]) for request in requests]

    def edit_together(self, requests: Sequence[Request]) -> Edit:
        """One edit for all requests; it carries the last of them."""
        texts = self.model.encode_targets([(r.text, r.target, r.separator) for r in requests])
        with self._adapters(requests) as adapters, torch.enable_grad():
            losses = self._train(texts, adapters)
            deltas: dict[str, Delta] = {
                f"{name}.weight": self._delta(adapter) for name, adapter in adapters.items()
            }
        health = {"steps": len(losses), "loss": losses[-1], "norm": total_norm(deltas)}
        return Edit(requests[-1], deltas, health)

    def _train(self, texts: Sequence[Text], adapters: dict[str, Any]) -> list[float]:
        tuned = [p for adapter in adapters.values() for p in _factors(adapter)]
        adam = torch.optim.Adam(tuned, lr=self.settings.learning_rate)
        lengths = [len(text.ids) for text in texts]

        def backward(part: Sequence[Text]) -> list[float]:
            observed = gradients.observe(self.model, 0, part)
            rows = gradients.side_by_side(self.model, 0, observed)
            nll_B, _ = gradients.target_nll(
                self.model, gradients.last_hidden(self.model, rows), rows
            )
            found = torch.autograd.grad(nll_B.sum() / len(texts), tuned)
            for parameter, gradient in zip(tuned, found, strict=True):
                assert parameter.grad is not None
                parameter.grad += gradient
            return nll_B.tolist()

        losses = []
        for _ in range(self.settings.steps):
            for parameter in tuned:
                parameter.grad = torch.zeros_like(parameter)
            batches = memory.by_length(lengths, self.tokens)
            nlls = memory.in_batches(texts, batches, backward)
            losses.append(sum(nlls) / len(nlls))
            adam.step()
        return losses

    def _delta(self, adapter: Any) -> LowRankDelta:
        right_RK, left_DR = (factor.detach() for factor in _factors(adapter))
        return LowRankDelta(left_DR * (self.settings.alpha / self.settings.rank), right_RK.T)

    @contextmanager
    def _adapters(self, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
        """The model with adapters in it, by the name of their module, until the block ends."""
        hf, settings = self.model.hf, self.settings
        config = _peft().LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(settings.modules),
            fan_in_fan_out=self.model.family.transposed,
        )
        own = {
            name: module
            for name, module in hf.named_modules()
            if name.rpartition(".")[2] in settings.modules
        }
        wide = torch.promote_types(self.model.dtype, torch.float32)
        try:
            _peft().inject_adapter_in_model(config, hf)
            adapters: dict[str, Any] = {name: hf.get_submodule(name) for name in own}
            generator = torch.Generator().manual_seed(_seed(settings.seed, requests))
            for adapter in adapters.values():
                adapter.lora_A.to(wide), adapter.lora_B.to(wide)
                first_RK, _ = _factors(adapter)
                # As peft has it, but the same on every device: uniform within 1 / sqrt(K).
                drawn_RK = torch.rand(first_RK.shape, generator=generator, dtype=torch.float64)
                with torch.no_grad():
                    first_RK.copy_((2 * drawn_RK - 1) / first_RK.shape[1] ** 0.5)
            yield adapters
        finally:
            for name, module in own.items():
                hf.set_submodule(name, module)
            hf.__dict__.pop("peft_config", None)


def _factors(adapter: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A [R, K] and B [D, R]."""
    return adapter.lora_A["default"].weight, adapter.lora_B["default"].weight


def _seed(seed: int, requests: Sequence[Request]) -> int:
    digest = hashlib.sha256(repr((seed, [(r.text, r.target) for r in requests])).encode())
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def _peft() -> Any:
    # Not needed by anything else, and slow to import.
    try:
        import peft
    except ImportError as error:
        raise ImportError("the editor lora needs peft: pip install 'rome-bench[lora]'") from error
    return peft
