"""ROME in batches equals ROME one record at a time, and does what the paper's algebra says."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Literal
from unittest import mock

import pytest
import torch

from rome.data.records import Request
from rome.editors.rome import Rome, RomeSettings
from rome.edits.deltas import applied, dense
from rome.models import EditableModel, costs
from rome.models.families import FAMILIES
from tests.support import oracle, tiny
from tests.support.computations import (
    BUDGET,
    CLAMPED,
    ENDING,
    LAST,
    MAIN,
    STOPPING,
    correlated_moment,
    random_edits,
)
from tests.support.oracle import parts
from tests.support.tiny import ADAM_ROUNDING, REQUESTS, TEMPLATES, close

pytestmark = pytest.mark.usefixtures("one_thread")


def check_batches(model: EditableModel, settings: RomeSettings, tolerance: float) -> None:
    """Edits of 1, 3 and all requests at once equal the oracle's."""
    requests = ENDING if settings is LAST else REQUESTS
    moment = correlated_moment() if settings.second_moment else None
    C_KK = None if moment is None else moment.mean()

    def outcomes() -> list[oracle.Outcome]:
        return [oracle.rome(model, settings, TEMPLATES, C_KK, request) for request in requests]

    expected = outcomes()
    if settings is STOPPING:
        # Between two losses of the edit that gains most: it ends midway, others at once or never.
        losses = max((outcome.losses for outcome in expected), key=lambda x: x[0] - min(x))
        settings = replace(settings, value=replace(settings.value, stop_below=sum(losses[2:4]) / 2))
        expected = outcomes()
        steps = {len(outcome.losses) for outcome in expected}
        assert len(steps) > 1
        assert steps & set(range(2, settings.value.steps))
    if settings is CLAMPED:
        assert any(outcome.clamp_hits > 0 for outcome in expected)

    editor = Rome(model, settings, TEMPLATES, None if moment is None else moment.solver(), BUDGET)
    for size in (1, 3, len(requests)):
        batches = [requests[i : i + size] for i in range(0, len(requests), size)]
        edits = [edit for batch in batches for edit in editor.edit(batch)]
        for request, edit, one in zip(requests, edits, expected, strict=True):
            lambda_D, u_K = parts(edit)
            assert edit.request == request
            assert lambda_D.dtype == u_K.dtype == model.dtype
            assert close(u_K, one.u_K, tolerance)
            assert close(lambda_D, one.lambda_D, tolerance)
            assert edit.health["loss"] == pytest.approx(one.losses[-1], rel=tolerance)
            assert edit.health["divisor"] == pytest.approx(one.divisor, rel=tolerance)
            assert edit.health["steps"] == len(one.losses)
            assert edit.health["clamp_hits"] == one.clamp_hits


SETTINGS = pytest.mark.parametrize(
    "settings", [CLAMPED, STOPPING, LAST], ids=["clamped", "stopping", "last"]
)


@SETTINGS
@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("family", MAIN)
def test_batch_equals_one_record_at_a_time(family: str, kind: str, settings: RomeSettings) -> None:
    check_batches(tiny.model(family, "float64", kind), settings, ADAM_ROUNDING)


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("settings", [CLAMPED, STOPPING], ids=["clamped", "stopping"])
@pytest.mark.parametrize("family", MAIN)
def test_edits_that_are_done_and_stay_in_the_batch_change_no_more(
    family: str, settings: RomeSettings, share: float
) -> None:
    """On a GPU they leave together, some evaluations later."""
    staying = replace(costs.COSTS["cpu"], leaving=share)
    with mock.patch.dict(costs.COSTS, cpu=staying):
        check_batches(tiny.model(family, "float64"), settings, ADAM_ROUNDING)


@SETTINGS
@pytest.mark.parametrize("family", MAIN)
def test_batch_equals_one_record_at_a_time_in_float32(family: str, settings: RomeSettings) -> None:
    check_batches(tiny.model(family, "float32"), settings, 1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(MAIN)))
def test_batch_equals_one_record_at_a_time_in_other_families(family: str) -> None:
    check_batches(tiny.model(family, "float32"), CLAMPED, 1e-4)


@pytest.mark.parametrize("family", MAIN)
@pytest.mark.parametrize("keys", ["mean", "prompt"])
def test_edited_model_answers_the_key_with_the_value(
    family: str, keys: Literal["mean", "prompt"]
) -> None:
    """W' k* = v* (Equation 2), read from a forward pass of a model whose weight was changed."""
    model, moment = tiny.model(family), correlated_moment()
    settings = replace(CLAMPED, keys=keys)
    contexts = TEMPLATES if keys == "mean" else ["{}"]
    editor = Rome(model, settings, TEMPLATES, moment.solver(), BUDGET)
    for request, edit in zip(REQUESTS, editor.edit(REQUESTS), strict=True):
        expected = oracle.rome(model, settings, TEMPLATES, moment.mean(), request).target_D
        outputs = []
        with oracle.edited(model, settings.layer, torch.outer(*parts(edit))):
            for template in contexts:
                context = template.replace("{}", request.prompt)
                text = context.replace("{}", request.subject)
                ids, _ = oracle.prompt_and_target(model.tokenizer, text, "")
                at = oracle.subject_last(model.tokenizer, context, request.subject)
                outputs.append(oracle.run(model, settings.layer, ids, at).output_D)
        assert close(torch.stack(outputs).mean(0), expected, 1e-5)


@pytest.mark.parametrize("family", MAIN)
def test_applied_equals_weights_changed_in_place(family: str) -> None:
    """Each row of a batch runs as if its edit were alone, and nothing is left behind."""
    model = tiny.model(family)
    before = model.fingerprint()
    edits = random_edits(model)
    rows = [edits[e] for e in (3, 1, 0, 2, 1)]
    ids_BT = torch.tensor([[5, 6, 7, 8], [9, 5, 4, 7], [9, 5, 4, 7], [9, 5, 4, 7], [1, 2, 3, 4]])
    unedited = model.hf(ids_BT).logits
    with applied(model, rows):
        logits_BTV = model.hf(ids_BT).logits
    for b, edit in enumerate(rows):
        with ExitStack() as stack:
            for layer in range(2):
                if delta := edit.deltas.get(model.weight_name(layer)):
                    change_DK = dense(delta)
                    stack.enter_context(oracle.edited(model, layer, change_DK))
                    assert delta.norm == pytest.approx(float(change_DK.norm()), rel=1e-12)
            assert close(logits_BTV[b], model.hf(ids_BT[b : b + 1]).logits[0], 1e-6)
    assert model.fingerprint() == before
    assert torch.equal(model.hf(ids_BT).logits, unedited)


def test_applied_refuses_another_number_of_rows() -> None:
    model = tiny.model("gpt2")
    edits = random_edits(model)
    with applied(model, edits), pytest.raises(ValueError, match="4 edits, 2 rows"):
        model.hf(torch.tensor([[1, 2], [3, 4]]))
    model.hf(torch.tensor([[1, 2], [3, 4]]))  # The refusal removed the hooks.


@pytest.mark.parametrize(
    ("templates", "prompt"), [(["no"], "{} is"), (["{}", "{} {}"], "{} is"), (["{}"], "nobody is")]
)
def test_templates_and_prompts_hold_one_pair_of_braces(templates: list[str], prompt: str) -> None:
    model = tiny.model("gpt2")
    with pytest.raises(ValueError, match=r"'\{\}'"):
        Rome(model, LAST, templates, None, BUDGET).edit([Request(prompt, "Bob", "Rome")])


def test_a_token_that_holds_subject_and_target_is_refused() -> None:
    model = tiny.model("gpt2", tokenizer_kind="merging")
    request = Request("The capital is {}", "Italy is", "Rome")
    with pytest.raises(ValueError, match="'Rome' must begin after the subject's"):
        Rome(model, LAST, TEMPLATES, None, BUDGET).edit([request])
