"""An editable model, its tokens, and what fits into memory."""

from rome.models.editable import EditableModel, checksum
from rome.models.families import UnsupportedModelError
from rome.models.loading import DTYPES, load, outline, use_precision

__all__ = [
    "DTYPES",
    "EditableModel",
    "UnsupportedModelError",
    "checksum",
    "load",
    "outline",
    "use_precision",
]
