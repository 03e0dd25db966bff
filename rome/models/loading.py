"""Load a model in the precision that is asked for, or its outline without weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rome.models.editable import EditableModel
from rome.models.files import transformers_path

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
}


def use_precision(dtype: str) -> None:
    """Let a GPU round products of float32 to ten bits in this process, if `dtype` is `tf32`."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")


def load(source: str, dtype: str, device: str = "cpu", name: str | None = None) -> EditableModel:
    """Load a model from a hub id, a local folder, a GGUF file or a packaged GGUF.

    `source`: `gpt2-xl`, `/models/llama`, `model.gguf` or `package:NAME/FILE.gguf` (a file inside an
    installed package). `dtype`: one of DTYPES, never chosen by the checkpoint; `tf32` is float32
    for a process that called `use_precision`.
    `device`: as torch names it, or `auto`: layer by layer over all GPUs that this process sees.
    Weights are memory-mapped from safetensors, so workers on one node share their pages.
    Raises UnsupportedModelError, or ValueError for an unknown dtype, a missing file, or a model
    that does not fit into the GPUs.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got '{dtype}'")
    path = transformers_path(source)
    hf: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=DTYPES[dtype],
        trust_remote_code=False,
        use_safetensors=True,
        device_map="auto" if device == "auto" else None,
    )
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if device != "auto":
        hf.to(torch.device(device))
    elif {parameter.device.type for parameter in hf.parameters()} != {"cuda"}:
        raise ValueError(
            f"{name or source} must fit into the GPUs of its worker, but "
            f"{torch.cuda.device_count()} cannot hold all of it in {dtype}; give each worker more "
            "GPUs, or choose bfloat16"
        )
    return EditableModel(hf, tokenizer, name or source)


def outline(source: str, name: str | None = None) -> EditableModel:
    """A model of which only shapes, names and the tokenizer are real: its weights take no memory.

    For a driver on a small machine. Raises as `load` does.
    """
    path = transformers_path(source)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    return EditableModel(hf, AutoTokenizer.from_pretrained(path), name or source)
