"""No traceback is lost: what a worker logs of a lease that failed lies in the run's store."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.driver import RunError
from cluster.grid import Lease
from cluster.lease_log import LOGS, kept_log, log_of
from cluster.lock import RunLock
from cluster.run import run
from cluster.settings import RunSettings
from cluster.store import Store, StoreError
from cluster.worker import time_limit
from jobs.runs import manifests
from jobs.runs.parts import hive_path
from tests.support.commands import command
from tests.support.fake_task import GRID, FakeWork

GROUP = hive_path(benchmark="b", model="m", editor="rome")


@pytest.fixture
def failed_run(tmp_path: Path) -> Store:
    """A run of which one record raises whenever it is done."""
    store = Store(tmp_path)
    total = sum(map(len, GRID.shards))
    manifest = {"name": "a run", "records": total, "editors": ["rome"]}
    store.write_bytes("manifest.json", json.dumps(manifest).encode())
    log = tmp_path / "log"
    log.mkdir()
    work = FakeWork(log / "_", {101: "raise"})
    (log / "_" / GROUP).parent.mkdir(parents=True)
    grid = replace(GRID, origin=manifests.origin(manifest))
    outcome = run(store.sub("results"), [GROUP], grid, work, RunSettings(workers=0))
    assert [case_id for _, case_id, _ in outcome.dead] == [101]
    return store


def test_each_attempt_has_its_traceback_and_leases_that_went_well_have_no_log(
    failed_run: Store,
) -> None:
    logs = failed_run.sub("results").sub(LOGS)
    attempts = [log_of(Lease(GROUP, 0, 1, 2, attempt)) for attempt in (1, 2, 3)]
    assert logs.list() == sorted([log_of(Lease(GROUP, 0, 0, 4)), *attempts])
    for name in attempts:
        text = logs.read_bytes(name).decode()
        assert "Traceback (most recent call last)" in text
        assert "KeyError: 'case 101 is bad'" in text
        assert "fake_task.py" in text
    # Readers of parts see none of it.
    assert not [name for name in failed_run.list("results/") if "log" in name]


def test_status_shows_what_failed(failed_run: Store) -> None:
    assert "Traceback" not in command("status", failed_run.uri)[1]
    status, text = command("status", failed_run.uri, "--failed")
    assert status == 0
    assert "dead letter: rome case 101: KeyError: 'case 101 is bad'" in text
    assert text.count("Traceback (most recent call last)") == 4


def test_a_log_keeps_warnings_of_its_block_and_hides_what_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET", "do-not-tell-this")
    store = Store(tmp_path)
    logging.getLogger("x").warning("before")
    with kept_log(store, "a.log"):
        logging.getLogger("x").info("all is well")
        logging.getLogger("x").warning("it is do-not-tell-this")
    logging.getLogger("x").warning("after")
    with kept_log(store, "b.log"):
        pass
    assert store.sub(LOGS).list() == ["a.log"]
    text = store.sub(LOGS).read_bytes("a.log").decode()
    assert "it is ***" in text
    assert not [word for word in ("before", "after", "well", "tell") if word in text]


def test_what_hangs_says_where(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with time_limit(0.1, store, "hang.log"):
        time.sleep(0.6)
    text = store.sub(LOGS).read_bytes("hang.log").decode()
    assert "not done within 0.1 s" in text
    assert "test_what_hangs_says_where" in text


class _NoDelete(Store):
    def delete(self, name: str) -> None:
        raise StoreError("it cannot be reached")


def test_a_lock_that_cannot_be_left_does_not_hide_why_the_run_ended(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the model is another"), RunLock(_NoDelete(tmp_path)):
        raise RunError("the model is another")
    with RunLock(_NoDelete(tmp_path)):
        pass


def test_a_log_of_a_store_that_fails_is_no_error(tmp_path: Path) -> None:
    (tmp_path / LOGS).write_text("a file in the way")
    with kept_log(Store(tmp_path), "a.log"):
        logging.getLogger("x").warning("lost")
    assert os.listdir(tmp_path) == [LOGS]
