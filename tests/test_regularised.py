"""NAS on values, RECT on edits, PRUNE on a chain's total change: their rules, and who uses them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rome.data.records import Request
from rome.editors import EDITORS, Resources
from rome.editors.alphaedit import AlphaEditSettings
from rome.editors.memit import MemitSettings
from rome.editors.rome import Rome, RomeSettings
from rome.editors.values import ValueSettings
from rome.edits import regularised
from rome.edits.deltas import DenseDelta, Edit, dense
from rome.models import EditableModel
from tests.support import oracle, oracle_memit, tiny
from tests.support.computations import BUDGET, correlated_moment, moments
from tests.support.tiny import ADAM_ROUNDING, REQUESTS, TEMPLATES, relative

FAMILY = pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
VALUE = ValueSettings(steps=4, learning_rate=0.1, kl_factor=0.5, stop_below=0)
SPREAD: dict[str, Any] = {"layers": (0, 1), "value": VALUE}


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def made(model: EditableModel, name: str, **settings: Any) -> Any:
    resources = Resources(model, TEMPLATES, lambda layer: moments()[layer].solver(), BUDGET)
    return EDITORS[name].build(resources, EDITORS[name].settings(**settings))


# RECT


@pytest.mark.parametrize("kept", [0.4, 0.01, 1.0])
def test_rect_keeps_the_largest_beside_their_weight(kept: float) -> None:
    weight_DK, change_DK = random(30, 50), random(30, 50, seed=1)
    found_DK = regularised.rect(weight_DK, change_DK, kept)
    flat = [
        (abs(float(c) / (float(w) + 1e-8)), i)
        for i, (w, c) in enumerate(zip(weight_DK.flatten(), change_DK.flatten(), strict=True))
    ]
    largest = {i for _, i in sorted(flat, reverse=True)[: round(kept * 1500)]}
    for i, (found, change) in enumerate(zip(found_DK.flatten(), change_DK.flatten(), strict=True)):
        assert found == (change if i in largest else 0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rome", {"layer": 1, "value": VALUE}),
        ("memit", {**SPREAD, "second_moment_weight": 2}),
        ("alphaedit", {**SPREAD, "threshold": 0.08}),
        ("ft", {"layer": 1, "steps": 3}),
    ],
)
@FAMILY
def test_rect_of_an_editor_is_that_of_its_changes(
    family: str, name: str, settings: dict[str, Any]
) -> None:
    model = tiny.model(family)
    plain, kept = (
        made(model, name, **settings, rect=on).edit(REQUESTS[:2]) for on in (False, True)
    )
    for edit, expected in zip(kept, plain, strict=True):
        assert edit.deltas.keys() == expected.deltas.keys()
        for weight, delta in expected.deltas.items():
            change_DK = dense(delta)
            stored = model.hf.get_parameter(weight)
            weight_DK = stored.T if model.family.transposed and stored.dim() > 1 else stored
            found_DK = dense(edit.deltas[weight])
            rect_DK = regularised.rect(weight_DK.reshape(change_DK.shape), change_DK)
            assert torch.equal(found_DK, rect_DK)
            share = float((found_DK != 0).double().mean())
            assert share == pytest.approx(0.4, abs=0.05)
        norm = torch.stack([dense(d).norm() for d in edit.deltas.values()]).norm()
        assert edit.health["norm"] == pytest.approx(float(norm))
        assert edit.health["norm"] < expected.health["norm"]


def test_the_keys_of_a_chain_are_those_of_the_model_that_rect_leaves() -> None:
    model = tiny.model("llama")
    editor = made(model, "memit", **SPREAD, second_moment_weight=2, history=True, rect=True)
    edit, state = editor.edit_batch(REQUESTS, editor.begin())
    with oracle.changed(model, edit):
        keys_KE = oracle_memit.keys(model, editor.settings, TEMPLATES, 1, REQUESTS)
    assert relative(state["layer.1.keys"].T, keys_KE) < 1e-12
    plain = made(model, "memit", **SPREAD, second_moment_weight=2, history=True)
    _, other = plain.edit_batch(REQUESTS, plain.begin())
    assert relative(other["layer.1.keys"], state["layer.1.keys"]) > 1e-6


# PRUNE


def with_values(values: Sequence[float], seed: int) -> Tensor:
    """A matrix [5, 7] with these singular values."""
    U, _ = torch.linalg.qr(random(5, 5, seed=seed))
    V, _ = torch.linalg.qr(random(7, 5, seed=seed + 1))
    return U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ V.T


def test_prune_damps_singular_values_above_the_weights_largest() -> None:
    weight_DK = with_values([4, 3, 2, 1, 0.5], seed=0)
    change_DK = with_values([9, 5, 4 - 1e-6, 2, 0.1], seed=2)
    found_DK = regularised.pruned(weight_DK, change_DK)
    expected = [4 + math.log(9 / 4), 4 + math.log(5 / 4), 4 - 1e-6, 2, 0.1]
    left_DR, values_R, right_RK = torch.linalg.svd(change_DK, full_matrices=False)
    damped = torch.tensor(expected, dtype=torch.float64)
    assert torch.allclose(found_DK, left_DR @ torch.diag(damped) @ right_RK, atol=1e-6)
    assert torch.allclose(torch.linalg.svdvals(found_DK), damped, atol=1e-6)
    assert values_R[0] == pytest.approx(9)


def test_prune_leaves_small_changes_and_never_enlarges() -> None:
    small_DK = with_values([3.9, 1, 1, 1, 1], seed=2)
    assert torch.equal(regularised.pruned(with_values([4, 1, 1, 1, 1], 0), small_DK), small_DK)
    # Here log s - log s_max + s_max is above s.
    change_DK = with_values([0.9, 0.2, 0.1, 0.1, 0.1], seed=2)
    found_DK = regularised.pruned(with_values([0.5, 0.1, 0.1, 0.1, 0.1], 0), change_DK)
    assert torch.allclose(found_DK, change_DK)


def test_prune_of_float32_is_float32() -> None:
    weight_DK, change_DK = random(20, 30).float(), 9 * random(20, 30, seed=1).float()
    found_DK = regularised.pruned(weight_DK, change_DK)
    assert found_DK.dtype == torch.float32
    assert relative(found_DK, regularised.pruned(weight_DK.double(), change_DK.double())) < 1e-5


# NAS


def norms(edits: Sequence[Edit]) -> list[float]:
    return [edit.health["value_norm"] for edit in edits]


@FAMILY
def test_nas_gives_v_star_its_norm(family: str) -> None:
    """ROME: the edited weight answers k* with v* at length a, or is not edited above 2 a."""
    model = tiny.model(family)
    C_KK = correlated_moment().mean()
    settings = RomeSettings(layer=1, value=VALUE)
    free = [oracle.rome(model, settings, TEMPLATES, C_KK, r) for r in REQUESTS]
    lengths = sorted(float(one.target_D.norm()) for one in free)
    a = (lengths[-1] + lengths[-2]) / 4  # The longest is above 2 a, the others are below.
    solver = correlated_moment().solver()
    editor = Rome(model, replace(settings, nas=True, nas_norm=a), TEMPLATES, solver, BUDGET)
    edits = editor.edit(REQUESTS)
    assert norms(edits) == pytest.approx([float(one.target_D.norm()) for one in free])
    for request, edit, one in zip(REQUESTS, edits, free, strict=True):
        if one.target_D.norm() > 2 * a:
            assert (edit.deltas, edit.health["skipped"], edit.health["norm"]) == ({}, 1, 0)
            continue
        assert edit.health["skipped"] == 0
        ids, at = oracle_memit.bare(model, request.prompt, request.subject)
        with oracle.changed(model, edit):
            answer_D = oracle.run(model, 1, ids, at).output_D
        assert relative(answer_D, one.target_D * a / one.target_D.norm()) < ADAM_ROUNDING
    assert sum(edit.health["skipped"] for edit in edits) == 1


@pytest.mark.parametrize("name", ["memit", "alphaedit"])
@FAMILY
def test_nas_of_editors_of_many_layers(family: str, name: str) -> None:
    """v* is the MLP's part of z; a fact that is skipped keeps its state within the batch."""
    model = tiny.model(family)
    own = {"second_moment_weight": 2} if name == "memit" else {"threshold": 0.08}
    settings = {**SPREAD, **own}
    found = norms(made(model, name, **settings).edit(REQUESTS))
    longest, next_longest = sorted(found, reverse=True)[:2]
    a = (longest + next_longest) / 4
    editor = made(model, name, **settings, nas=True, nas_norm=a)
    C_KK = {layer: moment.mean() for layer, moment in moments().items()}
    plain: Any = oracle_memit.memit if name == "memit" else oracle_memit.alphaedit

    def check(edit: Edit, requests: Sequence[Request]) -> None:
        changes = plain(model, editor.settings, TEMPLATES, C_KK, requests)
        for layer, change_DK in changes.items():
            found_DK = dense(edit.deltas[model.weight_name(layer)])
            assert relative(found_DK, change_DK) < 3 * ADAM_ROUNDING

    together = editor.edit_together(REQUESTS)
    check(together, REQUESTS)
    assert together.health["skipped"] == 1
    for request, edit, norm in zip(REQUESTS, editor.edit(REQUESTS), found, strict=True):
        assert edit.health["value_norm"] == pytest.approx(norm)
        if norm == longest:
            assert (edit.deltas, edit.health["skipped"], edit.health["norm"]) == ({}, 1, 0)
        else:
            check(edit, [request])


@pytest.mark.parametrize("settings", [RomeSettings, MemitSettings, AlphaEditSettings])
def test_nas_without_its_norm_is_refused(settings: type) -> None:
    with pytest.raises(ValueError, match="nas needs nas_norm, the mean of edit_value_norm"):
        settings(nas=True)
    with pytest.raises(ValueError, match="nas_norm must be from 1e-12"):
        settings(nas=True, nas_norm=0)


def test_a_bias_is_rected_too() -> None:
    model = tiny.model("gpt2")
    name = "transformer.h.1.mlp.c_proj.bias"
    change_D1 = random(16, 1)
    (found,) = regularised.rect_all(model, {name: DenseDelta(change_D1)}).values()
    assert int((dense(found) != 0).sum()) == round(0.4 * 16)
