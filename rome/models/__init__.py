"""An editable model, its tokens, and what fits into memory."""

from rome.models.editable import DTYPES, EditableModel, checksum, load, outline, use_precision
from rome.models.families import UnsupportedModelError

__all__ = [
    "DTYPES",
    "EditableModel",
    "UnsupportedModelError",
    "checksum",
    "load",
    "outline",
    "use_precision",
]
