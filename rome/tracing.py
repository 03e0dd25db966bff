"""Causal tracing: which states carry a fact to the answer (Meng et al. 2022, Section 2).

A clean run, runs whose subject is noise, and corrupted runs in which the state of one token at one
layer is what it was in the clean run (`experiments/causal_trace.py` in the released code).

Legend: S noise samples, B = 1 + S rows (the clean one first), L layers, T tokens, Q tokens from the
restored one on, G restored layers that run side by side, R = G S rows, D hidden size, N tokens of a
subject.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rome.models import EditableModel, caches, memory, prompts
from rome.models.hooks import hooked
from rome.settings import configurable

Part = Literal["mlp", "attention"]
OnLayer = Callable[[int, Tensor], Tensor]
OnPart = Callable[[Part, int, Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """The states that a restored run restores, and those that it severs at the restored token.

    A severed part answers there, in every layer, as it does in the corrupted run (Figure 3, right).
    """

    restores: Literal["hidden", "mlp", "attention"]
    severs: Part | None = None


KINDS = {
    "hidden": Kind("hidden"),
    "mlp": Kind("mlp"),
    "attention": Kind("attention"),
    "mlp_severed": Kind("hidden", severs="mlp"),
    "attention_severed": Kind("hidden", severs="attention"),
}


@configurable(samples=(1, 10_000), noise=(0, 1000), window=1)
class TraceSettings:
    """Settings of causal tracing; the defaults are the paper's."""

    samples: int = 10
    """Corrupted runs of a fact."""
    noise: float = 3.0
    """Standard deviation of the noise, in standard deviations of the subjects' embeddings."""
    window: int = 10
    """Layers whose MLP or attention outputs are restored together, around the traced one."""
    seed: int = 0


@dataclass(frozen=True)
class KnownFact:
    """One entry of a file in the form of the authors' `known_1000.json`."""

    known_id: int
    subject: str
    attribute: str
    prompt: str

    def __post_init__(self) -> None:
        if not self.subject or self.subject not in self.prompt:
            raise ValueError(
                f"known_id {self.known_id}: the prompt must hold the subject {self.subject!r}, got "
                f"{self.prompt!r}"
            )

    @property
    def template(self) -> str:
        return self.prompt.replace(self.subject, "{}", 1)


@dataclass(frozen=True)
class Trace:
    """One fact traced: probabilities of the model's own next token, means over the samples."""

    tokens: list[str]
    subject: range
    """Indices of the subject's tokens."""
    answer: str
    known: bool
    """True if the answer is the first token of the attribute; if not, nothing is restored."""
    clean: float
    corrupted: float | None = None
    restored: list[list[float] | None] | None = None
    """Per token, the probability by restored layer; None for a token that was not traced."""


@torch.inference_mode()
def embedding_std(model: EditableModel, subjects: Sequence[str]) -> float:
    """Standard deviation of all numbers in the embeddings of the subjects' tokens
    (`collect_embedding_std`)."""
    encoded = model.tokenizer(list(subjects), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([i for row in encoded for i in row], device=model.device)
    return float(model.hf.get_input_embeddings()(ids).double().std())


@torch.inference_mode()
def trace(
    model: EditableModel,
    fact: KnownFact,
    kind: str,
    settings: TraceSettings,
    std: float,
    token_budget: int,
) -> Trace:
    """Restore the states of one kind at every token and layer of a fact's prompt.

    `hidden` and the parts at all tokens; severed kinds, like the paper's, at the subject's last.
    `std`: see `embedding_std`. `token_budget`: tokens of a forward pass at most, as far as one
    sample of all layers goes. The noise depends on (seed, known_id) alone.
    """
    (encoded,) = model.encode([fact.prompt])
    subject = prompts.subject_tokens(encoded, fact.template, fact.subject)
    noise_SND = _noise(model, fact, settings, len(subject)) * (settings.noise * std)
    T, L, S = len(encoded.ids), len(model.layers), settings.samples
    attribute = _attribute_start(model, fact, T)
    # Before the subject nothing is corrupted, so that nothing can be restored.
    traced = [subject[-1]] if KINDS[kind].severs else range(subject.start, T)

    def run(samples: Sequence[int]) -> list[_Sampled]:
        noise = noise_SND[samples[0] : samples[-1] + 1]
        observed = observe(model, encoded.ids, subject, noise)
        restored = [
            memory.in_batches(
                range(len(samples)),
                memory.by_length([L * (T - t)] * len(samples), token_budget),
                partial(restore, model, observed, KINDS[kind], settings.window, t),
            )
            for t in (traced if observed.answer == attribute else ())
        ]
        clean, *corrupted = observed.probability_B
        return [
            _Sampled(observed.answer, clean, one, [of_S[s] for of_S in restored])
            for s, one in enumerate(corrupted)
        ]

    sampled = memory.in_batches(range(S), memory.by_length([T] * S, token_budget), run)
    found: dict[str, Any] = {
        "tokens": [model.tokenizer.decode([i]) for i in encoded.ids],
        "subject": subject,
        "answer": model.tokenizer.decode([sampled[0].answer]),
        "known": sampled[0].answer == attribute,
        "clean": float(sampled[0].clean),
    }
    if not found["known"]:
        return Trace(**found)
    corrupted = float(torch.stack([one.corrupted for one in sampled]).mean())
    restored: list[list[float] | None] = [[corrupted] * L for _ in range(T)]
    if KINDS[kind].severs:
        restored = [None] * T
    for i, t in enumerate(traced):
        restored[t] = torch.stack([one.restored_tL[i] for one in sampled]).mean(0).tolist()
    return Trace(**found, corrupted=corrupted, restored=restored)


@dataclass(frozen=True)
class _Sampled:
    """One sample of noise: the clean answer and its probabilities, clean, corrupted, and by traced
    token and restored layer."""

    answer: int
    clean: Tensor
    corrupted: Tensor
    restored_tL: list[Tensor]


def _noise(model: EditableModel, fact: KnownFact, settings: TraceSettings, N: int) -> Tensor:
    digest = hashlib.sha256(repr((settings.seed, fact.known_id)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    D = model.hf.get_input_embeddings().weight.shape[1]
    return torch.randn(settings.samples, N, D, generator=generator).to(model.device, model.dtype)


def _attribute_start(model: EditableModel, fact: KnownFact, tokens: int) -> int | None:
    """The first token of the attribute after the prompt's; None where they merge into one."""
    (encoded,) = model.encode([prompts.with_target(fact.prompt, fact.attribute)])
    start = prompts.target_start(encoded, fact.prompt)
    return encoded.ids[start] if start == tokens else None


@dataclass
class RunStates:
    """States of the clean run and of the corrupted ones, by layer."""

    ids: list[int]
    entering: list[Tensor]
    """Hidden states [B, T, D] that enter each layer."""
    outputs: dict[Part, list[Tensor]]
    """[B, T, D]"""
    cache: list[tuple[Tensor, Tensor]]
    """Keys and values [B, heads, T, head size]."""
    answer: int
    probability_B: Tensor


def observe(model: EditableModel, ids: list[int], subject: range, noise_SND: Tensor) -> RunStates:
    """One forward pass: the clean row, and a row for each sample of noise on the subject."""
    B, L = 1 + len(noise_SND), len(model.layers)
    entering: list[Tensor] = []
    outputs: dict[Part, list[Tensor]] = {"mlp": [], "attention": []}

    def corrupt(module: nn.Module, args: Any, embedded_BTD: Tensor) -> Tensor:
        embedded_BTD = embedded_BTD.clone()
        embedded_BTD[1:, subject.start : subject.stop] += noise_SND
        return embedded_BTD

    def on_layer(layer: int, hidden_BTD: Tensor) -> Tensor:
        entering.append(hidden_BTD)
        return hidden_BTD

    def on_part(part: Part, layer: int, output_BTD: Tensor) -> Tensor:
        outputs[part].append(output_BTD)
        return output_BTD

    cache, ids_BT = caches.recording(), torch.tensor([ids] * B, device=model.device)
    embedding = model.hf.get_input_embeddings().register_forward_hook(corrupt)
    with hooked(embedding, *_handles(model, on_layer, on_part, range(L))):
        hidden_BTD = model.run(ids_BT, torch.ones_like(ids_BT), cache=cache)
    p_BV = model.logits(hidden_BTD[:, -1]).softmax(1)
    answer = int(p_BV[0].argmax())
    return RunStates(ids, entering, outputs, caches.recorded(cache), answer, p_BV[:, answer])


def restore(
    model: EditableModel,
    observed: RunStates,
    kind: Kind,
    window: int,
    t: int,
    chosen: Sequence[int],
) -> Sequence[Tensor]:
    """Probabilities of the answer [L] if token `t` is restored, of successive samples.

    One forward pass over the tokens from `t` on. Its batch grows with the layers: the rows of a
    restored layer enter where they begin to differ from the corrupted run, so that nothing is
    computed twice.
    """
    L, last = len(model.layers), len(observed.ids) - 1
    samples = slice(chosen[0], chosen[-1] + 1)
    corrupted_S = observed.probability_B[1:][samples]
    if kind.restores == "hidden":
        # The output of layer l enters l + 1; that of the last layer needs no run.
        starts = list(range(1, L))
        stops = starts
        after_S = observed.probability_B[:1].expand_as(corrupted_S) if t == last else corrupted_S
        rest_GS = after_S[None]
    else:
        starts = [max(0, layer - window // 2) for layer in range(L)]
        stops = [min(L, layer + (window + 1) // 2) for layer in range(L)]
        rest_GS = corrupted_S.new_empty(0, len(corrupted_S))
    if not starts:
        return rest_GS.unbind(1)

    def on_layer(layer: int, hidden_RQD: Tensor) -> Tensor:
        entering_BQD = observed.entering[layer][:, t:]
        rows_SQD = entering_BQD[1:][samples]
        if kind.restores == "hidden":
            rows_SQD = torch.cat(
                [entering_BQD[:1, :1].expand(len(rows_SQD), -1, -1), rows_SQD[:, 1:]], dim=1
            )
        new_RQD = rows_SQD.repeat(starts.count(layer), 1, 1)
        return new_RQD if layer == starts[0] else torch.cat([hidden_RQD, new_RQD])

    def on_part(part: Part, layer: int, output_RQD: Tensor) -> Tensor:
        output_GSQD = output_RQD.unflatten(0, (-1, len(corrupted_S)))  # Changed in place.
        theirs_BD = observed.outputs[part][layer][:, t]
        if kind.severs == part:
            output_GSQD[:, :, 0] = theirs_BD[1:][samples]
        if kind.restores == part:
            inside = slice(bisect_right(stops, layer), bisect_right(starts, layer))
            output_GSQD[inside, :, 0] = theirs_BD[0]
        return output_RQD

    hidden_RQD = _run(model, observed, starts[0], t, samples, on_layer, on_part)
    p_RV = model.logits(hidden_RQD[:, -1]).softmax(1)
    restored_GS = p_RV[:, observed.answer].unflatten(0, (-1, len(corrupted_S)))
    return torch.cat([restored_GS, rest_GS]).unbind(1)


def _run(
    model: EditableModel,
    observed: RunStates,
    start: int,
    t: int,
    samples: slice,
    on_layer: OnLayer,
    on_part: OnPart,
) -> Tensor:
    """The last hidden states [R, Q, D] of the layers from `start` on, the tokens from `t` on.

    The model is called with one row: positions and masks, which all rows share, are made for it,
    and the rows themselves enter through `on_layer`.
    """
    ids_1Q = torch.tensor([observed.ids[t:]], device=model.device)
    # The same prefix for every restored layer.
    prefix = [(k[1:][samples, :, :t], v[1:][samples, :, :t]) for k, v in observed.cache]
    cache = caches.with_prefix(prefix, t)
    mask_1T = torch.ones(1, len(observed.ids), dtype=torch.long, device=model.device)
    positions_1Q = torch.arange(t, len(observed.ids), device=model.device)[None]
    base = model.only_layers(start, observed.entering[start][:1, t:] if start else None)
    layers = range(start, len(model.layers))
    with hooked(*_handles(model, on_layer, on_part, layers)):
        return model.run(ids_1Q, mask_1T, positions_1Q, cache, base)


def _handles(
    model: EditableModel, on_layer: OnLayer, on_part: OnPart, layers: range
) -> list[RemovableHandle]:
    """Hooks on layers: `on_layer(layer, hidden)` replaces their input, and
    `on_part(part, layer, output)` the output of their MLPs and attentions."""

    def before(layer: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (on_layer(layer, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": on_layer(layer, kwargs["hidden_states"])}

    def after(part: Part, layer: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return on_part(part, layer, output)

    handles: list[RemovableHandle] = []
    for n in layers:
        parts: dict[Part, nn.Module] = {
            "mlp": model.down_projection(n),
            "attention": model.layers[n].get_submodule(model.family.attention_output),
        }
        hook = model.layers[n].register_forward_pre_hook(partial(before, n), with_kwargs=True)
        handles.append(hook)
        handles += [m.register_forward_hook(partial(after, p, n)) for p, m in parts.items()]
    return handles
