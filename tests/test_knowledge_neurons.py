"""Knowledge neurons in batches equal those found one at a time."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from rome.data.records import Request
from rome.editors.knowledge_neurons import KnowledgeNeurons, KnowledgeNeuronsSettings
from rome.edits.deltas import Edit, LowRankDelta, applied
from rome.models import EditableModel
from rome.models.families import FAMILIES
from tests.support import oracle_kn, tiny
from tests.support.oracle import edited
from tests.support.tiny import REQUESTS

BUDGET = 300  # All the requests do not fit into one batch.
SETTINGS = KnowledgeNeuronsSettings(steps=5)
# Of one token and of several.
TRUE = ["Rome", "French", "Italy", "東京", "Paris"]
FACTS = [replace(r, target_true=true) for r, true in zip(REQUESTS, TRUE, strict=True)]
MAIN = ("gpt2", "gptj", "llama")


def change(edit: Edit, name: str) -> Tensor:
    delta = edit.deltas[name]
    assert isinstance(delta, LowRankDelta)
    return delta.left_DR @ delta.right_KR.T


def check(model: EditableModel, settings: KnowledgeNeuronsSettings, tolerance: float) -> None:
    """Edits of 1, 3 and all requests at once equal the oracle's; the weights stay as they are."""
    expected = [oracle_kn.knowledge_neurons(model, settings, request) for request in FACTS]
    assert {len(changes) for _, changes in expected} - {1}, "some edit must touch several layers"
    before = model.fingerprint()
    editor = KnowledgeNeurons(model, settings, BUDGET)
    for size in (1, 3, len(FACTS)):
        batches = [FACTS[i : i + size] for i in range(0, len(FACTS), size)]
        edits = [edit for batch in batches for edit in editor.edit(batch)]
        for request, edit, (neurons, changes) in zip(FACTS, edits, expected, strict=True):
            assert edit.request == request
            assert edit.health["neurons"] == len(neurons)
            assert edit.deltas.keys() == {model.weight_name(layer) for layer in changes}
            norm = torch.stack([change_DK.norm() for change_DK in changes.values()]).norm()
            assert edit.health["norm"] == pytest.approx(float(norm), rel=tolerance)
            for layer, change_DK in changes.items():
                got_DK = change(edit, model.weight_name(layer))
                assert (got_DK - change_DK).norm() <= tolerance * change_DK.norm()
    assert model.fingerprint() == before


@pytest.mark.parametrize("target_tokens", ["published", "scored"])
@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("family", MAIN)
def test_batch_equals_one_neuron_at_a_time(
    family: str, kind: str, target_tokens: Literal["published", "scored"]
) -> None:
    settings = replace(SETTINGS, target_tokens=target_tokens)
    check(tiny.model(family, "float64", kind), settings, 1e-9)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(MAIN)))
def test_other_families(family: str) -> None:
    check(tiny.model(family, "float64"), SETTINGS, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", MAIN)
def test_attributions_sum_to_what_the_neurons_did(family: str) -> None:
    """The theorem that integrated gradients stand on: they add up to f(activation) - f(0)."""
    model = tiny.model(family)
    (ids,), token = [e.ids for e in model.encode(["Everyone admires Bob"])], 7
    settings = KnowledgeNeuronsSettings(steps=401)
    scores_LK = oracle_kn.attributions(model, settings, ids, [token])
    for layer, scores_K in enumerate(scores_LK):
        whole, none = (oracle_kn.probabilities(model, ids, layer, s)[0][token] for s in (1, 0))
        assert float(scores_K.sum()) == pytest.approx(
            float((whole - none).detach()), rel=0.02, abs=1e-5
        )


def test_applied_equals_rows_changed_in_place() -> None:
    model = tiny.model("gpt2")
    (edit,) = KnowledgeNeurons(model, SETTINGS, BUDGET).edit(FACTS[:1])
    _, changes = oracle_kn.knowledge_neurons(model, SETTINGS, FACTS[0])
    ids_1T = torch.tensor([model.encode([FACTS[0].text])[0].ids])
    with applied(model, [edit]):
        fast_1TV = model.hf(ids_1T).logits

    with ExitStack() as stack:
        for layer, change_DK in changes.items():
            stack.enter_context(edited(model, layer, change_DK))
        plain_1TV = model.hf(ids_1T).logits
    assert torch.allclose(fast_1TV, plain_1TV, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(fast_1TV, model.hf(ids_1T).logits, atol=1e-3)


def test_nothing_is_left_behind() -> None:
    """A, B, A gives A twice the same, to the bit."""
    editor = KnowledgeNeurons(tiny.model("llama", "float32"), SETTINGS, BUDGET)

    def edit(request: Request) -> Edit:
        return editor.edit([request])[0]

    one, _, again = edit(FACTS[0]), edit(FACTS[1]), edit(FACTS[0])
    assert one.health == again.health
    assert one.deltas.keys() == again.deltas.keys()
    assert all(torch.equal(change(one, name), change(again, name)) for name in one.deltas)


def test_a_request_without_its_true_target_is_refused() -> None:
    editor = KnowledgeNeurons(tiny.model("gpt2"), SETTINGS, BUDGET)
    with pytest.raises(ValueError, match="'Žižek was born in' has none; give its target_true"):
        editor.edit([REQUESTS[0]])
