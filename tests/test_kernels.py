"""Fused activations and norms, and a head with room, answer as what they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from rome.models import kernels
from tests.support import tiny
from tests.support.tiny import close


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "mistral", "qwen2", "phi3"])
def test_a_fused_model_answers_as_before(family: str) -> None:
    fused = tiny.model(family, "float32").hf
    torch.manual_seed(0)
    plain = type(fused)(fused.config).eval()
    plain.load_state_dict(fused.state_dict())
    kinds = {type(module).__name__ for module in fused.modules()}
    assert "NewGELUActivation" not in kinds
    assert not any("RMSNorm" in kind for kind in kinds - {"RMSNorm"})
    assert list(plain.state_dict()) == list(fused.state_dict())
    ids = torch.arange(3, 15)[None]
    plain.set_attn_implementation("eager")
    assert close(fused(ids).logits, plain(ids).logits, 1e-6)


def odd_head() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=101, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def test_a_head_with_room_answers_and_is_differentiated_as_without(tmp_path: Path) -> None:
    plain, roomy = odd_head(), odd_head()
    kernels.give_room(roomy)
    weight = roomy.lm_head.weight
    assert weight is roomy.transformer.wte.weight
    assert weight.untyped_storage().nbytes() == 128 * 8 * 4
    assert torch.equal(weight, plain.lm_head.weight)
    hidden_ND, gradient_NV = torch.randn(5, 8), torch.randn(5, 101)
    assert kernels.logits(roomy, hidden_ND).shape == (5, 101)
    assert close(kernels.logits(roomy, hidden_ND), kernels.logits(plain, hidden_ND))
    expected = kernels.pull_back(plain, gradient_NV)
    assert close(kernels.pull_back(roomy, gradient_NV), expected)
    weight.mul_(2)  # Whoever writes a weight writes what is multiplied.
    assert close(kernels.logits(roomy, hidden_ND), 2 * kernels.logits(plain, hidden_ND))
    roomy.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, weight)


def test_gelu_is_the_one_of_gpt2() -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    assert close(torch.nn.GELU(approximate="tanh")(x), NewGELUActivation()(x), 1e-12)
