"""The real scheduler in worlds of faults: no seed breaks a rule, a mistake does not go unseen."""

import os
import re
import subprocess
import sys

import pytest

from tests.programs.simulate import Seen, look
from tests.support.simulated_run import FAULTS


def test_no_seed_of_the_first_300_breaks_a_rule() -> None:
    seen = look(range(300))
    assert seen.violations == {}
    assert set(FAULTS) == set(seen.strokes), "a fault that never strikes proves nothing"


def test_a_seed_is_the_same_in_every_process() -> None:
    def told(hash_seed: str) -> str:
        command = [sys.executable, "-m", "tests.programs.simulate", "--seed", "7"]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # The real process and time are in words about a lock alone.
        return re.sub(r"process \d+ on \S+ since \S+:", "a process", done.stdout)

    once = told("1")
    assert "seed 7: no rule was broken" in once
    assert once.count("\n") > 30
    assert told("2") == once


@pytest.mark.parametrize(
    ("mistake", "rule"),
    [
        ("reported before the commit", "are not in the store"),
        ("newest lease blamed", "is innocent"),
        ("store blamed on records", "is innocent"),
        ("files that are missing blamed on records", "is innocent|does not end"),
        ("attempts without end", "times|does not end"),
    ],
)
def test_a_mistake_is_found_soon(mistake: str, rule: str) -> None:
    seen: Seen = look(range(100), mistake)
    (broken,) = seen.violations.values()
    assert re.search(rule, broken), broken
