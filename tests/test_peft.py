"""LoRA adapters of edits, loaded by the real peft into the models that were edited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from rome.edits import peft_export
from rome.edits.deltas import Edit, LowRankDelta, applied
from rome.models import EditableModel
from tests.support import tiny
from tests.support.computations import few_steps
from tests.support.tiny import REQUESTS

TEXTS = ["The mother tongue of Danielle Darrieux is", "Where is Rome? It is in"]


def logits(model: EditableModel, hf: torch.nn.Module) -> list[Tensor]:
    return [hf(torch.tensor([row.ids])).logits for row in model.encode(TEXTS)]


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


def check(model: EditableModel, edit: Edit, folder: Path) -> None:
    before = logits(model, model.hf)
    with applied(model, [edit]):
        edited = logits(model, model.hf)
    assert difference(edited, before) > 1e-3
    peft_export.export(folder, edit, model)
    adapted = PeftModel.from_pretrained(model.hf, folder)
    assert difference(logits(model, adapted), edited) < 1e-5
    with adapted.disable_adapter():
        assert difference(logits(model, adapted), before) == 0
    # What servers do that know no adapters.
    assert difference(logits(model, adapted.merge_and_unload()), edited) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("editor", ["rome", "memit"])
# Conv1D, which stores [in, out], and Linear.
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_an_adapter_gives_the_logits_of_the_edit(
    family: str, editor: str, dtype: str, tmp_path: Path
) -> None:
    model = tiny.model(family, dtype)
    check(model, few_steps(model, editor)[1], tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (1, 1)
    assert config["fan_in_fan_out"] == (family == "gpt2")


def test_ranks_may_differ_between_weights(tmp_path: Path) -> None:
    model = tiny.model("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        deltas = {
            model.weight_name(layer): LowRankDelta(
                torch.randn(16, rank, dtype=torch.float64), torch.randn(40, rank).double()
            )
            for layer, rank in ((0, 3), (2, 1))
        }
    check(model, Edit(REQUESTS[0], deltas), tmp_path)


def test_what_is_no_low_rank_change_is_refused(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    with pytest.raises(ValueError, match=r"all of transformer\.h\.1\.mlp\.c_proj\.bias, "):
        peft_export.export(tmp_path / "dense", few_steps(model, "ft")[0], model)
    with pytest.raises(ValueError, match="changes no weight"):
        peft_export.export(tmp_path / "none", Edit(REQUESTS[0]), model)
    assert list(tmp_path.iterdir()) == []
