"""LoRA through peft equals factors that are trained by hand, and leaves the model as it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rome.data.records import Request
from rome.editors.lora import Lora, LoraSettings
from rome.edits import peft_export
from rome.edits.deltas import LowRankDelta, applied, dense
from rome.models import EditableModel
from tests.support import oracle, tiny
from tests.support.computations import BUDGET
from tests.support.tiny import ADAM_ROUNDING, REQUESTS, relative

MODULES = {"gpt2": ("c_attn", "c_proj"), "gptj": ("fc_in", "fc_out"), "llama": ("q_proj", "v_proj")}
FAMILY = pytest.mark.parametrize("family", sorted(MODULES))


def settings(family: str) -> LoraSettings:
    return LoraSettings(modules=MODULES[family], rank=3, alpha=6, steps=4, learning_rate=0.01)


def by_hand(
    model: EditableModel,
    settings: LoraSettings,
    requests: Sequence[Request],
    first: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The changes [D, K] from the same first A: x -> W x + alpha / r B A x, one text at a time."""
    A = {name: a_RK.clone().requires_grad_() for name, a_RK in first.items()}
    sizes = {name: model.sizes(f"{name}.weight") for name in first}
    B = {
        name: torch.zeros(D, settings.rank, dtype=model.dtype, requires_grad=True)
        for name, (D, _) in sizes.items()
    }
    scale = settings.alpha / settings.rank
    adam = torch.optim.Adam([*A.values(), *B.values()], lr=settings.learning_rate)

    def hook(name: str) -> object:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + scale * args[0] @ A[name].T @ B[name].T

        return model.hf.get_submodule(name).register_forward_hook(add)

    handles = [hook(name) for name in first]
    for _ in range(settings.steps):
        losses = []
        for request in requests:
            ids, target = oracle.prompt_and_target(model.tokenizer, request.text, request.target)
            losses.append(oracle._nll(oracle.log_probabilities(model, ids + target[:-1]), target))
        adam.zero_grad()
        torch.stack(losses).mean().backward()
        adam.step()
    for handle in handles:
        handle.remove()  # type: ignore[attr-defined]
    return {name: (scale * B[name] @ A[name]).detach() for name in first}


def start(
    model: EditableModel, chosen: LoraSettings, requests: Sequence[Request]
) -> dict[str, Tensor]:
    """The first A of each module."""
    with Lora(model, chosen, BUDGET)._adapters(requests) as adapters:
        return {n: a.lora_A["default"].weight.detach().clone() for n, a in adapters.items()}


@pytest.mark.parametrize("size", [1, 5])
@FAMILY
def test_a_batch_is_trained_as_by_hand(family: str, size: int) -> None:
    """Padded, in several passes, in any layout."""
    model, requests, chosen = tiny.model(family), REQUESTS[:size], settings(family)
    before = model.fingerprint()
    modules = dict(model.hf.named_modules())
    expected = by_hand(model, chosen, requests, start(model, chosen, requests))
    edit = Lora(model, chosen, 60).edit_together(requests)
    assert edit.deltas.keys() == {f"{name}.weight" for name in expected}
    for name, change_DK in expected.items():
        delta = edit.deltas[f"{name}.weight"]
        assert isinstance(delta, LowRankDelta)
        assert delta.left_DR.shape[1] == 3
        assert relative(dense(delta), change_DK) < 10 * ADAM_ROUNDING
    assert model.fingerprint() == before
    assert dict(model.hf.named_modules()) == modules
    assert not hasattr(model.hf, "peft_config")


@FAMILY
def test_an_edit_says_its_target_and_depends_on_its_request_alone(family: str) -> None:
    model = tiny.model(family)
    editor = Lora(model, replace(settings(family), steps=20), BUDGET)
    a, _, again = (editor.edit([REQUESTS[i]])[0] for i in (0, 1, 0))
    both = editor.edit(REQUESTS[:2])
    for name in a.deltas:
        assert torch.equal(dense(a.deltas[name]), dense(again.deltas[name]))
        assert torch.equal(dense(a.deltas[name]), dense(both[0].deltas[name]))
    request = REQUESTS[0]
    before = oracle.nll(model, request.text, request.target)
    with applied(model, [a]):
        assert oracle.nll(model, request.text, request.target) < 0.5 * before
    seeded = Lora(model, replace(editor.settings, seed=1), BUDGET).edit([request])[0]
    assert not torch.equal(*(dense(next(iter(e.deltas.values()))) for e in (a, seeded)))


def test_an_edit_is_an_adapter_again(tmp_path: object) -> None:
    model = tiny.model("llama", "float32")
    edit = Lora(model, settings("llama"), BUDGET).edit_together(REQUESTS)
    peft_export.export(str(tmp_path), edit, model)


def test_bfloat16_trains_in_float32() -> None:
    model = tiny.model("llama", "bfloat16")
    edit = Lora(model, settings("llama"), BUDGET).edit_together(REQUESTS)
    assert {dense(delta).dtype for delta in edit.deltas.values()} == {torch.float32}
    assert edit.health["norm"] > 0


def test_modules_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"modules must be one or more of .*q_proj.*c_attn"):
        Lora(tiny.model("llama"), LoraSettings(), BUDGET)
    with pytest.raises(ValueError, match="got none"):
        Lora(tiny.model("llama"), LoraSettings(modules=()), BUDGET)


def test_peft_is_asked_for_by_name() -> None:
    program = """
import sys
sys.modules["peft"] = None
from rome.editors.lora import Lora, LoraSettings
from tests.support import tiny
try:
    Lora(tiny.model("gpt2"), LoraSettings(), 100)
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "pip install 'rome-bench[lora]'" in done.stdout
