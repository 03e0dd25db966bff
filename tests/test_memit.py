"""MEMIT in batches equals MEMIT one prompt at a time: single facts, and many in one model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rome.editors import JointEditor, contexts
from rome.editors.memit import Memit, MemitSettings
from rome.editors.values import ValueSettings
from rome.edits.deltas import Edit, LowRankDelta
from rome.models import EditableModel
from rome.models.families import FAMILIES, UnsupportedModelError
from tests.support import oracle, oracle_memit, tiny
from tests.support.computations import BUDGET, ENDING, MEMIT, memit, moments
from tests.support.tiny import ADAM_ROUNDING, REQUESTS, TEMPLATES

MAIN = ("gpt2", "gptj", "llama")
CLAMPED = MemitSettings(
    layers=(0, 1),
    second_moment_weight=2,
    value=ValueSettings(steps=4, kl_factor=0.5, clamp=0.2, stop_below=0),
)


def change(edit: Edit, name: str) -> Tensor:
    delta = edit.deltas[name]
    assert isinstance(delta, LowRankDelta)
    return delta.left_DR @ delta.right_KR.T


def check_changes(
    model: EditableModel, edit: Edit, changes: dict[int, Tensor], tolerance: float
) -> None:
    assert edit.deltas.keys() == {model.weight_name(layer) for layer in changes}
    for layer, change_DK in changes.items():
        got_DK = change(edit, model.weight_name(layer))
        assert (got_DK - change_DK).norm() <= tolerance * change_DK.norm()
    norm = torch.stack([change_DK.norm() for change_DK in changes.values()]).norm()
    assert edit.health["norm"] == pytest.approx(float(norm), rel=tolerance)


def check(model: EditableModel, settings: MemitSettings, tolerance: float) -> None:
    """Edits of 1, 3 and all requests at once equal the oracle's, and so does the edit of all."""
    requests = ENDING if settings is MEMIT else REQUESTS
    C_KK = {layer: moment.mean() for layer, moment in moments().items()}
    alone = [
        (
            oracle_memit.memit(model, settings, TEMPLATES, C_KK, [request]),
            oracle_memit.target_state(model, settings, TEMPLATES, request),
        )
        for request in requests
    ]
    if settings is CLAMPED and model.hf.config.model_type != "gemma":  # Its states are too long.
        assert any(hits > 0 for _, (_, _, hits) in alone)
    together = oracle_memit.memit(model, settings, TEMPLATES, C_KK, requests)

    before = model.fingerprint()
    editor = memit(model, settings)
    assert isinstance(editor, JointEditor)
    for size in (1, 3, len(requests)):
        batches = [requests[i : i + size] for i in range(0, len(requests), size)]
        edits = [edit for batch in batches for edit in editor.edit(batch)]
        for request, edit, (changes, (_, losses, hits)) in zip(requests, edits, alone, strict=True):
            assert edit.request == request
            assert edit.health["loss"] == pytest.approx(losses[-1], rel=tolerance)
            assert edit.health["steps"] == len(losses)
            assert edit.health["clamp_hits"] == hits
            check_changes(model, edit, changes, tolerance)
    one = editor.edit_together(requests)
    assert one.request == requests[-1]
    check_changes(model, one, together, tolerance)
    assert model.fingerprint() == before


SETTINGS = pytest.mark.parametrize("settings", [CLAMPED, MEMIT], ids=["clamped", "free"])


@SETTINGS
@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("family", MAIN)
def test_batches_equal_one_prompt_at_a_time(
    family: str, kind: str, settings: MemitSettings
) -> None:
    check(tiny.model(family, "float64", kind), settings, ADAM_ROUNDING)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {*MAIN, "olmo2"}))
def test_other_families(family: str) -> None:
    check(tiny.model(family, "float64"), CLAMPED, 1e-4)


@pytest.mark.parametrize("family", MAIN)
def test_written_facts_have_the_states_asked_for(family: str) -> None:
    """With hardly any weight on the second moment, W' k = z holds for all facts at once."""
    settings = replace(MEMIT, layers=(1,), second_moment_weight=1e-9)
    model = tiny.model(family)
    editor = Memit(model, settings, ["{}"], {1: moments()[1].solver()}, BUDGET)
    change_DK = change(editor.edit_together(REQUESTS), model.weight_name(1))
    states = [oracle_memit.target_state(model, settings, ["{}"], r)[0] for r in REQUESTS]
    with oracle.edited(model, 1, change_DK):
        for request, state_D in zip(REQUESTS, states, strict=True):
            ids, at = oracle_memit.bare(model, request.prompt, request.subject)
            got_D = oracle_memit.run(model, 1, ids, at)[1]
            assert (got_D - state_D).norm() <= 1e-5 * state_D.norm()


def test_nothing_is_left_behind() -> None:
    """A, B, A gives A twice the same, to the bit; one after another or in one model."""
    model = tiny.model("llama", "float32")
    editor = memit(model, CLAMPED)
    before = model.fingerprint()
    one, _, again = (editor.edit([REQUESTS[i]])[0] for i in (0, 1, 0))
    many, _, more = (editor.edit_together(REQUESTS[i : i + 3]) for i in (0, 1, 0))
    for a, b in ((one, again), (many, more)):
        assert a.health == b.health
        assert all(torch.equal(change(a, name), change(b, name)) for name in a.deltas)
    assert model.fingerprint() == before


def test_templates_beside_the_bare_prompt_are_the_last() -> None:
    model = tiny.model("gpt2")
    solvers = {layer: moment.solver() for layer, moment in moments().items()}
    two = replace(CLAMPED, sampled_contexts=2)
    more = Memit(model, two, ["{}", "Never used. {}", *TEMPLATES[1:]], solvers, BUDGET)
    (edit,), (same,) = (m.edit(REQUESTS[:1]) for m in (more, memit(model, CLAMPED)))
    assert edit.health == same.health


def test_models_and_layers_that_it_cannot_edit_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="olmo2 normalises it"):
        memit(tiny.model("olmo2"), CLAMPED)
    with pytest.raises(ValueError, match=r"ascending order, got \(3, 2\)"):
        MemitSettings(layers=(3, 2))
    with pytest.raises(ValueError, match="second_moment_weight must be from 1e-12"):
        MemitSettings(second_moment_weight=0)
    with pytest.raises(ValueError, match="the first context template"):
        Memit(tiny.model("gpt2"), CLAMPED, ["no {}"], {}, BUDGET)


class Sizes(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.itemsize)
        return made


def test_many_facts_take_a_key_each_whatever_the_contexts() -> None:
    """In float64 no more than facts x keys, or keys x keys: 1.3 and 2.1 GB for ten thousand facts
    of GPT-J, whose keys of all contexts are 3.9 GB in float32 already."""
    model = tiny.model("gpt2", "float32")
    editor = memit(model, MEMIT)
    K, times = 40, 60
    chosen = [contexts.contexts(model, request, editor.templates) for request in REQUESTS]
    values_ED = torch.stack([value.target for value in editor.values(REQUESTS)] * times)
    requests, chosen = REQUESTS * times, chosen * times
    with Sizes() as sizes:
        (deltas,) = editor._insert(requests, chosen, values_ED, together=True)
    assert len(deltas) == len(MEMIT.layers)
    bound = 8 * K * max(K, len(requests))
    assert bound < 4 * len(editor.templates) * len(requests) * K
    assert bound / 2 < sizes.largest <= bound
