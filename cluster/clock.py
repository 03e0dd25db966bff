"""Time as a process sees it; a simulation gives another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Clock:
    """Seconds of a clock that never goes back, pauses, and what is done again and again."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def every(self, seconds: float, call: Callable[[], bool]) -> Callable[[], None]:
        """Call again and again until it answers False; returns what ends that, once it rests."""
        stop = threading.Event()

        def repeat() -> None:
            while not stop.wait(seconds) and call():
                pass

        thread = threading.Thread(target=repeat, name=f"every {seconds:g} s", daemon=True)
        thread.start()

        def end() -> None:
            stop.set()
            thread.join()

        return end


REAL = Clock()
