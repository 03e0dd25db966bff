"""Sources of records and texts."""

from typing import Literal

SHARD_ROWS = 512
Separator = Literal["space", "none", "script"]
"""`script`: nothing after a prompt in a script that writes words without spaces, else a space."""
