"""Hooks that are gone when a block ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Run the block with hooks that were just registered, and remove them at its end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
