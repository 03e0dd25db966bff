"""Knowledge neurons: the few activations that carry a fact, and their output vectors moved towards
another object (Dai et al. 2022, Sections 3.1 and 4.2).

Follows the release that the ROME paper compared with (EleutherAI/knowledge-neurons as patched in
`baselines/kn`, GPT-2 path), with what it does otherwise than the method's paper:

- Every token of the true target is attributed at the last position of the bare prompt, and their
  attributions are averaged; the code's retokenisation after each token is never reached.
- The change subtracts twice the embedding of the token that the model predicts, not that of the
  true target, and adds the embedding of each token of the new target once, a single one too.
- There is one prompt, so that neurons are coarse: sharing percentage and refining have no effect.
- The targets are tokenised without a space before them (`target_tokens`).
- What is scaled is the output of the up-projection, before the nonlinearity, and not the neurons
  themselves. A gated MLP, which the release does not know, has no such single thing: there it is
  the neurons, the input of the down-projection.

Legend: E edits, L layers, S steps, B = E S rows, P prefix columns, N tokens of a target, K neurons
of a layer, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rome.data.records import RecordError, Request
from rome.edits.deltas import Edit, LowRankDelta, total_norm
from rome.models import EditableModel, caches, costs, memory, prompts
from rome.models.hooks import hooked
from rome.settings import configurable


@configurable(steps=(1, 10_000), adaptive_threshold=(0, 1))
class KnowledgeNeuronsSettings:
    """Hyperparameters; the defaults are those of the ROME paper's baseline (`hparams/KN`)."""

    steps: int = 20
    """Points of the integral, from 0 to the activation, both among them."""
    adaptive_threshold: float = 0.2
    """Neurons above this share of the highest attribution are edited."""
    target_tokens: Literal["published", "scored"] = "published"
    """`published` tokenises targets alone, which makes other tokens of them than follow a prompt;
    `scored` takes those that do."""


@dataclass(frozen=True)
class _Fact:
    """The tokens of a request."""

    prompt: list[int]
    true: list[int]
    new: list[int]


@dataclass
class _Observed:
    """Activations of the unedited model at the last token of each prompt."""

    batch: prompts.Batch
    """The last tokens share the last column."""
    activation_LEK: Tensor
    entering_LED: Tensor
    prefix: list[tuple[Tensor, Tensor]]
    """Keys and values [E, heads, P, head size] of each layer."""
    predicted_E: Tensor


class KnowledgeNeurons:
    """Edits many requests in one batch, each exactly as it would be alone.

    `token_budget`: tokens of a forward pass at most, the cached ones among them.
    """

    def __init__(
        self, model: EditableModel, settings: KnowledgeNeuronsSettings, token_budget: int
    ) -> None:
        self.model, self.settings, self.token_budget = model, settings, token_budget

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        """One edit per request, all computed from the unedited model.

        Raises ValueError for a request without `target_true`, whose neurons are to be found.
        """
        facts = [self._fact(request) for request in requests]
        budget = self.token_budget // costs.of(self.model.device).backward
        lengths = [self.settings.steps * len(fact.prompt) for fact in facts]
        return memory.in_batches(
            list(zip(requests, facts, strict=True)),
            memory.by_length(lengths, budget),
            lambda part: self._edit(*zip(*part, strict=True)),
        )

    def _fact(self, request: Request) -> _Fact:
        if request.target_true is None:
            raise RecordError(
                "knowledge neurons are those of the true target, and the request "
                f"'{request.text}' has none; give its target_true"
            )
        (prompt,) = self.model.encode([request.text.rstrip(" ")])
        true, new = (self._target(request, t) for t in (request.target_true, request.target))
        return _Fact(prompt.ids, true, new)

    def _target(self, request: Request, target: str) -> list[int]:
        if self.settings.target_tokens == "published":
            return list(self.model.tokenizer(target, add_special_tokens=False)["input_ids"])
        (whole,) = self.model.encode([prompts.with_target(request.text, target, request.separator)])
        return whole.ids[prompts.target_start(whole, request.text) :]

    def _edit(self, requests: Sequence[Request], facts: Sequence[_Fact]) -> list[Edit]:
        model = self.model
        seen = self._observe(facts)
        layers = range(len(model.layers))
        scores_LEK = torch.stack([self._attribution(seen, layer, facts) for layer in layers])
        threshold_E = scores_LEK.amax((0, 2)) * self.settings.adaptive_threshold
        found_LEK = scores_LEK > threshold_E[:, None]
        embedding_VD = model.hf.get_input_embeddings().weight
        edits = []
        for e, (request, fact) in enumerate(zip(requests, facts, strict=True)):
            new_ND, old_D = embedding_VD[fact.new], embedding_VD[seen.predicted_E[e]]
            # One change for all neurons of a layer, and so of rank one.
            change_D1 = (new_ND.to(scores_LEK).sum(0) - 2 * old_D)[:, None]
            deltas = {
                model.weight_name(layer): LowRankDelta(
                    change_D1, found_LEK[layer, e, :, None].to(change_D1)
                )
                for layer in layers
                if found_LEK[layer, e].any()
            }
            health = {"neurons": int(found_LEK[:, e].sum()), "norm": total_norm(deltas)}
            edits.append(Edit(request, deltas, health))
        return edits

    @torch.no_grad()
    def _observe(self, facts: Sequence[_Fact]) -> _Observed:
        """One forward pass of the unedited model over the prompts."""
        model, last = self.model, [len(fact.prompt) - 1 for fact in facts]
        batch = prompts.pad([fact.prompt for fact in facts], model.device, last)
        entering: list[Tensor] = []
        activation: list[Tensor] = []

        def on_layer(hidden_ETD: Tensor) -> None:
            entering.append(hidden_ETD[:, -1].to(model.device))

        def on_neurons(neurons_ETK: Tensor) -> None:
            activation.append(neurons_ETK[:, -1].to(model.device))

        cache, layers = caches.recording(), range(len(model.layers))
        hooks = [model.on_entering(layer, on_layer) for layer in layers]
        with hooked(*hooks, *(self._hook(layer, on_neurons) for layer in layers)):
            hidden_ETD = model.run(batch.ids_BT, batch.mask_BT, batch.positions_BT, cache)
        return _Observed(
            batch,
            torch.stack(activation),
            torch.stack(entering),
            [(keys[..., :-1, :], values[..., :-1, :]) for keys, values in caches.recorded(cache)],
            model.logits(hidden_ETD[:, -1]).argmax(1),
        )

    def _hook(self, layer: int, on_neurons: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """See a layer's scaled activations [..., K], or put others in their place."""
        model, family = self.model, self.model.family
        if family.gated:
            return model.down_projection(layer).register_forward_pre_hook(
                lambda module, args: on_neurons(args[0])
            )
        up = model.hf.get_submodule(model.module_name(layer, family.up_projection))
        return up.register_forward_hook(lambda module, args, output: on_neurons(output))

    def _attribution(self, seen: _Observed, layer: int, facts: Sequence[_Fact]) -> Tensor:
        """Integrated gradients [E, K] of the true target's probability at one layer's neurons.

        Equation 2 of Dai et al., summed as the release does: the mean of the gradients at evenly
        spaced shares of the activation, times the activation.
        """
        model, S = self.model, self.settings.steps
        wide = torch.promote_types(model.dtype, torch.float32)
        activation_EK = seen.activation_LEK[layer].to(wide)
        share_S = torch.linspace(0, 1, S, dtype=wide, device=model.device)
        scaled_BK = (activation_EK[:, None] * share_S[:, None]).flatten(0, 1).requires_grad_()

        def rows(x_E: Tensor) -> Tensor:
            return x_E.repeat_interleave(S, dim=0)

        prefix = [(rows(keys), rows(values)) for keys, values in seen.prefix]
        cache = caches.with_prefix(prefix, seen.batch.ids_BT.shape[1] - 1)
        base = model.only_layers(
            layer, rows(seen.entering_LED[layer])[:, None] if layer > 0 else None
        )
        with hooked(self._hook(layer, lambda neurons_B1K: scaled_BK[:, None].to(neurons_B1K))):
            hidden_B1D = model.run(
                rows(seen.batch.ids_BT[:, -1:]),
                rows(seen.batch.mask_BT),
                rows(seen.batch.positions_BT[:, -1:]),
                cache,
                base,
            )
        probabilities_ESV = model.logits(hidden_B1D[:, 0]).softmax(1).unflatten(0, (-1, S))
        wanted = [probabilities_ESV[e][:, fact.true].mean(1).sum() for e, fact in enumerate(facts)]
        (gradient_BK,) = torch.autograd.grad(torch.stack(wanted).sum(), scaled_BK)
        return activation_EK * gradient_BK.unflatten(0, (-1, S)).mean(1)
