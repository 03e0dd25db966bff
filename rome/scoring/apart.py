"""GE in a process of its own: nltk takes ten milliseconds a record, in which a GPU would wait."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from rome.scoring import text_metrics
from rome.scoring.text_metrics import Entropies

if TYPE_CHECKING:  # The process that counts does without.
    import torch

log = logging.getLogger(__name__)


def entropies_beside(device: torch.device) -> Entropies:
    """Choose who counts GE while a model works on `device`: this process if that is the CPU."""
    return text_metrics.entropies if device.type == "cpu" else EntropyProcess()


class EntropyProcess:
    """`text_metrics.entropies` by a process that ends when this one does, however it ends.

    A line of JSON with the texts goes in, one with the numbers comes out. No process can be forked
    once CUDA runs, and those that multiprocessing spawns import the program that started this one.
    """

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # An interrupt on the terminal is for the run.
        )
        self._turns, self._failed = ThreadPoolExecutor(1), False
        weakref.finalize(self, _end, self.process)

    def __call__(self, texts: Sequence[Sequence[str]]) -> Future[list[float]]:
        return self._turns.submit(self._count, texts)

    def _count(self, texts: Sequence[Sequence[str]]) -> list[float]:
        if self._failed:
            return text_metrics.entropies(texts).result()
        asked, answered = self.process.stdin, self.process.stdout
        assert asked is not None
        assert answered is not None
        try:
            print(json.dumps(texts), file=asked, flush=True)
            numbers: list[float] = json.loads(answered.readline())
            if len(numbers) != len(texts):
                raise ValueError(f"asked for {len(texts)} numbers, got {len(numbers)}")
        except (OSError, ValueError, TypeError) as error:
            # An answer that comes late would be taken for the next one.
            self.process.kill()
            self._failed = True
            log.warning("the process that counts GE failed; it is counted here now", exc_info=error)
            return text_metrics.entropies(texts).result()
        return numbers


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(text_metrics.entropies(json.loads(line)).result()), flush=True)
