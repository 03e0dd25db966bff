"""Editors that carry a state through a chain equal the plainest form of it, batch after batch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rome.data.records import RecordError, Request
from rome.editors import (
    EDITORS,
    ChainEditor,
    Editor,
    JointEditor,
    Resources,
    State,
    ValueEditor,
)
from rome.editors.alphaedit import AlphaEdit, AlphaEditSettings
from rome.editors.history import History
from rome.editors.memit import Memit, MemitSettings, MemitWithHistory
from rome.editors.spreading import Remembering, SpreadingSettings
from rome.editors.ultraedit import UltraEdit, UltraEditSettings
from rome.editors.values import ValueSettings
from rome.edits.deltas import Edit, dense, written
from rome.models import EditableModel
from rome.models.families import UnsupportedModelError
from tests.support import oracle, oracle_memit, oracle_ultraedit, tiny
from tests.support.computations import BUDGET, correlated_moment, moments
from tests.support.tiny import ADAM_ROUNDING, REQUESTS, TEMPLATES, relative

MAIN = ("gpt2", "gptj", "llama")
FAMILY = pytest.mark.parametrize("family", MAIN)
VALUE = ValueSettings(steps=4, learning_rate=0.1, kl_factor=0.5, clamp=0.4, stop_below=0)
MEMIT = MemitSettings(layers=(0, 1), second_moment_weight=2, value=VALUE, history=True)
# C of `moments` is near 0.09 I, so that about half of its directions are below 0.08.
ALPHA = AlphaEditSettings(layers=(0, 1), threshold=0.08, l2=0.5, value=VALUE)
BATCHES = [REQUESTS[:2], REQUESTS[2:4], REQUESTS[4:]]

_C = {layer: moment.mean() for layer, moment in moments().items()}


def memit(model: EditableModel, settings: MemitSettings) -> MemitWithHistory:
    solvers = {layer: moment.solver() for layer, moment in moments().items()}
    return MemitWithHistory(model, settings, TEMPLATES, solvers, BUDGET)


def alphaedit(model: EditableModel, settings: AlphaEditSettings) -> AlphaEdit:
    solvers = {layer: moment.solver() for layer, moment in moments().items()}
    return AlphaEdit(model, settings, TEMPLATES, solvers, BUDGET)


def check_chain(model: EditableModel, editor: Remembering) -> dict[str, Tensor]:
    """Each batch equals the oracle's, on a model that holds the oracle's earlier changes; the
    state survives a file. Gives the last state."""
    settings = editor.settings
    state: State = editor.begin()
    H_KK = {layer: torch.zeros(40, 40, dtype=torch.float64) for layer in settings.layers}
    before = model.fingerprint()
    with ExitStack() as stack:
        for batch in BATCHES:
            if isinstance(settings, AlphaEditSettings):
                changes = oracle_memit.alphaedit(model, settings, TEMPLATES, _C, batch, H_KK)
            else:
                assert isinstance(settings, MemitSettings)
                changes = oracle_memit.memit(model, settings, TEMPLATES, _C, batch, H_KK)
            edit, state = editor.edit_batch(batch, state)
            assert edit.request == batch[-1]
            assert edit.deltas.keys() == {model.weight_name(layer) for layer in changes}
            for layer, change_DK in changes.items():
                found_DK = dense(edit.deltas[model.weight_name(layer)])
                assert relative(found_DK, change_DK) < 3 * ADAM_ROUNDING
            norm = torch.stack([change_DK.norm() for change_DK in changes.values()]).norm()
            assert edit.health["norm"] == pytest.approx(float(norm), rel=1e-5)
            for layer, change_DK in changes.items():
                stack.enter_context(oracle.edited(model, layer, change_DK))
            for layer in changes:
                keys_KE = oracle_memit.keys(model, settings, TEMPLATES, layer, batch)
                H_KK[layer] += keys_KE @ keys_KE.T
    assert model.fingerprint() == before
    for layer, sum_KK in H_KK.items():
        history = History.of(state, layer)
        found_KK = history.keys_MK.T @ history.keys_MK
        if history.sum_KK is not None:
            found_KK = found_KK + history.sum_KK
        assert relative(found_KK, sum_KK) < 3 * ADAM_ROUNDING
    return dict(state)


@pytest.mark.parametrize("kind", ["plain", "bos"])
@FAMILY
def test_memit_with_history_is_the_plain_one(family: str, kind: str) -> None:
    model = tiny.model(family, "float64", kind)
    state = check_chain(model, memit(model, MEMIT))
    assert state["layer.0.keys"].shape == (5, 40)


@pytest.mark.parametrize("kind", ["plain", "bos"])
@FAMILY
def test_alphaedit_is_the_plain_one(family: str, kind: str) -> None:
    model = tiny.model(family, "float64", kind)
    editor = alphaedit(model, ALPHA)
    assert all(5 < kept_KR.shape[1] < 35 for kept_KR in editor.directions.values())
    check_chain(model, editor)


@pytest.mark.parametrize("editor", ["memit", "alphaedit"])
@FAMILY
def test_a_sum_replaces_keys_that_are_many(
    family: str, editor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers where H is carried from the second batch on."""
    model = tiny.model(family)
    made: Remembering = memit(model, MEMIT) if editor == "memit" else alphaedit(model, ALPHA)
    monkeypatch.setattr(made, "_most_keys", lambda layer: 3)
    state = check_chain(model, made)
    assert state["layer.1.keys"].shape == (0, 40)
    assert state["layer.1.sum"].shape == (40, 40)


def test_keys_are_kept_up_to_half_of_what_they_could_span() -> None:
    model = tiny.model("gpt2")
    editor = alphaedit(model, ALPHA)
    ranks = {layer: kept_KR.shape[1] for layer, kept_KR in editor.directions.items()}
    assert editor._most_keys(0) == ranks[0] / 2
    assert memit(model, MEMIT)._most_keys(0) == 20
    keys_NK = torch.randn(19, 40)
    few = History(keys_NK[:0]).followed_by(keys_NK, 20)
    assert few.sum_KK is None
    many = few.followed_by(keys_NK[:1], 20)
    assert many.keys_MK.shape == (0, 40)
    assert many.sum_KK is not None


@pytest.mark.parametrize("settings", [MEMIT, ALPHA], ids=["memit", "alphaedit"])
def test_a_state_goes_through_a_file(
    settings: MemitSettings | AlphaEditSettings, tmp_path: Path
) -> None:
    """Another worker that reads it makes the same edit, to the bit, in the weights' dtype."""
    model = tiny.model("llama", "float32")

    def editor() -> Remembering:
        if isinstance(settings, MemitSettings):
            return memit(model, settings)
        return alphaedit(model, settings)

    first, state = editor().edit_batch(BATCHES[0], editor().begin())
    save_file(dict(state), tmp_path / "state.safetensors")
    save_file(dict(editor().begin()), tmp_path / "begin.safetensors")
    there = load_file(tmp_path / "state.safetensors")
    begun, _ = editor().edit_batch(BATCHES[0], load_file(tmp_path / "begin.safetensors"))
    same(begun, first)
    with written(model, first):
        same(editor().edit_batch(BATCHES[1], there)[0], editor().edit_batch(BATCHES[1], state)[0])


def same(one: Edit, other: Edit) -> None:
    assert one.health == other.health
    assert one.deltas.keys() == other.deltas.keys()
    assert all(torch.equal(dense(d), dense(other.deltas[n])) for n, d in one.deltas.items())


def test_memit_without_a_past_is_memit_to_the_bit() -> None:
    model = tiny.model("gptj", "float32")
    with_history = memit(model, MEMIT)
    solvers = {layer: moment.solver() for layer, moment in moments().items()}
    plain = Memit(model, replace(MEMIT, history=False), TEMPLATES, solvers, BUDGET)
    expected = plain.edit_together(REQUESTS)
    same(with_history.edit_batch(REQUESTS, with_history.begin())[0], expected)
    same(with_history.edit_together(REQUESTS), expected)


@pytest.mark.parametrize(("keys", "past"), [(3, 0), (3, 9), (3, 30), (60, 0), (60, 30)])
@pytest.mark.parametrize("summed", [False, True], ids=["keys", "sum"])
def test_both_forms_of_alphaedit_agree(keys: int, past: int, summed: bool) -> None:
    """That of the code, K x K by LU, and that in the space that may change: within 1e-8."""
    generator = torch.Generator().manual_seed(keys + past)
    moment = correlated_moment()
    settings = replace(ALPHA, layers=(1,), threshold=1.0, relative=True, l2=10.0)
    editor = AlphaEdit(tiny.model("gpt2"), settings, TEMPLATES, {1: moment.solver()}, BUDGET)
    K_KN, before_KM = (
        torch.randn(40, n, generator=generator, dtype=torch.float64) * 3 for n in (keys, past)
    )
    history = History(before_KM.T)
    if summed:
        history = History(before_KM.T[:0], before_KM @ before_KM.T)
    (found_NK,) = editor._adjusted(1, K_KN.T[None], history)
    P_KK = oracle_memit.projection(moment.mean(), settings)
    H_KK = before_KM @ before_KM.T
    assert relative(found_NK.T, oracle_memit.alphaedit_solved(P_KK, K_KN, H_KK, 10.0)) < 1e-8


@FAMILY
def test_alphaedit_leaves_what_is_in_use(family: str) -> None:
    """Strong directions of C pass through the edited weight as before, and yet all facts have the
    states asked for, where hardly anything weighs on the identity."""
    model = tiny.model(family)
    solver = correlated_moment().solver()
    settings = replace(ALPHA, layers=(1,), threshold=3.0, relative=True, l2=1e-9)
    editor = AlphaEdit(model, settings, ["{}"], {1: solver}, BUDGET)
    edit = editor.edit_together(REQUESTS)
    change_DK = dense(edit.deltas[model.weight_name(1)])
    values_K, vectors_KK = solver.spectrum("cpu")
    rank = edit.health["rank"]
    assert 0 < rank == int((values_K < 3 * values_K.median()).sum()) < 40
    strong_KR = vectors_KK[:, int(rank) :]
    assert (change_DK @ strong_KR).norm() < 1e-12 * change_DK.norm()
    for request in REQUESTS:
        z_D = oracle_memit.target_state(model, settings, ["{}"], request)[0]
        at = oracle_memit.bare(model, request.prompt, request.subject)
        with written(model, edit):
            assert relative(oracle_memit.run(model, 1, *at)[1], z_D) < 1e-5


@FAMILY
def test_history_keeps_what_was_written(family: str) -> None:
    """The second batch moves the values of the first one's keys less than without a history."""
    model = tiny.model(family)
    settings = replace(MEMIT, layers=(1,), second_moment_weight=0.01)
    name = model.weight_name(1)
    with_history, without = memit(model, settings), replace(settings, history=False)
    first, state = with_history.edit_batch(BATCHES[0], with_history.begin())
    with written(model, first):
        kept, _ = with_history.edit_batch(BATCHES[1], state)
        forgot = memit(model, without).edit_together(BATCHES[1])
    keys_MK = state["layer.1.keys"]
    moved = [float((dense(e.deltas[name]) @ keys_MK.T).norm()) for e in (kept, forgot)]
    assert moved[0] < 0.2 * moved[1]


@pytest.mark.parametrize("settings", [MEMIT, ALPHA], ids=["memit", "alphaedit"])
@FAMILY
def test_a_flat_mean_of_keys(family: str, settings: MemitSettings | AlphaEditSettings) -> None:
    model = tiny.model(family)
    flat = replace(settings, keys="mean")
    if isinstance(flat, MemitSettings):
        check_chain(model, memit(model, flat))
    else:
        check_chain(model, alphaedit(model, flat))


def test_thresholds_that_keep_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"smallest eigenvalue of C at layer 0, .*; got 1e-06"):
        alphaedit(tiny.model("gpt2"), replace(ALPHA, threshold=1e-6))


# UltraEdit

ULTRA = {
    "gpt2": UltraEditSettings(up=(0,), down=(1, 2), learning_rate=1e-3),
    "gptj": UltraEditSettings(down=(0, 2), learning_rate=1e-3),
    "llama": UltraEditSettings(gate=(1,), up=(0, 2), down=(), learning_rate=1e-3),
}


@pytest.mark.parametrize("kind", ["plain", "bos"])
@FAMILY
def test_ultraedit_is_the_plain_one(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny.model(family, "float64", kind)
    editor = UltraEdit(model, ULTRA[family], BUDGET)
    state: State = editor.begin()
    so_far: list[oracle_ultraedit.Rows] = []
    before = model.fingerprint()
    with ExitStack() as stack:
        for batch in BATCHES:
            rows = oracle_ultraedit.rows(model, editor.weights, batch)
            expected = oracle_ultraedit.ultraedit(rows, so_far, 1e-3)
            edit, state = editor.edit_batch(batch, state)
            assert edit.deltas.keys() == expected.keys()
            for name, change_DK in expected.items():
                assert relative(dense(edit.deltas[name]), change_DK) < 1e-7
            save_file(dict(state), tmp_path / "state.safetensors")
            state = load_file(tmp_path / "state.safetensors")
            so_far.append(rows)
            stack.enter_context(written(model, edit))
    assert model.fingerprint() == before
    assert editor.edit_together(REQUESTS).health["norm"] > 0


def test_what_ultraedit_cannot_do_is_refused() -> None:
    model = tiny.model("gpt2")
    with pytest.raises(UnsupportedModelError, match="gate must be empty for gpt2"):
        UltraEdit(model, UltraEditSettings(gate=(1,), down=()), BUDGET)
    with pytest.raises(ValueError, match="layer must be from 0 to 2, got 18"):
        UltraEdit(model, UltraEditSettings(), BUDGET)
    with pytest.raises(ValueError, match="gate, up or down must name a layer"):
        UltraEditSettings(down=())
    editor = UltraEdit(model, UltraEditSettings(down=(1,)), BUDGET)
    one_token = Request("The capital of {} is", "Italy", "Rome")
    assert len(oracle.tokens(model.tokenizer, " Rome")) == 1
    with pytest.raises(RecordError, match="at least two tokens of targets, got 1"):
        editor.edit([one_token])
    assert editor.edit_together([one_token, one_token]).health["loss"] > 0


@pytest.mark.parametrize(
    ("name", "settings", "carries"),
    [
        ("memit", {"layers": (0, 1)}, False),
        ("memit", {"layers": (0, 1), "history": True}, True),
        ("alphaedit", {"layers": (0, 1), "threshold": 0.08}, True),
        ("ultraedit", {"down": (1,)}, True),
        ("lora", {"steps": 1}, False),
        ("rome", {"layer": 1}, False),
        ("none", {}, False),
    ],
)
def test_those_that_carry_a_state_say_so(
    name: str, settings: Mapping[str, object], carries: bool
) -> None:
    resources = Resources(
        tiny.model("gpt2"), TEMPLATES, lambda layer: moments()[layer].solver(), BUDGET
    )
    kind = EDITORS[name]
    editor: Editor = kind.build(resources, kind.settings(**settings))
    assert isinstance(editor, ChainEditor) == carries
    assert isinstance(editor, JointEditor) or not carries


def test_the_registry_says_whose_values_can_be_shared() -> None:
    model = tiny.model("gpt2")
    assert isinstance(memit(model, MEMIT), ValueEditor)
    assert isinstance(alphaedit(model, ALPHA), ValueEditor)
    assert not isinstance(UltraEdit(model, ULTRA["gpt2"], BUDGET), ValueEditor)
    spread = [n for n, kind in EDITORS.items() if issubclass(kind.settings, SpreadingSettings)]
    assert spread == [name for name, kind in EDITORS.items() if kind.values]
