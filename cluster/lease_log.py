"""What a worker logs of a lease, kept in the run's store where something was wrong with it."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from cluster.grid import Lease
from cluster.store import Store
from cluster.words import redacted

LOGS = "_log"
"""The folder of the logs in the store of the parts, where no reader of parts looks."""
_MOST = 200_000
"""Characters of one log; what is more is left out in its middle."""

_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def log_of(lease: Lease) -> str:
    """The name of a lease's log."""
    return f"{lease.part.removesuffix('.parquet')}.attempt-{lease.attempt}.log"


def process() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(_FORMAT.format(record))


@contextmanager
def kept_log(store: Store, name: str) -> Iterator[None]:
    """Keep what the block logs as a warning or worse, tracebacks too, as a log in the store."""
    kept, root = _Kept(), logging.getLogger()
    root.addHandler(kept)
    try:
        yield
    finally:
        root.removeHandler(kept)
        if kept.lines:
            write(store, name, "\n".join(kept.lines))


def write(store: Store, name: str, text: str) -> None:
    """Commit a log. A store that fails now has said so, or will, to who needs it for rows."""
    if len(text) > _MOST:
        text = f"{text[: _MOST // 2]}\n[...]\n{text[-_MOST // 2 :]}"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    data = redacted(f"{now} on {process()}\n{text}\n").encode(errors="backslashreplace")
    with suppress(OSError):
        store.sub(LOGS).write_bytes(name, data)


def stacks() -> str:
    """Where each thread of this process is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    )
