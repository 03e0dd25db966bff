"""The engine in its plainest form: one record, one prompt, one token at a time.

Written from Section 3.1 of the ROME paper and the rules of its released code, to be read and not
to be fast: each number comes from a forward pass of the whole model over one text, weights are
edited in place, and the optimiser is torch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rome.data.records import Request
from rome.editors.rome import RomeSettings
from rome.edits.deltas import Edit, LowRankDelta, dense
from rome.models import EditableModel


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def first(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text."""
    return list(tokenizer("")["input_ids"])


def subject_last(tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str) -> int:
    """The reference's index: tokens of what precedes the subject, then tokens of the subject."""
    prefix = prompt.split("{}")[0]
    prefix, word = prefix.removesuffix(" "), f" {subject}" if prefix else subject
    before = [*first(tokenizer), *tokens(tokenizer, prefix)]
    return len(before) + len(tokens(tokenizer, word)) - 1


def prompt_and_target(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str
) -> tuple[list[int], list[int]]:
    """Tokens of the prompt (without trailing space) and of the target with a leading space."""
    ids = [*first(tokenizer), *tokens(tokenizer, prompt.rstrip(" "))]
    return ids, tokens(tokenizer, f" {target}")


def log_probabilities(model: EditableModel, ids: Sequence[int]) -> Tensor:
    """log p of the next token at each position [T, V]."""
    logits_1TV: Tensor = model.hf(torch.tensor([ids])).logits
    return logits_1TV[0].log_softmax(1)


def nll(model: EditableModel, prompt: str, target: str) -> float:
    before, target_ids = prompt_and_target(model.tokenizer, prompt, target)
    return float(_nll(log_probabilities(model, before + target_ids[:-1]), target_ids))


def _nll(log_p_TV: Tensor, target: list[int]) -> Tensor:
    last = log_p_TV[-len(target) :]
    return -last[torch.arange(len(target)), torch.tensor(target)].mean()


@dataclass
class Run:
    """What one forward pass computed at one token."""

    log_p_TV: Tensor
    key_K: Tensor
    output_D: Tensor


def run(
    model: EditableModel, layer: int, ids: list[int], at: int, delta_D: Tensor | None = None
) -> Run:
    """Run one text, with `delta_D` added to the MLP's output at token `at`."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output_1TD: Tensor) -> Tensor:
        seen.extend((args[0][0, at], output_1TD[0, at]))
        if delta_D is None:
            return output_1TD
        changed = output_1TD.clone()
        changed[0, at] += delta_D
        return changed

    handle = model.down_projection(layer).register_forward_hook(hook)
    try:
        log_p_TV = log_probabilities(model, ids)
    finally:
        handle.remove()
    return Run(log_p_TV, *seen)


@dataclass
class Outcome:
    u_K: Tensor
    lambda_D: Tensor
    target_D: Tensor
    divisor: float
    losses: list[float]
    clamp_hits: int


def rome(
    model: EditableModel,
    settings: RomeSettings,
    templates: Sequence[str],
    C_KK: Tensor | None,
    request: Request,
) -> Outcome:
    """ROME on one request: Equations 2 to 4."""
    tokenizer, layer = model.tokenizer, settings.layer
    contexts = [template.replace("{}", request.prompt) for template in templates]
    at = [subject_last(tokenizer, context, request.subject) for context in contexts]
    pairs = [
        prompt_and_target(tokenizer, context.replace("{}", request.subject), request.target)
        for context in contexts
    ]

    # k* and W k*, without the target.
    runs = [run(model, layer, before, token) for (before, _), token in zip(pairs, at, strict=True)]
    mean_K = torch.stack([r.key_K for r in runs]).mean(0)
    mean_D = torch.stack([r.output_D for r in runs]).mean(0)
    bare_K, bare_D = runs[0].key_K, runs[0].output_D
    u_K = bare_K if settings.keys == "prompt" else mean_K
    if C_KK is not None:
        u_K = torch.linalg.inv(C_KK).to(u_K) @ u_K
    u_K = u_K / u_K.norm()

    # v*
    value = settings.value
    kl_ids = [*first(tokenizer), *tokens(tokenizer, f"{request.subject} is a")]
    kl_at = subject_last(tokenizer, "{} is a", request.subject)
    delta_D = torch.zeros_like(bare_D, requires_grad=True)
    adam = torch.optim.Adam([delta_D], lr=value.learning_rate)
    losses: list[float] = []
    clamp_hits = 0
    before_V = run(model, layer, kl_ids, kl_at).log_p_TV[kl_at]
    for step in range(value.steps):
        nlls = [
            _nll(run(model, layer, before + target[:-1], token, delta_D).log_p_TV, target)
            for (before, target), token in zip(pairs, at, strict=True)
        ]
        after_V = run(model, layer, kl_ids, kl_at, delta_D).log_p_TV[kl_at]
        loss = (
            torch.stack(nlls).mean()
            + value.kl_factor * (after_V.exp() * (after_V - before_V)).sum()
            + value.weight_decay * delta_D.norm() / bare_D.norm() ** 2
        )
        losses.append(loss.item())
        if losses[-1] < value.stop_below or step == value.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            longest = value.clamp * bare_D.norm()
            if delta_D.norm() > longest:
                clamp_hits += 1
                delta_D *= longest / delta_D.norm()
    target_D = bare_D + delta_D.detach()

    # W' = W + Lambda u^T
    key_K, output_D = (mean_K, mean_D) if settings.keys == "mean" else (bare_K, bare_D)
    divisor = key_K @ u_K
    lambda_D = (target_D - output_D) / divisor
    return Outcome(u_K, lambda_D, target_D, float(divisor), losses, clamp_hits)


@contextmanager
def edited(model: EditableModel, layer: int, change_DK: Tensor) -> Iterator[None]:
    """The model with its down-projection changed in place, then as it was."""
    weight = model.down_projection(layer).weight
    assert isinstance(weight, Tensor)
    saved = weight.clone()
    weight += (change_DK.T if model.family.transposed else change_DK).to(weight)
    yield
    weight.copy_(saved)


def generate(
    model: EditableModel, ids: list[int], draws: Sequence[float], top_k: int, max_tokens: int
) -> list[int]:
    """Sample until the text has `max_tokens`: the token at position t is chosen by `draws[t]`."""
    ids = list(ids)
    while len(ids) < max_tokens:
        best = log_probabilities(model, ids)[-1].exp().topk(top_k)
        share = best.values / best.values.sum()
        draw, choice = draws[len(ids)], 0
        while choice < top_k - 1 and draw >= float(share[: choice + 1].sum()):
            choice += 1
        ids.append(int(best.indices[choice]))
    return ids


def rank_one(edit: Edit) -> LowRankDelta:
    """The only change of an edit that ROME made."""
    (delta,) = edit.deltas.values()
    assert isinstance(delta, LowRankDelta)
    return delta


def parts(edit: Edit) -> tuple[Tensor, Tensor]:
    delta = rank_one(edit)
    return delta.left_DR[:, 0], delta.right_KR[:, 0]


@contextmanager
def changed(model: EditableModel, edit: Edit) -> Iterator[None]:
    """The model with an edit of layers 0 and 1 written into its weights, then as it was."""
    with ExitStack() as stack:
        for layer in (0, 1):
            if delta := edit.deltas.get(model.weight_name(layer)):
                change_DK = dense(delta)
                stack.enter_context(edited(model, layer, change_DK))
        yield
