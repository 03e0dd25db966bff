"""Traces in growing batches equal traces one state at a time, and say what a reader expects."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rome import tracing
from rome.analysis import effects
from rome.models import EditableModel
from rome.models.families import FAMILIES
from rome.tracing import KINDS, KnownFact
from tests.support import tiny
from tests.support.computations import FACTS, TRACING, taught

pytestmark = pytest.mark.usefixtures("one_thread")

MAIN = ("gpt2", "gptj", "llama")
ATTENTION = {"gpt2": "attn", "gptj": "attn", "gpt_neox": "attention"}


class Hooked:
    """The oracle: whole runs of one row, with outputs of modules changed by plain hooks."""

    def __init__(self, model: EditableModel, fact: KnownFact, std: float) -> None:
        self.model, self.fact = model, fact
        tokenizer = model.tokenizer
        self.ids = list(tokenizer(fact.prompt)["input_ids"])
        before = len(tokenizer(fact.prompt.split(fact.subject)[0].rstrip())["input_ids"])
        after = len(tokenizer(fact.prompt.split(fact.subject)[0] + fact.subject)["input_ids"])
        self.subject = range(before, after)
        noise_SND = tracing._noise(model, fact, TRACING, len(self.subject)) * TRACING.noise * std
        self.clean, clean_p_V = self.run(None, {})
        self.answer = int(clean_p_V.argmax())
        self.clean_p = float(clean_p_V[self.answer])
        self.noises = list(noise_SND)
        self.corrupted = [self.run(noise_ND, {}) for noise_ND in self.noises]
        self.corrupted_p = sum(float(p_V[self.answer]) for _, p_V in self.corrupted) / len(
            self.noises
        )

    def module(self, part: str, layer: int) -> nn.Module:
        block = self.model.layers[layer]
        kind = self.model.hf.config.model_type
        names = {"hidden": "", "mlp": "mlp", "attention": ATTENTION.get(kind, "self_attn")}
        return block.get_submodule(names[part])

    def run(
        self, noise_ND: Tensor | None, changes: dict[tuple[str, int], dict[int, Tensor]]
    ) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
        """Outputs [T, D] of every module, and the next token's distribution [V]."""
        seen: dict[tuple[str, int], Tensor] = {}

        def corrupt(module: nn.Module, args: object, output: Tensor) -> Tensor:
            changed = output.clone()
            if noise_ND is not None:
                changed[0, self.subject.start : self.subject.stop] += noise_ND
            return changed

        def hook_of(key: tuple[str, int]):  # type: ignore[no-untyped-def]
            def hook(module, args, output):  # type: ignore[no-untyped-def]
                changed = (output[0] if isinstance(output, tuple) else output).clone()
                for t, value_D in changes.get(key, {}).items():
                    changed[0, t] = value_D
                seen[key] = changed[0]
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            return hook

        handles = [self.model.hf.get_input_embeddings().register_forward_hook(corrupt)]
        for layer in range(len(self.model.layers)):
            for part in ("hidden", "mlp", "attention"):
                module = self.module(part, layer)
                handles.append(module.register_forward_hook(hook_of((part, layer))))
        try:
            logits_V = self.model.hf(torch.tensor([self.ids])).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        return seen, logits_V.softmax(0)

    def restored(self, kind: str, layer: int, t: int) -> float:
        """The mean probability of the answer with one state, or a window of two, restored."""
        L = len(self.model.layers)
        restores, severs = KINDS[kind].restores, KINDS[kind].severs
        layers = [layer] if restores == "hidden" else range(max(0, layer - 1), min(L, layer + 1))
        total = 0.0
        for noise_ND, (outputs, _) in zip(self.noises, self.corrupted, strict=True):
            changes: dict[tuple[str, int], dict[int, Tensor]] = {}
            changes |= {(restores, n): {t: self.clean[restores, n][t]} for n in layers}
            if severs:
                changes |= {(severs, n): {t: outputs[severs, n][t]} for n in range(L)}
            total += float(self.run(noise_ND, changes)[1][self.answer])
        return total / len(self.noises)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("family", MAIN)
def test_growing_batches_equal_one_state_at_a_time(family: str, kind: str) -> None:
    check(taught(family), kind, 1e-9)


@pytest.mark.parametrize("kind", ["hidden", "attention", "mlp_severed"])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(MAIN)))
def test_growing_batches_equal_one_state_at_a_time_in_other_families(
    family: str, kind: str
) -> None:
    check(taught(family, "float32", "bos"), kind, 1e-4)


def check(model: EditableModel, kind: str, tolerance: float) -> None:
    std, before = 0.4, model.fingerprint()
    for fact in FACTS:
        with torch.inference_mode():
            oracle = Hooked(model, fact, std)
            # Budgets of all samples at once, and of one at a time.
            found = [tracing.trace(model, fact, kind, TRACING, std, n) for n in (10_000, 1)]
        for trace in found:
            assert trace.known
            assert (trace.subject, len(trace.tokens)) == (oracle.subject, len(oracle.ids))
            assert trace.clean == pytest.approx(oracle.clean_p, rel=tolerance)
            assert trace.corrupted == pytest.approx(oracle.corrupted_p, rel=tolerance)
            assert trace.restored is not None
            for t, by_layer in enumerate(trace.restored):
                if by_layer is None:
                    assert KINDS[kind].severs
                    assert t != oracle.subject[-1]
                    continue
                with torch.inference_mode():
                    expected = [oracle.restored(kind, n, t) for n in range(len(model.layers))]
                assert by_layer == pytest.approx(expected, rel=tolerance)
    assert model.fingerprint() == before


def test_what_the_model_does_not_know_is_not_traced() -> None:
    model = taught("gpt2")
    fact = replace(FACTS[0], attribute="Ωmega")
    trace = tracing.trace(model, fact, "hidden", TRACING, 0.4, 1000)
    assert (trace.known, trace.corrupted, trace.restored) == (False, None, None)


def test_noise_is_a_matter_of_the_fact_and_the_seed() -> None:
    model = taught("gpt2")
    one, other = FACTS[:2]

    def corrupted(fact: KnownFact, seed: int = 0) -> float | None:
        settings = replace(TRACING, seed=seed)
        return tracing.trace(model, fact, "mlp_severed", settings, 0.4, 1000).corrupted

    assert corrupted(one) == corrupted(one)
    assert corrupted(one) != corrupted(one, seed=1)
    assert corrupted(one) != corrupted(replace(one, known_id=other.known_id))


def test_embedding_std_is_over_the_subjects_tokens() -> None:
    model = tiny.model("gpt2", tokenizer_kind="bos")
    table_VD = model.hf.get_input_embeddings().weight
    ids = [i for s in ("Rome", "São Tomé") for i in model.tokenizer(s)["input_ids"][1:]]
    expected = float(table_VD[ids].std())
    assert tracing.embedding_std(model, ["Rome", "São Tomé"]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("subject", "tokens", "expected"),
    [
        (range(1), 2, [["first subject", "last subject"], ["first subsequent", "last"]]),
        (
            range(1, 4),
            7,
            [
                [],
                ["first subject"],
                ["middle subject"],
                ["last subject"],
                ["first subsequent"],
                ["further"],
                ["last"],
            ],
        ),
        (range(2), 2, [["first subject"], ["last subject", "last"]]),
    ],
)
def test_roles(subject: range, tokens: int, expected: list[list[str]]) -> None:
    assert effects.roles(subject, tokens) == expected


def test_a_fact_whose_prompt_lacks_its_subject_is_refused() -> None:
    with pytest.raises(ValueError, match="known_id 7: the prompt must hold the subject 'Paris'"):
        KnownFact(7, "Paris", "France", "The capital of France is")
