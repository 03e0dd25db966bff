"""Fine-tuning in batches equals fine-tuning the real weights on one request at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from rome.data.records import Request
from rome.editors import EDITORS, Resources
from rome.editors.fine_tuning import (
    AttentionSettings,
    FineTuning,
    FineTuningSettings,
)
from rome.edits.deltas import DenseDelta, Edit, applied
from rome.models import EditableModel
from rome.models.families import FAMILIES
from rome.solver import Solver
from tests.support import oracle, tiny
from tests.support.computations import ATTENTION, CONSTRAINED, FREE, MAIN
from tests.support.oracle_fine_tuning import Outcome, fine_tune
from tests.support.tiny import REQUESTS

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGET = 60  # All the requests do not fit into one batch.

SETTINGS = pytest.mark.parametrize(
    "settings", [FREE, CONSTRAINED, ATTENTION], ids=["free", "constrained", "attention"]
)


def check(model: EditableModel, edit: Edit, expected: Outcome, tolerance: float) -> None:
    assert edit.deltas.keys() == expected.changes.keys()
    for name, change in expected.changes.items():
        delta = edit.deltas[name]
        assert isinstance(delta, DenseDelta)
        change_DK = change if change.dim() > 1 else change[:, None]
        if change.dim() > 1 and model.family.transposed:
            change_DK = change_DK.T
        assert delta.change_DK.shape == change_DK.shape
        assert (delta.change_DK - change_DK).norm() <= tolerance * change_DK.norm()
    norms = [float(change.norm()) for change in expected.changes.values()]
    assert edit.health["norm"] == pytest.approx(sum(n**2 for n in norms) ** 0.5, rel=tolerance)
    assert edit.health["loss"] == pytest.approx(expected.losses[-1], rel=tolerance)
    assert edit.health["steps"] == len(expected.losses)


@SETTINGS
@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("family", MAIN)
def test_batch_equals_real_weights_one_request_at_a_time(
    family: str, kind: str, settings: FineTuningSettings
) -> None:
    model = tiny.model(family, "float64", kind)
    before = model.fingerprint()
    expected = [fine_tune(model, settings, request) for request in REQUESTS]
    assert model.fingerprint() == before
    for size in (1, len(REQUESTS)):
        editor = FineTuning(model, settings, BUDGET)
        batches = [REQUESTS[i : i + size] for i in range(0, len(REQUESTS), size)]
        edits = [edit for batch in batches for edit in editor.edit(batch)]
        for request, edit, one in zip(REQUESTS, edits, expected, strict=True):
            assert edit.request == request
            check(model, edit, one, 1e-6)
    assert model.fingerprint() == before


def test_requests_have_targets_of_one_token_and_of_several() -> None:
    tokenizer = tiny.tokenizer()
    lengths = {len(oracle.tokens(tokenizer, f" {request.target}")) for request in REQUESTS}
    assert 1 in lengths
    assert len(lengths) > 1


@pytest.mark.parametrize("target_loss", ["published", "sequence"])
@pytest.mark.parametrize("family", MAIN)
def test_edits_that_are_done_leave_the_others_as_they_would_be_alone(
    family: str, target_loss: Literal["published", "sequence"]
) -> None:
    model = tiny.model(family)
    settings = replace(FREE, steps=8, target_loss=target_loss)
    losses = [fine_tune(model, settings, request).losses for request in REQUESTS]
    # Between two losses of the edit that gains most: it ends midway, others at once or never.
    gains = max(losses, key=lambda x: x[0] - min(x))
    settings = replace(settings, stop_loss=sum(gains[2:4]) / 2)
    expected = [fine_tune(model, settings, request) for request in REQUESTS]
    steps = {len(one.losses) for one in expected}
    assert len(steps) > 1
    assert steps & set(range(2, settings.steps))
    for edit, one in zip(FineTuning(model, settings, 1000).edit(REQUESTS), expected, strict=True):
        if len(one.losses) == 1:
            assert edit.health["norm"] == 0
        check(model, edit, one, 1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(MAIN)))
def test_every_family_has_its_projections(family: str) -> None:
    model = tiny.model(family)
    for settings in (replace(FREE, steps=2), replace(ATTENTION, steps=2)):
        edits = FineTuning(model, settings, BUDGET).edit(REQUESTS)
        for request, edit in zip(REQUESTS, edits, strict=True):
            check(model, edit, fine_tune(model, settings, request), 1e-3)


@SETTINGS
def test_an_edit_leaves_nothing_for_the_next(settings: FineTuningSettings) -> None:
    model = tiny.model("gpt2", "float32")
    before = model.fingerprint()
    editor = FineTuning(model, settings, BUDGET)
    first, _, again = (editor.edit([request])[0] for request in (*REQUESTS[:2], REQUESTS[0]))
    assert first.health == again.health
    for name, delta in first.deltas.items():
        other = again.deltas[name]
        assert isinstance(delta, DenseDelta)
        assert isinstance(other, DenseDelta)
        assert torch.equal(delta.change_DK, other.change_DK)
    assert model.fingerprint() == before


@pytest.mark.parametrize("family", MAIN)
def test_the_sequence_loss_is_the_score_and_the_published_one_is_not(family: str) -> None:
    """Of a target of several tokens; of one token both are."""
    model = tiny.model(family)
    for request in REQUESTS:
        nll = oracle.nll(model, request.text, request.target)
        single = len(oracle.tokens(model.tokenizer, f" {request.target}")) == 1
        losses: tuple[Literal["published", "sequence"], ...] = ("published", "sequence")
        for loss in losses:
            settings = replace(FREE, steps=1, target_loss=loss)
            (edit,) = FineTuning(model, settings, BUDGET).edit([request])
            same = edit.health["loss"] == pytest.approx(nll, rel=1e-9)
            assert same == (single or loss == "sequence")


def no_solver(layer: int) -> Solver:
    raise AssertionError("fine-tuning needs no second moment")


@pytest.mark.model
@pytest.mark.parametrize("kind", ["ft", "ft+l", "attnedit"])
def test_a_registered_editor_makes_the_target_likely(kind: str) -> None:
    """On the real model, with the rates published for GPT-2 XL on layers that it has."""
    model = tiny.smollm2()
    settings = replace(EDITORS[kind].settings(), layer=1, norm_constraint=None, steps=10)
    request = Request("{} is in the city of", "The Eiffel Tower", "Rome")

    editor = EDITORS[kind].build(Resources(model, ["{}"], no_solver, 256), settings)
    (edit,) = editor.edit([request])
    assert oracle.nll(model, request.text, request.target) > 3
    with applied(model, [edit]):
        assert oracle.nll(model, request.text, request.target) < 0.1


def test_a_constrained_weight_stays_within_the_limit() -> None:
    model = tiny.model("gpt2")
    for edit in FineTuning(model, CONSTRAINED, BUDGET).edit(REQUESTS):
        for delta in edit.deltas.values():
            assert isinstance(delta, DenseDelta)
            assert 0.9 * 0.03 < delta.change_DK.abs().max() <= 0.03 + 1e-9


def test_memory_bounds_how_many_edits_run_at_once() -> None:
    """Weights, gradients and Adam's moments of a batch take at most what the model takes."""
    model = tiny.model("llama")
    editor = FineTuning(model, FREE, 10_000)
    assert 4 * editor.edits * 16 * 40 <= model.hf.num_parameters() < 4 * (editor.edits + 1) * 640


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="layer must be from 0 to 2, got 33"):
        FineTuning(tiny.model("gpt2"), AttentionSettings(), BUDGET)


def test_bfloat16_weights_are_tuned_in_float32() -> None:
    """Steps of 5e-4 would vanish in the rounding of bfloat16 weights."""
    model = tiny.model("llama", "bfloat16")
    (edit,) = FineTuning(model, replace(FREE, steps=3, learning_rate=5e-4), BUDGET).edit(
        REQUESTS[:1]
    )
    (delta,) = edit.deltas.values()
    assert isinstance(delta, DenseDelta)
    assert delta.change_DK.dtype == torch.float32
    assert 1e-3 < delta.change_DK.abs().max() < 2e-3
    with applied(model, [edit]):
        model.hf(torch.tensor([[1, 2, 3]]))
