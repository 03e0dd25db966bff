"""Runs on a real Ray whose workers and drivers are killed: nothing lost, nothing twice."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.calls import once, stream
from cluster.driver import RunError
from cluster.grid import Lease
from cluster.joining import number_of_workers
from cluster.lock import LOCK_NAME, LockedError, RunLock
from cluster.nodes import workers_that_fit
from cluster.progress import Progress, Rate
from cluster.run import run
from cluster.settings import RunSettings
from cluster.store import Store
from cluster.worker import Worker
from tests.support.commands import program
from tests.support.fake_task import GRID, GROUPS, FakeTask, FakeWork, drive

TWO = RunSettings(workers=2, num_cpus=0.5, record_seconds=60)
ONE_GROUP = GROUPS[:1]
CASES = [case_id for shard in GRID.shards for case_id in shard]

pytestmark = pytest.mark.usefixtures("ray_address")


def rows(folder: Path, group: str = GROUPS[0]) -> dict[int, dict[str, Any]]:
    """The rows of a group by case id; a row that is there twice fails the test."""
    store = Store(folder / "results")
    tables = [store.read_table(name) for name in store.list(f"{group}/")]
    found = [row for table in tables for row in table.to_pylist()]
    assert len({row["case_id"] for row in found}) == len(found)
    return {row["case_id"]: row for row in found}


def times_run(folder: Path, case_id: int, group: str = GROUPS[0]) -> int:
    return len((folder / "log" / f"{group}-{case_id}").read_text().splitlines())


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def squares(cases: list[int]) -> dict[int, int]:
    return {case_id: case_id**2 for case_id in cases}


def test_all_rows_whatever_the_number_of_workers_and_nothing_the_second_time(
    tmp_path: Path,
) -> None:
    for name, settings in (
        ("two", TWO),
        ("three", RunSettings(workers=3, num_cpus=1, in_flight=1)),
    ):
        outcome = drive(tmp_path / name, settings)
        assert (outcome.done, outcome.total, outcome.dead) == (2 * len(CASES), 2 * len(CASES), [])
        assert (outcome.duplicates, outcome.stopped) == (0, False)
    for group in GROUPS:
        assert rows(tmp_path / "two", group) == rows(tmp_path / "three", group)
        assert {i: row["square"] for i, row in rows(tmp_path / "two", group).items()} == squares(
            CASES
        )
    started = time.monotonic()
    again = drive(tmp_path / "two", TWO)
    assert time.monotonic() - started < 3
    assert again.done == 2 * len(CASES)
    assert {times_run(tmp_path / "two", case_id) for case_id in CASES} == {1}


def test_a_killed_worker_loses_and_duplicates_nothing(tmp_path: Path) -> None:
    pids = tmp_path / "log" / "pids"
    killed = []

    def kill_one() -> None:
        wait_for(lambda: len(list((tmp_path / "results").rglob("part-*"))) > 3)
        killed.append(int(pids.read_text().split()[0]))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    outcome = drive(tmp_path, TWO, seconds=0.2)
    killer.join()
    assert len(pids.read_text().split()) == 3
    assert (outcome.done, outcome.dead, outcome.duplicates) == (2 * len(CASES), [], 0)
    for group in GROUPS:
        assert {i: row["square"] for i, row in rows(tmp_path, group).items()} == squares(CASES)


def test_prometheus_can_read_what_the_run_did(tmp_path: Path) -> None:
    drive(tmp_path, TWO, {101: "raise"}, groups=ONE_GROUP)
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    run = f'run="{tmp_path}/results"'

    def lines(name: str) -> list[str]:
        with urllib.request.urlopen(address, timeout=5) as answer:
            text = answer.read().decode()
        return [line for line in text.splitlines() if line.startswith(name) and run in line]

    def value(name: str) -> float:
        return sum(float(line.split()[-1]) for line in lines(name))

    # Ray exports every ten seconds.
    wait_for(lambda: value("ray_rome_records_done_total") == len(CASES))
    assert value("ray_rome_records_failed_total") == 1
    assert value("ray_rome_records_retried_total") == 4 + 2
    assert value("ray_rome_bytes_written_total") > 1000
    stages = {line.split('stage="')[1].split('"')[0] for line in lines("ray_rome_stage_seconds")}
    assert stages == {"boot", "run", "verify", "commit"}
    assert lines("ray_rome_workers_ready")


def test_bad_records_get_a_row_and_their_neighbours_are_fine(tmp_path: Path) -> None:
    bad = {
        101: "raise",
        103: "row",
        110: "segfault",
        115: "hang",
        118: "unpicklable",
    }
    settings = RunSettings(workers=3, num_cpus=0.5, max_attempts=2, record_seconds=2)
    outcome = drive(tmp_path, settings, bad, groups=ONE_GROUP)
    found = rows(tmp_path)
    assert sorted(found) == CASES
    good = [case_id for case_id in CASES if case_id not in bad]
    assert {i: row["square"] for i, row in found.items() if i not in bad} == squares(good)
    errors = {case_id: error for _, case_id, error in outcome.dead}
    assert sorted(errors) == sorted(bad)
    assert errors == {case_id: found[case_id]["error"] for case_id in bad}
    assert re.search(r"KeyError: 'case 101 is bad' \(fake_task.py:\d+\)", errors[101])
    assert errors[103] == "no such subject"
    assert "its worker process has died" in errors[110]
    assert errors[115].startswith("no result within 2 s")
    assert "LocalError: odd" in errors[118]
    # Once with its neighbours, if none of them ended the worker before, then twice alone. Idle
    # workers may have copied the leases that hung, and those behind them.
    assert {times_run(tmp_path, case_id) for case_id in (101, 110, 118)} <= {2, 3, 4}
    assert times_run(tmp_path, 115) in (3, 4, 5)
    assert found[110]["attempts"] == 2

    # A repaired run does the dead letters again when asked, and only then.
    assert len(drive(tmp_path, TWO, groups=ONE_GROUP).dead) == len(bad)
    again = drive(tmp_path, RunSettings(workers=1, retry_dead=True), groups=ONE_GROUP)
    assert (again.dead, again.duplicates, again.done) == ([], 0, len(CASES))
    assert {i: row["square"] for i, row in rows(tmp_path).items()} == squares(CASES)
    assert times_run(tmp_path, 100) <= 2


def test_a_worker_whose_state_changed_commits_nothing_more_and_is_replaced(tmp_path: Path) -> None:
    outcome = drive(tmp_path, RunSettings(workers=1), {104: "dirty once"}, groups=ONE_GROUP)
    assert (outcome.done, outcome.dead, outcome.duplicates) == (len(CASES), [], 0)
    assert len((tmp_path / "log" / "pids").read_text().split()) == 2
    # The lease of the change was dropped whole; its records were done again, alone.
    assert [times_run(tmp_path, case_id) for case_id in (104, 105, 106, 107)] == [2] * 4
    assert not (tmp_path / "results" / GROUPS[0] / "part-00000-000004-000008.parquet").exists()


def test_a_worker_with_another_model_ends_the_run_and_shows_the_difference(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="fingerprint: the run has 'f00', the worker has 'bad'"):
        drive(tmp_path, TWO, fingerprint="bad")
    assert Store(tmp_path).list("results/") == []
    assert drive(tmp_path, TWO, groups=ONE_GROUP).done == len(CASES)


def test_a_task_that_cannot_be_built_ends_the_run_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.driver.BOOT_FAILURES", 2)
    (tmp_path / "log" / "pids").mkdir(parents=True)  # So the task cannot write its file.
    with pytest.raises(RunError, match=r"No worker boots.*IsADirectoryError.*log/pids"):
        drive(tmp_path, RunSettings(workers=1))


def test_no_more_workers_boot_at_once_than_may(tmp_path: Path) -> None:
    class Slow(FakeWork):
        def task(self) -> FakeTask:
            with open(self.log / "boots", "a") as file:
                file.write("begun\n")
                file.flush()
                time.sleep(1)
                file.write("done\n")
            return super().task()

    log = tmp_path / "log"
    log.mkdir()
    settings = RunSettings(workers=3, num_cpus=0.5, boots_at_once=1)
    store = Store(tmp_path / "results")
    outcome = run(store, GROUPS, GRID, Slow(log, seconds=0.2), settings)
    assert outcome.done == 2 * len(GRID)
    assert (log / "boots").read_text().splitlines() == ["begun", "done"] * 3


def test_a_node_that_does_not_see_the_run_directory_says_so(tmp_path: Path) -> None:
    worker = Worker(FakeWork(tmp_path), Store(tmp_path / "other"), GRID, RunSettings(), "a run")
    assert "must share the run directory" in (worker.boot().failure or "")
    assert worker.work(Lease(GROUPS[0], 0, 0, 4)).blame == "worker"


def test_a_task_that_leaves_a_record_out_commits_nothing(tmp_path: Path) -> None:
    class Forgetful(FakeWork):
        def task(self) -> FakeTask:
            task = super().task()
            task.run = lambda lease: FakeTask.run(task, lease).slice(1)  # type: ignore[method-assign]
            return task

    store = Store(tmp_path / "results")
    store.write_bytes(LOCK_NAME, b"")
    worker = Worker(Forgetful(tmp_path), store, GRID, RunSettings(), "a run")
    assert worker.boot().failure is None
    report = worker.work(Lease(GROUPS[0], 0, 0, 4))
    assert "expected [100, 101, 102, 103], got [101, 102, 103]" in (report.failure or "")
    assert store.list() == []


def driver_process(folder: Path, address: str) -> AbstractContextManager[subprocess.Popen[str]]:
    environment = {**os.environ, "RAY_ADDRESS": address}
    return program("tests.support.fake_task", str(folder), environment)


def parts(folder: Path) -> set[Path]:
    return set((folder / "results").rglob("part-*.parquet"))


def test_a_killed_driver_is_refused_no_second_and_resumed(tmp_path: Path, ray_address: str) -> None:
    with driver_process(tmp_path, ray_address) as first:
        wait_for(lambda: len(parts(tmp_path)) > 3)
        with pytest.raises(LockedError, match=rf"process {first.pid} on .*fake_task\.py"):
            drive(tmp_path, TWO)
        first.kill()
        first.wait()
    before = {path: path.stat().st_mtime_ns for path in parts(tmp_path)}
    assert 3 < len(before) < 20
    with driver_process(tmp_path, ray_address) as second:
        output, errors = second.communicate(timeout=90)
    assert output.split() == [str(2 * len(CASES)), str(2 * len(CASES)), "0", "False"]
    assert "rows/s" in errors
    for group in GROUPS:
        assert {i: row["square"] for i, row in rows(tmp_path, group).items()} == squares(CASES)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_sigterm_ends_a_driver_after_its_leases_in_flight(tmp_path: Path, ray_address: str) -> None:
    with driver_process(tmp_path, ray_address) as process:
        wait_for(lambda: len(parts(tmp_path)) > 2)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
    done, _, duplicates, stopped = output.split()
    assert (duplicates, stopped) == ("0", "True")
    assert int(done) == sum(len(rows(tmp_path, group)) for group in GROUPS) < 2 * len(CASES)
    assert "The same command resumes" in errors
    assert not (tmp_path / "results" / LOCK_NAME).exists()


def test_the_lock_of_a_dead_driver_is_taken_over_and_the_old_holder_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with RunLock(store, beat=0.1) as old:
        with pytest.raises(LockedError, match=f"process {os.getpid()} "):
            RunLock(store, beat=0.1).__enter__()
        # As if it hung for longer than a dead driver is waited for.
        old._end()
        with RunLock(store, beat=0.1) as new:
            assert new.taken_by is None
            assert not old._keep()
            assert old.taken_by is not None
    assert not store.exists(LOCK_NAME)


def test_the_bar_moves_before_the_first_lease_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("progress.LOG_SECONDS", "driver.LOOK_SECONDS", "told.EVERY_SECONDS"):
        monkeypatch.setattr(f"cluster.{limit}", 0.1)
    one = RunSettings(workers=1, num_cpus=0.5, in_flight=1)
    slow = dict.fromkeys(CASES[1:3], "slow")
    assert drive(tmp_path, one, slow, groups=ONE_GROUP).done == len(CASES)
    lines = capsys.readouterr().err.splitlines()
    within = [line for line in lines if f" 2/{len(CASES)}, " in line]
    assert within, lines
    assert "first records" in within[0]
    shown = [int(found[1]) for line in lines if (found := re.search(r"(\d+)/37", line))]
    assert (shown, shown[-1]) == (sorted(shown), len(CASES))


def test_results_are_shown_twice_on_the_way_of_a_run_that_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter(["few", "more"])
    short = Progress(30, 0, so_far=lambda: "not yet")
    for done in range(31):
        short.update(done, 0, 2, 2)
    monkeypatch.setattr("cluster.progress.LOG_SECONDS", 0.0)
    progress = Progress(30, 0, so_far=lambda: next(looks))
    for done in (0, 5, 10, 12, 21, 30):
        progress.update(done, 0, 2, 2, under_way=4)
    said = capsys.readouterr().err
    assert "not yet" not in said
    assert said.index("10 of 30 rows so far:\nfew") < said.index("21 of 30 rows so far:\nmore")
    progress.update(28, 0, 2, 2, under_way=4)  # Of a lease that another worker has done.
    assert "30/30" in progress.line()
    Progress(30, 0, json_of="run", so_far=lambda: "a table").update(20, 0, 2, 2)
    Progress(30, 0, so_far=lambda: [""][1]).update(20, 0, 2, 2)
    said = capsys.readouterr().err
    assert "a table" not in said
    assert "the rows so far cannot be shown: list index out of range" in said


def test_the_rate_is_recent_and_ignores_what_was_done_before() -> None:
    rate = Rate(window=3)
    rate.add(0.0, 5000)
    assert rate.per_second(1.0) == 0.0
    rate.add(10.0, 5010)
    assert rate.per_second(10.0) == 1.0
    rate.add(20.0, 5110)
    rate.add(30.0, 5210)
    assert rate.per_second(30.0) == 10.0
    assert rate.per_second(50.0) == 5.0


def test_workers_are_no_more_than_a_node_has_memory_for() -> None:
    fits = workers_that_fit(RunSettings(num_cpus=0.5))
    assert fits == 8
    assert workers_that_fit(RunSettings(num_cpus=0.5, memory_gib=1e6)) == 1
    node = ray.nodes()[0]["Resources"]["memory"] / 2**30
    assert workers_that_fit(RunSettings(num_cpus=0.5, memory_gib=node / 3)) == 3


ON_A_GPU = """
import sys
from pathlib import Path
import ray
from cluster.run import run
from cluster.settings import RunSettings
from cluster.store import Store
from tests.support.fake_task import GRID, GROUPS, FakeWork

# A GPU that Ray hands out, and that no driver is asked for.
ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
folder, num_gpus = Path(sys.argv[1]), eval(sys.argv[2])
(folder / "log").mkdir(parents=True)
store = Store(folder / "results")
outcome = run(
    store, GROUPS[:1], GRID, FakeWork(folder / "log"),
    RunSettings(num_gpus=num_gpus, workers=eval(sys.argv[4])),
    {"fingerprint": "f00", "cuda": sys.argv[3]}, gpu_rows=20,
)
assert outcome.done == outcome.total == len(GRID), outcome
print(len(store.list(f"{GROUPS[0]}/part-")))
"""


@pytest.mark.parametrize(
    ("num_gpus", "sees", "parts", "workers"),
    [("None", "0", 5, "'auto'"), ("0", "", 10, "'auto'"), ("1", "0", 10, "3"), ("1", "0", 5, "1")],
)
def test_workers_take_a_gpu_where_the_cluster_has_some(
    tmp_path: Path, num_gpus: str, sees: str, parts: int, workers: str
) -> None:
    """And longer leases then: 22 and 15 records are 5 of up to 8, which is four for a worker and
    a multiple of 4, instead of 10 of up to 4. Whoever asks for more workers than have room reads
    how many those are."""
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU, str(tmp_path), num_gpus, sees, workers],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )
    assert done.stdout == f"{parts}\n", done.stderr
    each = "1" if sees else "0"
    assert f"Each worker has {each} of the cluster's 1 GPUs (workers.num_gpus)." in done.stderr
    lacks = "There is room for 1 of 3 workers, each with workers.num_cpus=1 and workers.num_gpus=1"
    assert (lacks in done.stderr) == (workers == "3"), done.stderr


@pytest.mark.parametrize("needs", [{"num_gpus": 1.0}, {"num_cpus": 64.0}])
def test_a_worker_that_this_machine_cannot_hold_is_refused_at_once(
    tmp_path: Path, needs: dict[str, float]
) -> None:
    settings = RunSettings(**needs)  # type: ignore[arg-type]
    began = time.monotonic()
    for begin in (
        lambda: once(os.getpid, settings=settings),
        lambda: next(stream(range, 3, settings=settings)),
        lambda: drive(tmp_path, settings),
        lambda: number_of_workers(settings),
    ):
        with pytest.raises(ValueError, match=r"the most are 4 CPUs and 0 GPUs.*workers.num_gpus=0"):
            begin()
    assert time.monotonic() - began < 10


ON_A_CLUSTER = """
import os, threading, time
import ray
from ray.cluster_utils import Cluster
from cluster.calls import once
from cluster.settings import RunSettings
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
os.environ["RAY_ADDRESS"] = cluster.address
def seven():
    return 7
answers = []
asked = threading.Thread(
    target=lambda: answers.append(once(seven, settings=RunSettings(num_gpus=1))), daemon=True
)
asked.start()
asked.join(14)
assert not answers
cluster.add_node(num_cpus=1, num_gpus=1)
asked.join(60)
print(answers, flush=True)
ray.shutdown()
cluster.shutdown()
"""


def test_on_a_cluster_a_command_says_what_node_it_waits_for(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_A_CLUSTER],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        timeout=120,
    )
    assert done.stdout.splitlines()[-1:] == ["[7]"], done.stderr
    assert "waiting for a node to join: a worker takes workers.num_cpus=1" in done.stderr
    assert "the most are 1 CPUs and 0 GPUs" in done.stderr


def test_the_time_left_is_of_what_each_editor_takes() -> None:
    """Ten quick rows of one editor are done, ten slow ones of another are not."""
    progress = Progress(20, 0, left={"b=x/editor=none": 10, "b=x/editor=rome%20a": 10})
    progress.update(0, 0, 0, 2)
    assert "2 workers load the model" in progress.line()
    progress.update(0, 0, 2, 2)
    assert "first records" in progress.line()
    assert progress.seconds_left(time.monotonic()) is None
    for _ in range(10):
        progress.finished("b=x/editor=none", 1, 0.5)
    progress.finished("b=x/editor=rome%20a", 1, 30.0)
    progress.update(11, 0, 2, 2)
    assert progress.seconds_left(time.monotonic()) == pytest.approx(9 * 30 / 2)
    assert "0:02:15 left" in progress.line()
