"""GE counted by a process of its own, and what happens when one of the two ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rome.scoring.apart import EntropyProcess, entropies_beside
from rome.scoring.text_metrics import entropies

TEXTS = [["Rome is a city. It isn't small.", "a b a b"], ["", "é\ud800 \n ok"], ["one"]]


def test_the_numbers_are_those_of_this_process() -> None:
    beside = EntropyProcess()
    first, second = beside(TEXTS), beside(TEXTS[:1])
    assert second.result() == entropies(TEXTS[:1]).result()
    assert first.result() == entropies(TEXTS).result()
    assert beside([]).result() == []


def test_a_cpu_is_not_given_one_more_process() -> None:
    assert entropies_beside(torch.device("cpu")) is entropies


def test_texts_are_counted_here_if_the_process_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    beside = EntropyProcess()
    assert beside(TEXTS).result()
    beside.process.kill()
    beside.process.wait()
    for texts in (TEXTS, TEXTS[1:]):
        assert beside(texts).result() == entropies(texts).result()
    assert caplog.text.count("it is counted here now") == 1


def test_answers_that_are_not_those_of_the_texts_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as after a line that another library prints when Python starts."""
    (tmp_path / "sitecustomize.py").write_text("print('[1.5]')")
    monkeypatch.syspath_prepend(str(tmp_path))
    beside = EntropyProcess()
    for texts in (TEXTS, TEXTS[:1], TEXTS[1:]):
        assert beside(texts).result() == entropies(texts).result()


def test_it_ends_with_a_worker_that_is_killed() -> None:
    program = (
        "from rome.scoring.apart import EntropyProcess; import time; beside = EntropyProcess();"
        "print(beside([['a b']]).result(), beside.process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as it:
        assert it.stdout is not None
        counter = int(it.stdout.readline().split()[-1])
        it.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while _runs(counter):
        assert time.monotonic() < deadline, f"process {counter} outlived its worker"
        time.sleep(0.1)


def test_it_ends_with_the_object() -> None:
    beside = EntropyProcess()
    process = beside.process
    assert beside(TEXTS).result()
    del beside
    assert process.wait(20) == -signal.SIGKILL


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that ended and has no parent to be told is still in the table.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
