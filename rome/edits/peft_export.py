"""Low-rank edits as LoRA adapters that `peft`, and what serves its adapters, loads.

An adapter is a folder of `adapter_config.json` and `adapter_model.safetensors`. A module computes
W x + alpha / r * B A x, with A [r, K] and B [D, r] for either layout of W; alpha = r here.

Legend: K input size, D output size, R rank.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
from torch.nn.functional import pad

from rome.edits.deltas import Edit, LowRankDelta
from rome.models import EditableModel


def export(folder: str | os.PathLike[str], edit: Edit, model: EditableModel) -> None:
    """Write the adapter of an edit: `PeftModel.from_pretrained(base, folder)` gives its logits.

    All modules have the rank of the highest; zeros fill the others. Raises ValueError for an edit
    that changes nothing, and for one with a dense change, such as those of fine-tuning.
    """
    low_rank = {
        name.removesuffix(".weight"): delta
        for name, delta in edit.deltas.items()
        if isinstance(delta, LowRankDelta)
    }
    if dense := edit.deltas.keys() - {f"{module}.weight" for module in low_rank}:
        raise ValueError(
            "a LoRA adapter holds low-rank changes only, but this edit changes all of "
            f"{', '.join(sorted(dense))}; keep it as safetensors, or edit with another editor"
        )
    if not low_rank:
        raise ValueError("the edit changes no weight, so there is no adapter to write")
    rank = max(delta.left_DR.shape[1] for delta in low_rank.values())
    tensors = {}
    for module, delta in low_rank.items():
        right_KR, left_DR = (
            pad(factor, (0, rank - factor.shape[1])).detach().cpu()
            for factor in (delta.right_KR, delta.left_DR)
        )
        tensors[f"base_model.model.{module}.lora_A.weight"] = right_KR.T.clone().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = left_DR.clone().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.hf.name_or_path,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(low_rank),
        "fan_in_fan_out": model.family.transposed,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(
        tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
