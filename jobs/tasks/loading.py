"""The model of a run, loaded where it is asked for."""

import os

import torch

from cluster.settings import RunSettings
from jobs.runs.config import ModelConfig
from rome import models
from rome.models import EditableModel, memory
from rome.models.files import local_copy


def token_budget(model: EditableModel, given: int | None, settings: RunSettings) -> int:
    """Tokens of a forward pass: those given, or what suits this worker's share of a device."""
    return given or memory.token_budget(model, min(settings.num_gpus or 1, 1))


def load_model(config: ModelConfig) -> EditableModel:
    """Load a config's model; `device: auto` is all GPUs that this process sees, else the CPU.

    Raises ValueError where it was given GPUs that torch does not see: it would be slow, silently.
    """
    device: str = config.device
    if device == "auto" and torch.cuda.device_count() < 2:
        device = one_device(device)
    models.use_precision(config.dtype)  # This process computes with this model only.
    source = local_copy(config.source) if config.local_copy else config.source
    return models.load(source, config.dtype, device, config.name)


def one_device(device: str) -> str:
    """The GPU of this process in the place of `auto`, or the CPU. Raises as `load_model`."""
    gpus, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if device != "auto":
        return device
    if given and not given.startswith("-") and not gpus:
        raise ValueError(
            f"torch {torch.__version__} must see the GPUs that this worker has "
            f"(CUDA_VISIBLE_DEVICES={given}), and sees none: install torch for CUDA, or take "
            "the CPUs with --set workers.num_gpus=0 (CUDA_VISIBLE_DEVICES=-1 without Ray)"
        )
    return "cuda" if gpus else "cpu"


def model_fingerprint(config: ModelConfig) -> str:
    return load_model(config).fingerprint()
