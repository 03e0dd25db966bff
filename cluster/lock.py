"""One driver per run directory, on any store.

The lock saves wasted work and makes counts plain; it does not guard the results, since part names
come from the grid alone. So it can be simple: a file that its holder rewrites every few seconds.
Whether a holder lives is seen from the file changing, not from clocks, which differ between hosts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import socket
import sys
import uuid
from datetime import UTC, datetime
from typing import Any

from cluster.clock import REAL, Clock
from cluster.store import Store
from cluster.words import redacted

LOCK_NAME = "_driver.json"


class LockedError(RuntimeError):
    """Another driver works in the run directory."""


class RunLock:
    """Hold the lock of a run directory for the length of a `with` block.

    beat: seconds between two rewrites of the lock file. A holder that misses four is dead, one on
    this host whose process is gone is dead at once; the lock of a dead holder is taken over.
    Raises LockedError naming the holder while it lives.
    """

    def __init__(self, store: Store, beat: float = 2.0, clock: Clock = REAL) -> None:
        self._store, self._beat, self._clock = store, beat, clock
        self._holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": redacted(shlex.join(sys.argv)),
            "token": uuid.uuid4().hex,
        }
        self._count = 0
        self.taken_by: str | None = None
        """Who took the lock away from this driver, which must then stop."""

    def __enter__(self) -> RunLock:
        if (other := self._read()) is not None and self._lives(other):
            self._refuse(other)
        self._write(0)
        # Of two drivers that come at once, the last to write wins, and the first must see it.
        self._clock.sleep(self._beat / 6)
        if (other := self._read()) is not None and other["token"] != self._holder["token"]:
            self._refuse(other)
        self._end = self._clock.every(self._beat, self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        if self.taken_by is None:
            with contextlib.suppress(OSError):  # A lock left behind is that of a dead driver.
                self._store.delete(LOCK_NAME)

    def _keep(self) -> bool:
        """Rewrite the lock; False if another driver has taken it."""
        self._count += 1
        # A store that is out of reach for a while must not end the driver.
        with contextlib.suppress(OSError):
            other = self._read()
            if other is not None and other["token"] != self._holder["token"]:
                self.taken_by = _name(other)
                return False
            self._write(self._count)
        return True

    def _write(self, count: int) -> None:
        text = json.dumps({**self._holder, "beat": count}, indent=1)
        self._store.write_bytes(LOCK_NAME, text.encode())

    def _read(self) -> dict[str, Any] | None:
        try:
            data = self._store.read_bytes(LOCK_NAME)
        except FileNotFoundError:
            return None
        try:
            holder: dict[str, Any] = json.loads(data)
            if holder.keys() >= self._holder.keys():
                return holder
        except (ValueError, AttributeError, RecursionError):
            pass
        # Somebody's file that says nothing of use: alive if it changes, as every other.
        return dict.fromkeys(self._holder, "unknown") | {"token": hashlib.sha256(data).hexdigest()}

    def _lives(self, other: dict[str, Any]) -> bool:
        if other["host"] == self._holder["host"] and not _process_exists(other["pid"]):
            return False
        deadline = self._clock.now() + 4 * self._beat
        while self._clock.now() < deadline:
            self._clock.sleep(self._beat / 6)
            now = self._read()
            if now is None:
                return False
            if now != other:
                return True
        return False

    def _refuse(self, other: dict[str, Any]) -> None:
        raise LockedError(
            f"{self._store.uri} has a driver already: {_name(other)}. "
            "Wait for it or stop it; the same command then goes on where it ended."
        )


def _name(holder: dict[str, Any]) -> str:
    return (
        f"process {holder['pid']} on {holder['host']} since {holder['since']}: {holder['command']}"
    )


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError, TypeError):  # One too large is of another kind of host.
        return True
    return True
