"""One record in the way of the paper's released code: its passes, batches and padding, for timing.

It computes what `oracle` computes and what the engine computes. `oracle` is there to be read; this
is there to cost what the reference costs: 20 passes of the whole model forward and backward over 22
texts, every prompt once for each target, and all of it again for the unedited model.

Legend: B rows, T tokens, K key size, D hidden size, V vocabulary, k candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rome.data.records import Record, Request
from rome.editors.rome import RomeSettings
from rome.models import EditableModel, prompts
from rome.scoring import generation
from rome.scoring.settings import GenerationSettings
from tests.support import oracle


@dataclass(frozen=True)
class Contexts:
    """The tokens of a request in each template, and of the KL prompt."""

    before: list[list[int]]
    """Without the target."""
    target: list[int]
    at: list[int]
    """Index of the subject's last token in each row of `before`."""
    kl: list[int]
    kl_at: int

    @property
    def rows(self) -> list[list[int]]:
        """The 22 rows that v* is optimised on, as the model reads them."""
        return [*(row + self.target[:-1] for row in self.before), self.kl]


def contexts(model: EditableModel, templates: Sequence[str], request: Request) -> Contexts:
    tokenizer, subject = model.tokenizer, request.subject
    filled = [template.replace("{}", request.prompt) for template in templates]
    pairs = [
        oracle.prompt_and_target(tokenizer, text.replace("{}", subject), request.target)
        for text in filled
    ]
    return Contexts(
        before=[before for before, _ in pairs],
        target=pairs[0][1],
        at=[oracle.subject_last(tokenizer, text, subject) for text in filled],
        kl=[*oracle.first(tokenizer), *oracle.tokens(tokenizer, f"{subject} is a")],
        kl_at=oracle.subject_last(tokenizer, "{} is a", subject),
    )


def _logits(model: EditableModel, rows: Sequence[Sequence[int]]) -> Tensor:
    batch = prompts.pad(rows, model.device)
    logits_BTV: Tensor = model.hf(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits
    return logits_BTV


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def observe(
    model: EditableModel, layer: int, rows: Sequence[list[int]], at: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Key and output of the down-projection at one token of each row: [B, K] and [B, D]."""
    seen: list[Tensor] = []
    places = torch.arange(len(rows)), torch.tensor(at)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output_BTD: Tensor) -> None:
        seen.extend((args[0][places], output_BTD[places]))

    with _hooked(model.down_projection(layer), hook):
        _logits(model, rows)
    return seen[0], seen[1]


def direction(model: EditableModel, layer: int, chosen: Contexts, inverse_KK: Tensor) -> Tensor:
    """C^-1 k* of unit norm [K] (its `compute_u`)."""
    keys_BK, _ = observe(model, layer, chosen.before, chosen.at)
    u_K = inverse_KK @ keys_BK.mean(0)
    return u_K / u_K.norm()


def value(
    model: EditableModel, settings: RomeSettings, chosen: Contexts, u_K: Tensor
) -> oracle.Outcome:
    """v* and the update for the direction `u_K` (its `compute_v`)."""
    value, rows = settings.value, chosen.rows
    B, N = len(rows) - 1, len(chosen.target)
    places = torch.arange(B + 1), torch.tensor([*chosen.at, chosen.kl_at])
    lengths_B1 = torch.tensor([[len(row)] for row in rows[:B]])
    labels = torch.arange(B)[:, None], lengths_B1 - N + torch.arange(N), torch.tensor(chosen.target)
    weight = model.down_projection(settings.layer).weight
    assert isinstance(weight, Tensor)
    size = weight.shape[1 if model.family.transposed else 0]
    delta_D = torch.zeros(size, device=model.device, requires_grad=True)
    initial: list[Tensor] = []

    def add(module: nn.Module, args: tuple[Tensor, ...], output_BTD: Tensor) -> Tensor:
        if not initial:
            initial.append(output_BTD[0, chosen.at[0]].detach().clone())
        output_BTD[places] += delta_D
        return output_BTD

    adam = torch.optim.Adam([delta_D], lr=value.learning_rate)
    losses: list[float] = []
    clamp_hits = 0
    before_V: Tensor | None = None
    for step in range(value.steps):
        with _hooked(model.down_projection(settings.layer), add):
            logits_BTV = _logits(model, rows)
        kl_V = logits_BTV[B, chosen.kl_at].log_softmax(0)
        before_V = kl_V.detach() if before_V is None else before_V
        nll = -logits_BTV[:B].log_softmax(2)[labels].mean()
        kl = (kl_V.exp() * (kl_V - before_V)).sum()
        length = initial[0].norm()
        decay = value.weight_decay * delta_D.norm() / length**2
        loss = nll + value.kl_factor * kl + decay
        losses.append(loss.item())
        if losses[-1] < value.stop_below or step == value.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            if delta_D.norm() > value.clamp * length:
                clamp_hits += 1
                delta_D *= value.clamp * length / delta_D.norm()

    key_BK, output_BD = observe(model, settings.layer, chosen.before[:1], chosen.at[:1])
    target_D = initial[0] + delta_D.detach()
    divisor = key_BK[0] @ u_K
    lambda_D = (target_D - output_BD[0]) / divisor
    return oracle.Outcome(u_K, lambda_D, target_D, float(divisor), losses, clamp_hits)


def scored_prompts(record: Record) -> list[str]:
    return [
        record.request.text,
        *record.paraphrase_prompts,
        *record.neighborhood_prompts,
        *record.attribute_prompts,
    ]


@torch.no_grad()
def probabilities(model: EditableModel, record: Record) -> list[float]:
    """-log p of (target_new, target_true) in turn after each prompt of the record, in one batch of
    all prompts times both targets (its `test_batch_prediction`)."""
    pairs = [
        oracle.prompt_and_target(model.tokenizer, text, target)
        for text in scored_prompts(record)
        for target in (record.target_new, str(record.target_true))
    ]
    logits_BTV = _logits(model, [before + target for before, target in pairs])
    result = []
    for row_TV, (before, target) in zip(logits_BTV, pairs, strict=True):
        log_p = [
            row_TV[len(before) - 1 + i].log_softmax(0)[token].item()
            for i, token in enumerate(target)
        ]
        result.append(-sum(log_p) / len(log_p))
    return result


@torch.no_grad()
def generate(model: EditableModel, record: Record, settings: GenerationSettings) -> list[list[int]]:
    """Texts of the record's generation prompts in one batch with a cache (its `generate_fast`).

    Column by column from the end of the shortest prompt on: a longer one reads its own tokens. The
    draws are the engine's, so that texts can be compared.
    """
    rows = [
        [*oracle.first(model.tokenizer), *oracle.tokens(model.tokenizer, text)]
        for text in record.generation_prompts
    ]
    draws_BT = torch.stack(
        [generation._draws(settings, (record.case_id, i)) for i in range(len(rows))]
    ).to(model.device)
    ids_BT = prompts.pad(rows, model.device).ids_BT
    room = max(settings.max_tokens - ids_BT.shape[1], 0)
    ids_BT = torch.cat([ids_BT, ids_BT.new_zeros(len(rows), room)], dim=1)
    start, stop, cache = 0, min(map(len, rows)), None
    while stop < settings.max_tokens:
        out: Any = model.hf(
            input_ids=ids_BT[:, start:stop],
            attention_mask=torch.ones_like(ids_BT[:, :stop]),
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        best_Bk = out.logits[:, -1].softmax(1).topk(settings.top_k, dim=1)
        edges_Bk = (best_Bk.values / best_Bk.values.sum(1, keepdim=True)).double().cumsum(1)
        choice_B1 = (draws_BT[:, stop : stop + 1] >= edges_Bk[:, :-1]).sum(1, keepdim=True)
        new_B1 = best_Bk.indices.gather(1, choice_B1)
        for b, row in enumerate(rows):
            if len(row) <= stop:
                ids_BT[b, stop] = new_B1[b, 0]
        start, stop = stop, stop + 1
    return [ids_BT[b, : max(settings.max_tokens, len(row))].tolist() for b, row in enumerate(rows)]
