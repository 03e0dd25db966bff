"""The model of a run, loaded where it is asked for."""

import torch

from jobs.runs.config import ModelConfig
from rome import models
from rome.models import EditableModel


def load_model(config: ModelConfig) -> EditableModel:
    """Load a config's model; `device: auto` is all GPUs that this process sees, else the CPU."""
    device = config.device
    if device == "auto" and (gpus := torch.cuda.device_count()) < 2:
        device = "cuda" if gpus else "cpu"
    models.use_precision(config.dtype)  # This process computes with this model only.
    return models.load(config.source, config.dtype, device, config.name)
