"""The faults: each breaks a run somewhere, says how often it did, and leaves it finished."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from cluster.store import Store
from tests.programs.chaos_nodes import Nodes
from tests.programs.chaos_task import GROUP, SHARDS, Spec, write_records
from tests.support.commands import program
from tests.support.in_words import in_words

LIMIT = 300


@dataclass
class Scene:
    """One run under one fault: its cluster, its spec, its luck, and what its drivers said."""

    nodes: Nodes
    spec: Spec
    luck: random.Random
    environment: dict[str, str]
    said: str = ""
    poison: dict[int, str] = field(default_factory=dict)
    """Case ids that must end as dead letters, and what their errors say."""
    task: ClassVar[str] = "tests.programs.chaos_task"

    def prepare(self) -> None:
        write_records(self.spec)

    def judge(self) -> Verdict:
        return judge(self)

    def driver(self, **changes: Any) -> AbstractContextManager[subprocess.Popen[str]]:
        """A driver in a process of its own, killed at the end if it still runs."""
        environment = self.environment | {"RAY_ADDRESS": self.nodes.address}
        return program(self.task, self.spec.changed(**changes).dump(), environment)

    def finish(self, process: subprocess.Popen[str], status: int = 0) -> dict[str, Any]:
        """What a driver answers that must end with a status."""
        output, said = process.communicate(timeout=LIMIT)
        self.said += said
        assert process.returncode == status, (process.returncode, said[-3000:])
        # Ray prints lines of its own.
        answers = [line for line in output.splitlines() if line.startswith("{")]
        outcome: dict[str, Any] = json.loads(answers[-1]) if answers else {}
        return outcome

    def run_on(self, **changes: Any) -> dict[str, Any]:
        """The same line again, to the end."""
        with self.driver(**changes) as process:
            return self.finish(process)

    @property
    def results(self) -> Store:
        return Store(self.spec.root).sub("results")

    def parts(self) -> list[str]:
        return self.results.list(f"{GROUP}/", ".parquet")

    def wait_for_parts(self, share: float, process: subprocess.Popen[str]) -> None:
        """Until a share of all leases is done."""
        number = share * self.spec.records / 16
        wait_for(lambda: len(self.parts()) >= number or process.poll() is not None)
        assert process.poll() is None, "it ended too early"

    def workers(self) -> list[int]:
        """The processes that do leases now."""
        pids = (int(path.name.rpartition("-")[2]) for path in Path(self.spec.log).glob("runs-*"))
        return [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    def kill_a_worker(self) -> None:
        wait_for(lambda: bool(self.workers()))
        os.kill(self.luck.choice(self.workers()), signal.SIGKILL)

    def some_cases(self, number: int) -> list[int]:
        return self.luck.sample(range(self.spec.records // 10, self.spec.records * 9 // 10), number)

    def with_bad(self, how: str, number: int, error: str | None = None) -> Spec:
        """Records that go wrong; with `error`, they must become dead letters that say so."""
        cases = self.some_cases(number)
        if error is not None:
            self.poison |= dict.fromkeys(cases, error)
        return self.spec.changed(bad={**self.spec.bad, **{str(case): how for case in cases}})


def wait_for(condition: Callable[[], bool], seconds: float = LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@dataclass(frozen=True)
class Verdict:
    lost: int
    duplicated: int
    attempts: int
    """Most runs of one record."""


def judge(scene: Scene) -> Verdict:
    """Count what is in the store; rows and errors must be right."""
    rows = [row for name in scene.parts() for row in scene.results.read_table(name).to_pylist()]
    counts = Counter(row["case_id"] for row in rows)
    for row in rows:
        if row["error"] is None:
            assert row["value"] == (3 * row["case_id"]) ** 2, row
        else:
            assert scene.poison.get(row["case_id"], "innocent") in row["error"], row
    errors = {row["case_id"] for row in rows if row["error"] is not None}
    assert errors == scene.poison.keys(), (errors, scene.poison)
    runs = Counter(
        line for log in Path(scene.spec.log).glob("runs-*") for line in log.read_text().split()
    )
    return Verdict(
        lost=len(set(range(scene.spec.records)) - counts.keys()),
        duplicated=len(rows) - len(counts),
        attempts=max(runs.values()),
    )


Fault = Callable[[Scene], int]


def worker_killed(scene: Scene) -> int:
    with scene.driver() as process:
        scene.wait_for_parts(scene.luck.uniform(0.2, 0.7), process)
        scene.kill_a_worker()
        scene.finish(process)
    return 1


def workers_killed_in_a_row(scene: Scene) -> int:
    with scene.driver() as process:
        for i in range(6):
            scene.wait_for_parts(0.1 + 0.1 * i, process)
            scene.kill_a_worker()
        scene.finish(process)
    return 6


def worker_killed_after_its_commit(scene: Scene) -> int:
    (case,) = scene.some_cases(1)
    scene.run_on(dies_after=case)
    assert (Path(scene.spec.log) / "died").exists()
    return 1


def worker_stopped(scene: Scene) -> int:
    """As by a debugger or a frozen machine: it keeps its leases and says nothing."""
    with scene.driver() as process:
        scene.wait_for_parts(scene.luck.uniform(0.2, 0.6), process)
        os.kill(scene.luck.choice(scene.workers()), signal.SIGSTOP)
        scene.finish(process)
    return 1


def node_removed(scene: Scene) -> int:
    with scene.driver() as process:
        scene.wait_for_parts(scene.luck.uniform(0.2, 0.6), process)
        scene.nodes.power_off(scene.luck.choice(scene.nodes.nodes))
        scene.finish(process)
    # No record is blamed: no lease was split.
    assert not [name for name in scene.parts() if scene.results.read_table(name).num_rows == 1]
    scene.nodes.add()
    return 1


def node_removed_and_another_added(scene: Scene) -> int:
    scene.spec = scene.spec.changed(settings={"workers": "auto"}, seconds=0.008)
    with scene.driver() as process:
        scene.wait_for_parts(scene.luck.uniform(0.1, 0.3), process)
        scene.nodes.power_off(scene.luck.choice(scene.nodes.nodes))
        new = scene.nodes.add()
        wait_for(
            lambda: (
                bool(scene.nodes.workers_of(new) & set(scene.workers()))
                or process.poll() is not None
            )
        )
        assert process.poll() is None, "the new node did no work"
        scene.finish(process)
    return 1


def node_drained(scene: Scene) -> int:
    scene.spec = scene.spec.changed(seconds=0.006)
    with scene.driver() as process:
        scene.wait_for_parts(scene.luck.uniform(0.1, 0.3), process)
        node = scene.luck.choice(scene.nodes.nodes)
        scene.nodes.drain(node, seconds=30)
        wait_for(lambda: not scene.nodes.workers_of(node) & set(scene.workers()))
        scene.nodes.power_off(node)
        scene.finish(process)
    assert "will be taken away" in scene.said
    scene.nodes.add()
    return 1


def driver_killed(scene: Scene) -> int:
    for share in (scene.luck.uniform(0.1, 0.3), scene.luck.uniform(0.4, 0.7)):
        with scene.driver() as process:
            scene.wait_for_parts(share, process)
            process.kill()
    scene.run_on()
    return 2


def driver_stopped(scene: Scene) -> int:
    for number, share in ((signal.SIGINT, 0.2), (signal.SIGTERM, 0.5)):
        with scene.driver() as process:
            scene.wait_for_parts(share, process)
            process.send_signal(number)
            began = time.monotonic()
            assert scene.finish(process, status=130)["stopped"]
            assert time.monotonic() - began < 30
    scene.run_on()
    return 2


def head_and_driver_killed(scene: Scene) -> int:
    # Workers that are still at it when the next driver has begun: late writers.
    scene.spec = scene.with_bad("once slow", 3)
    with scene.driver() as process:
        wait_for(lambda: any(Path(scene.spec.log).glob("once-*")))
        scene.nodes.kill_head()
        process.kill()
    scene.nodes.new_head(nodes=2)
    scene.run_on()
    time.sleep(5)
    return 1


def two_drivers(scene: Scene) -> int:
    with scene.driver() as first:
        scene.wait_for_parts(scene.luck.uniform(0.1, 0.3), first)
        with scene.driver() as second:
            scene.finish(second, status=1)
        assert f"has a driver already: process {first.pid} on " in scene.said
        first.kill()
    scene.run_on()  # Takes the dead driver's lock over.
    return 2


def records_raise(scene: Scene) -> int:
    scene.spec = scene.with_bad("raise", 3, error="is bad")
    scene.run_on()
    return 3


def records_segfault(scene: Scene) -> int:
    scene.spec = scene.with_bad("segfault", 2, error="its worker process has died")
    scene.run_on()
    return 2


def records_hang(scene: Scene) -> int:
    scene.spec = scene.with_bad("hang", 2, error="no result within 1 s")
    scene.run_on(settings={"record_seconds": 1})
    return 2


def dead_letters_retried(scene: Scene) -> int:
    healthy, scene.spec = scene.spec, scene.with_bad("raise", 4, error="is bad")
    assert len(scene.run_on()["dead"]) == 4
    scene.spec, scene.poison = healthy, {}
    assert scene.run_on(settings={"retry_dead": True})["dead"] == []
    return 4


def weights_not_restored(scene: Scene) -> int:
    scene.spec = scene.with_bad("once dirty", 3)
    scene.run_on()
    return 3


def parts_damaged(scene: Scene) -> int:
    """A truncated and an empty part, a half-written one, and one of something else."""
    with scene.driver() as process:
        scene.wait_for_parts(0.5, process)
        process.kill()
    truncated, empty = scene.luck.sample(scene.parts(), 2)
    scene.results.write_bytes(truncated, scene.results.read_bytes(truncated)[:-30])
    scene.results.write_bytes(empty, b"")
    scene.results.write_bytes(f"{GROUP}/.tmp-half", b"PAR1")
    foreign = f"{GROUP}/part-00000-900000-900016.parquet"
    scene.results.write_table(foreign, pa.table({"x": [1]}))
    with scene.driver() as process:
        scene.finish(process, status=1)
    assert f"{foreign} has no column case_id" in scene.said
    scene.results.delete(foreign)
    scene.run_on()
    assert "a damaged part is now" in scene.said
    return 4


def records_damaged(scene: Scene) -> int:
    """A truncated shard of records, at the start and in the middle of a run."""
    name = f"records/shard-{scene.luck.randrange(SHARDS):05d}.parquet"
    store = Store(scene.spec.root)
    whole = store.read_bytes(name)
    store.write_bytes(name, whole[: len(whole) // 2])
    with scene.driver() as process:
        scene.finish(process, status=1)
    assert f"{name} is not a whole Parquet file" in scene.said
    store.write_bytes(name, whole)
    last = f"records/shard-{SHARDS - 1:05d}.parquet"  # Which no worker has read yet.
    whole = store.read_bytes(last)
    with scene.driver(settings={"store_seconds": 3}) as process:
        scene.wait_for_parts(0.3, process)
        store.write_bytes(last, whole[: len(whole) // 2])
        scene.finish(process, status=1)
    assert "The store has failed for 3 s: cluster.store.DamagedError: " in scene.said
    assert f"{last} is not a whole Parquet file" in scene.said
    store.write_bytes(last, whole)
    scene.run_on()
    return 2


def records_out_of_sight(scene: Scene) -> int:
    """Shards that no worker has read yet are not to be seen for some seconds, as on a share."""
    folder = Path(scene.spec.root) / "records"
    last = folder / f"shard-{SHARDS - 1:05d}.parquet"
    with scene.driver() as process:
        scene.wait_for_parts(scene.luck.uniform(0.1, 0.3), process)
        hidden = last.rename(folder / "_elsewhere")
        threading.Timer(scene.luck.uniform(8, 12), hidden.rename, (last,)).start()
        scene.finish(process)
    assert "The store fails; trying for" in scene.said
    return 1


def records_lost(scene: Scene) -> int:
    """The same shard is gone for good, until somebody restores it."""
    last = Path(scene.spec.root) / f"records/shard-{SHARDS - 1:05d}.parquet"
    with scene.driver(settings={"store_seconds": 3}) as process:
        scene.wait_for_parts(0.3, process)
        whole = last.read_bytes()
        last.unlink()
        scene.finish(process, status=1)
    assert "The store has failed for 3 s" in scene.said
    last.write_bytes(whole)
    scene.run_on()
    return 1


def lock_damaged(scene: Scene) -> int:
    with scene.driver() as process:
        scene.wait_for_parts(0.2, process)
        process.kill()
    scene.results.write_bytes("_driver.json", b'{"host": "')
    scene.run_on()
    return 1


def disk_full(scene: Scene) -> int:
    """The store is a small disk of its own (see chaos.py); something else fills it."""
    ballast = Path(scene.spec.root) / "ballast"
    free = os.statvfs(scene.spec.root).f_bavail * 4096
    ballast.write_bytes(bytes(free - 600_000))
    with scene.driver() as process:
        wait_for(lambda: os.statvfs(scene.spec.root).f_bavail < 3)
        # As if somebody made room in time.
        threading.Timer(8, ballast.unlink).start()
        scene.finish(process)
    assert "The store fails; trying for" in scene.said
    assert "No space left on device" in scene.said
    return 1


def disk_stays_full(scene: Scene) -> int:
    ballast = Path(scene.spec.root) / "ballast"
    free = os.statvfs(scene.spec.root).f_bavail * 4096
    ballast.write_bytes(bytes(free - 600_000))
    with scene.driver(settings={"store_seconds": 5}) as process:
        scene.finish(process, status=1)
    assert "The store has failed for 5 s" in scene.said
    ballast.unlink()
    scene.run_on()
    return 1


def records_out_of_memory(scene: Scene) -> int:
    """Ray's memory monitor ends the worker whose record takes all memory (see chaos.py)."""
    scene.spec = scene.with_bad("memory", 1, error="OutOfMemoryError")
    scene.run_on()
    return 1


FAULTS: dict[str, Fault] = in_words(
    worker_killed,
    workers_killed_in_a_row,
    worker_killed_after_its_commit,
    worker_stopped,
    node_removed,
    node_removed_and_another_added,
    node_drained,
    driver_killed,
    driver_stopped,
    head_and_driver_killed,
    two_drivers,
    records_raise,
    records_segfault,
    records_hang,
    records_out_of_memory,
    dead_letters_retried,
    weights_not_restored,
    parts_damaged,
    records_damaged,
    records_out_of_sight,
    records_lost,
    lock_damaged,
    disk_full,
    disk_stays_full,
)
