"""Simulated runs: the real driver, lease table, lock, worker and manifest in a world of faults.

`Simulation(seed).finish()` makes a world with a choice of faults, begins a run in it, begins it
again whenever it has ended before all was done, and checks on the way and at the end that

- a row that a driver has counted stays (a reader finds it, or another of its record without an
  error), and any row gives way only to a dead letter of its record;
- the driver counts nothing as done that is not in the store;
- each record has one row for a reader at the end, with the right value, of the manifest's config;
- an error is a record's only if the record is bad, or its worker was struck while doing it alone as
  often as `max_attempts` says;
- no record is done more often than its faults explain;
- the run ends: once the faults are over, a few more starts finish it.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from typing import Any
from unittest.mock import patch

import pyarrow as pa

from cluster import index
from cluster.clock import Clock
from cluster.crew import Lost
from cluster.driver import Driver, RunError
from cluster.grid import Grid, Lease
from cluster.lock import LockedError, RunLock
from cluster.metrics import Metrics
from cluster.progress import Progress
from cluster.queue import NODE_LOSSES, LeaseTable, read_parts
from cluster.run import Outcome, dead_rows, finish
from cluster.settings import RunSettings
from cluster.store import Store
from cluster.worker import Booted, Report, Worker
from jobs.runs import manifests
from jobs.runs.manifests import MANIFEST
from tests.support.simulation import Disk, Pause, Process, SimulatedStore, TableBytes, World

RESULTS = "results/"
QUIET = 60.0
"""Faults are over by then."""
STARTS = 8
"""A run must end within so many starts after the faults."""
EVENTS = 200_000
"""A world in which more happens turns in circles."""
BAD = {
    "raise": "records raise",
    "kill": "records kill",
    "hang": "records hang",
    "refused": "records are refused",
}
FAULTS = (
    "workers die",
    "nodes die",
    "nodes join",
    "nodes drain",
    "nodes are cut off",
    "workers stop",
    "workers are slow",
    "drivers die",
    "drivers die at an operation",
    "workers die at an operation",
    "drivers stop",
    "drivers are signalled",
    "two drivers",
    "another config",
    "clocks jump",
    "the store's clock jumps",
    "the store fails",
    "the store is down",
    "writes lie",
    "writes are slow",
    "files are late",
    "files are torn",
    "parts damaged",
    "records out of sight",
    *BAD.values(),
    "weights not restored",
    "workers do not boot",
    "retries",
)

LATE = {
    "nodes are cut off",
    "drivers die",
    "drivers die at an operation",
    "drivers stop",
    "two drivers",
    "clocks jump",
    "the store fails",
    "the store is down",
    "writes lie",
    "writes are slow",
    "files are late",
    "files are torn",
    "parts damaged",
}
"""Faults after which a row may be there twice, since somebody writes late or is not seen to."""


class ViolationError(AssertionError):
    """What must never happen has happened."""


@dataclass(frozen=True)
class Call:
    """A lease that a worker was asked for, or its boot (None)."""

    number: int
    lease: Lease | None


@dataclass
class Hand:
    """A simulated worker: its process and what it was asked for."""

    process: Process
    driver: Process
    calls: deque[Call] = field(default_factory=deque)
    given: list[Lease] = field(default_factory=list)
    """Leases without a report, oldest first."""
    wake: Callable[[], None] | None = None
    slowness: float = 1.0
    node_lost: bool = False


class SimulatedCrew:
    """Workers of one driver, which hears of them by a mailbox."""

    def __init__(
        self, run: Simulation, process: Process, grid: Grid, settings: RunSettings, config: str
    ) -> None:
        self._config = config
        self.clock: Clock = process
        self._run, self._process, self._grid, self._settings = run, process, grid, settings
        self._mail: list[tuple[Call, Booted | Report | Lost]] = []
        self._wake: Callable[[], None] | None = None

    def _post(self, call: Call, answer: Booted | Report | Lost, seconds: float) -> None:
        def arrive() -> None:
            self._mail.append((call, answer))
            if self._wake is not None:
                self._wake()

        self._run.world.at(seconds, arrive)

    def start(self) -> tuple[Hand, Call]:
        run = self._run
        self._process.ensure_alive()
        number = run.number()
        busy = Counter(hand.process.node for hand in run.hands if hand.process.alive)
        there = [node for node in run.nodes if node not in run.draining] or run.nodes or ["nowhere"]
        node = min(there, key=lambda name: (busy[name], name))
        hand = Hand(Process(run.world, f"worker {number}", node), self._process)
        hand.slowness = run.luck.uniform(5, 60) if run.strikes("workers are slow", 0.2) else 1.0
        if run.strikes("workers die at an operation", 0.3):
            hand.process.dies_at = run.luck.randrange(1, 40)
        run.hands.append(hand)
        boot = Call(run.number(), None)
        hand.calls.append(boot)

        def died(why: str) -> None:
            node_lost = why.startswith("its node")
            hand.node_lost = node_lost
            run.struck(hand, node_lost)
            seconds = run.luck.uniform(1, 20) if node_lost else run.luck.uniform(0.01, 0.5)
            for call in hand.calls:
                self._post(call, Lost(why, node_lost), seconds)

        hand.process.on_death = died
        hand.process.start(lambda: self._serve(hand))
        return hand, boot

    def _serve(self, hand: Hand) -> None:
        run, process = self._run, hand.process
        process.sleep(run.luck.uniform(0.5, 3))
        worker = SimulatedWorker(run, hand, self._grid, self._settings, self._config)
        while True:
            while not hand.calls:
                self._sleep(hand)
            call = hand.calls[0]
            if call.lease is None:
                answer: Booted | Report = worker.boot()
            else:
                answer = worker.work(call.lease)
            hand.calls.popleft()
            if isinstance(answer, Report):
                assert call.lease is not None
                hand.given.remove(call.lease)
                run.reported(self._process, call.lease, answer)
                run.world.tell(process.name, f"reports {answer.failure or 'done'}")
            if process.node not in run.cut_off:
                self._post(call, answer, run.luck.uniform(0.001, 0.05))

    def _sleep(self, hand: Hand) -> None:
        hand.wake = self._pause(hand.process)
        hand.process.wait()
        hand.wake = None

    @staticmethod
    def _pause(process: Process) -> Callable[[], None]:
        pause = Pause(process)
        return lambda: process.world.at(0, pause.resume)

    def work(self, worker: Hand, lease: Lease) -> Call:
        self._process.ensure_alive()
        call = Call(self._run.number(), lease)
        self._run.world.tell(
            self._process.name, lambda: f"{lease.part} {lease.attempt} to {worker.process.name}"
        )
        if worker.process.node in self._run.cut_off:
            self._post(call, Lost("its node is out of reach", True), self._run.luck.uniform(1, 20))
            return call
        if not worker.process.alive:
            if lease.rows == 1:
                self._run.hits.update(self._run.keys_of(lease))
            self._post(call, Lost("it is dead", worker.node_lost), 0.1)
            return call
        worker.calls.append(call)
        worker.given.append(lease)
        if worker.wake is not None:
            worker.wake()
        return call

    def told(self, leases: Iterable[Lease]) -> dict[Lease, float]:
        return {}

    def answers(
        self, calls: Collection[Call], seconds: float
    ) -> Iterator[tuple[Call, Booted | Report | Lost]]:
        if not self._there(calls):
            self._wake = self._pause(self._process)
            self._process.world.at(seconds, self._wake)
            self._process.wait()
            self._wake = None
        there = self._there(calls)
        self._mail = [mail for mail in self._mail if mail not in there]
        yield from there

    def _there(self, calls: Collection[Call]) -> list[tuple[Call, Booted | Report | Lost]]:
        return [(call, answer) for call, answer in self._mail if call in calls]

    def end(self, worker: Hand) -> None:
        if self._process.alive and worker.process.node not in self._run.cut_off:
            worker.process.kill("its driver ends it")

    def fits(self) -> int:
        return 2 * len(self._run.nodes)

    def lacking(self) -> str:
        return "there is no node"

    def draining(self) -> set[str]:
        return set(self._run.draining)


class SimulatedWorker(Worker):
    """The real worker, whose limits of time and node are simulated."""

    def __init__(
        self, run: Simulation, hand: Hand, grid: Grid, settings: RunSettings, config: str
    ) -> None:
        process, store = hand.process, run.store(hand.process)
        work = SimulatedWork(run, hand, store, grid, config)
        super().__init__(work, store.sub("results"), grid, settings, "simulated", process)
        self._process = process

    @contextmanager
    def _limit(self, seconds: float, name: str) -> Iterator[None]:
        over = False

        def fire() -> None:
            if over or not self._process.alive:
                return
            rest = self._process.stopped_until - self._process.world.now
            if rest > 0:  # Its watchdog is stopped, too.
                self._process.world.at(rest, fire)
            else:
                self._process.kill("it took too long")

        self._process.world.at(seconds, fire)
        try:
            yield
        finally:
            over = True

    def _log(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()  # Logs guard nothing.

    def _node(self) -> str:
        return self._process.node


@dataclass
class SimulatedWork:
    """A run's work and, since none of it has to be sent anywhere, its task.

    A row's value is that of its record, in its group.
    """

    run_: Simulation
    hand: Hand
    store: Store
    grid: Grid
    config: str
    dirty: bool = False
    shard: tuple[int, dict[int, int]] = (-1, {})

    def task(self) -> SimulatedWork:
        if self.run_.strikes("workers do not boot", 0.2):
            raise ValueError("simulated failure to boot")
        return self

    def describe(self) -> dict[str, Any]:
        return {"config": self.config}

    def verify(self) -> None:
        if self.dirty:
            raise RuntimeError("simulated: the weights are not what they were")

    def run(self, lease: Lease) -> pa.Table:
        run, process = self.run_, self.hand.process
        if self.shard[0] != lease.shard:
            table = self.store.read_table(f"records/shard-{lease.shard:05d}.parquet")
            values = zip(table["case_id"].to_pylist(), table["value"].to_pylist(), strict=True)
            self.shard = lease.shard, dict(values)
        rows = []
        for case_id in self.grid.ids(lease):
            run.begun(self.hand, lease, case_id)
            process.sleep(run.pace * self.hand.slowness * run.luck.uniform(0.5, 1.5))
            error, how = None, run.bad.get((lease.group, case_id))
            if how is not None:
                run.strokes[BAD[how]] += 1
            match how:
                case "raise":
                    raise KeyError(f"case {case_id} is bad")
                case "kill":
                    process.kill(f"case {case_id} kills it")
                    process.sleep(0)
                case "hang":
                    process.sleep(1e6)
                case "refused":
                    error = f"case {case_id} is bad"
            if run.strikes("weights not restored", 0.01):
                self.dirty = True
                run.struck(self.hand)
            value = self.shard[1][case_id] + (self.config == "b")
            rows.append((case_id, None if error else value, error))
        return run.table(lease.group, rows)

    def dead_row(self, lease: Lease, error: str) -> pa.Table:
        (case_id,) = self.grid.ids(lease)
        return self.run_.table(lease.group, [(case_id, None, error)])


class Told(Progress):
    """Tells the world what a driver says, and looks at what it counts."""

    def __init__(self, run: Simulation, process: Process, table: LeaseTable) -> None:
        self._run, self._process, self._table = run, process, table
        self._done = -1

    def update(
        self, done: int, dead: int, ready: int, workers: int, under_way: float = 0.0
    ) -> None:
        if done != self._done:
            self._run.check_done(self._table)
        self._done = done

    def finished(self, group: str, rows: int, seconds: float) -> None: ...

    def note(self, text: str, **fields: Any) -> None:
        self._run.world.tell(self._process.name, text)


class Unread(Metrics):
    """Metrics that nobody reads."""

    def __init__(self) -> None:
        pass

    def finished(self, records: int, failed: int, written: int) -> None: ...

    def stages(self, seconds: object) -> None: ...

    def retried(self, records: int) -> None: ...

    def lost(self) -> None: ...

    def copied(self) -> None: ...

    def now(self, **numbers: int) -> None: ...


class Simulation:
    """One seed: a world, its faults, a run and what is known of it that no process knows."""

    def __init__(self, seed: int, tells: bool = False) -> None:
        self.world = World(seed, tells)
        self.luck = luck = self.world.luck
        # Some faults together, each seed others: all at once would hide each other.
        share = luck.choice((0.1, 0.3, 0.3))
        self.faults = {fault for fault in FAULTS if luck.random() < share}
        self.quiet = False
        self._numbers = 0
        self.disk = Disk(self.world)
        self.strokes = self.disk.strokes
        self.disk.watch, self.disk.prompt = self._watch, MANIFEST
        self.groups = [f"editor={name}" for name in ("a", "b")[: luck.choice((1, 1, 2))]]
        sizes = [luck.randrange(1, 12) for _ in range(luck.randrange(1, 4))]
        ids = iter(range(100, 200))
        self.shards = tuple(tuple(next(ids) for _ in range(size)) for size in sizes)
        self.keys = [(g, i) for g in self.groups for shard in self.shards for i in shard]
        self.pace = luck.choice((0.05, 0.3, 1.0))
        self.nodes = [f"node {i}" for i in range(luck.randrange(1, 4))]
        self.draining: list[str] = []
        self.cut_off: list[str] = []
        self.hands: list[Hand] = []
        self.drivers: list[Process] = []
        self.stops: dict[str, Event] = {}
        self.outcomes: list[Outcome] = []
        self.refused = 0
        self.bad: dict[tuple[str, int], str] = {}
        self.damaged: set[tuple[str, int]] = set()
        self.counted: set[tuple[str, int]] = set()
        """Rows without an error that a driver has counted."""
        self.hits: Counter[tuple[str, int]] = Counter()
        self.runs: Counter[tuple[str, str, int]] = Counter()
        self.excuses: Counter[tuple[str, str, int]] = Counter()
        self.starts_left = STARTS
        self.doubled = 0
        """Rows beyond one for each record at the end."""
        self.retried = False
        self._attempts = luck.choice((1, 2, 3))
        self._prepare()

    # What happens.

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    def strikes(self, fault: str, share: float) -> bool:
        """Whether a fault that this seed has strikes now."""
        if self.quiet or fault not in self.faults or self.luck.random() >= share:
            return False
        self.strokes[fault] += 1
        return True

    def store(self, process: Process) -> SimulatedStore:
        return SimulatedStore(self.disk, process)

    def table(self, group: str, rows: list[tuple[int, int | None, str | None]]) -> pa.Table:
        ids, values, errors = zip(*rows, strict=True)
        return pa.table(
            {
                "case_id": pa.array(ids),
                "value": pa.array(values, pa.int64()),
                "error": pa.array(errors, pa.string()),
            }
        )

    def keys_of(self, lease: Lease) -> list[tuple[str, int]]:
        return [(lease.group, i) for i in self.shards[lease.shard][lease.start : lease.stop]]

    def value(self, case_id: int) -> int:
        return 7 * case_id

    def _prepare(self) -> None:
        luck, disk, node = self.luck, self.disk, "elsewhere"
        quiet = luck.uniform(3, min(QUIET, 10 + 2 * self.pace * len(self.keys)))
        for number, shard in enumerate(self.shards):
            table = pa.table({"case_id": shard, "value": [self.value(i) for i in shard]})
            disk.put(f"records/shard-{number:05d}.parquet", TableBytes.of(table), node)
        shares = {"failing": "the store fails", "lies": "writes lie", "slow": "writes are slow"}
        for attribute, fault in (
            shares | {"late": "files are late", "torn": "files are torn"}
        ).items():
            if fault in self.faults:
                setattr(disk, attribute, luck.uniform(0.02, 0.25))
        for how, fault in BAD.items():
            if fault in self.faults:
                for key in luck.sample(self.keys, min(luck.randrange(1, 3), len(self.keys))):
                    self.bad.setdefault(key, how)
        for fault, act in self._acts().items():
            if fault in self.faults:
                for _ in range(luck.randrange(1, 4)):
                    soon = luck.random() < 0.2  # When a run begins, much happens at once.
                    self.world.at(luck.uniform(0, 2 if soon else quiet), self._once(fault, act))
        self.world.at(quiet, self._calm)
        self.world.at(0, self._operate)

    def _once(self, fault: str, act: Callable[[], object]) -> Callable[[], None]:
        def strike() -> None:
            if not self.quiet:
                self.strokes[fault] += 1
                act()

        return strike

    def _calm(self) -> None:
        """From now on nothing fails."""
        self.quiet = True
        disk = self.disk
        disk.failing = disk.lies = disk.slow = disk.late = disk.torn = 0.0
        self.draining.clear()
        self.cut_off.clear()
        for process in [*(hand.process for hand in self.hands), *self.drivers]:
            process.dies_at = None
        if not self.nodes:
            self._join()
        self.world.tell("world", "is quiet")

    def _operate(self) -> None:
        """Begin a driver where none lives and the run is not done; look again later."""
        if not any(driver.alive for driver in self.drivers):
            if self.quiet and not self._done():
                self.starts_left -= 1
                if self.starts_left < 0:
                    raise ViolationError(f"the run does not end: {STARTS} starts were not enough")
            if not self._done():
                self._drive(self._config() or "a")
        self.world.at(self.luck.uniform(0.5, 15), self._operate)

    def _config(self) -> str | None:
        """The config of the run, once it has a manifest."""
        if MANIFEST not in self.disk.files:
            return None
        return str(json.loads(self.disk.files[MANIFEST].content)["of"])

    def _done(self) -> bool:
        if not (self.quiet and self.outcomes):
            return False
        last = self.outcomes[-1]
        return last.done == last.total and not last.stopped

    def _settings(self, retry: bool) -> tuple[RunSettings, int]:
        luck = self.luck
        settings = RunSettings(
            workers=luck.choice(("auto", 1, 2, 3, 5)),
            max_attempts=self._attempts,
            in_flight=luck.choice((1, 2, 2, 4)),
            record_seconds=5 * self.pace + 1,
            store_seconds=luck.choice((2, 10, 30)),
            retry_dead=retry,
        )
        return settings, luck.randrange(1, 7)

    def _drive(self, config: str, retry: bool = False) -> None:
        luck = self.luck
        process = Process(self.world, f"driver {self.number()}", f"head {self.number()}")
        if self.strikes("drivers die at an operation", 0.5):
            process.dies_at = luck.randrange(1, 60)
        retry = retry or self.strikes("retries", 0.3)
        settings, rows = self._settings(retry)
        grid = Grid(self.shards, rows)
        self.drivers.append(process)
        stop = self.stops[process.name] = Event()
        store = self.store(process)
        work = SimulatedWork(self, Hand(process, process), store, grid, config)

        def died(why: str) -> None:
            survive = why == "killed" and luck.random() < 0.5
            for hand in self.hands:
                if hand.driver is process:
                    seconds = luck.uniform(0, 20) if survive else luck.uniform(0, 0.1)
                    self.world.at(seconds, partial(hand.process.kill, "its driver died"))

        process.on_death = died

        def drive(table: LeaseTable, lock: RunLock) -> bool:
            crew = SimulatedCrew(self, process, grid, settings, config)
            told = Told(self, process, table)
            write = dead_rows(store.sub("results"), grid, work)
            driver = Driver(table, grid, settings, crew, write, {"config": config}, told, Unread())
            return driver.drive(stop, lock)

        began = self.quiet

        def main() -> None:
            self.world.tell(process.name, f"begins with {config}, {rows} rows, {settings}")
            try:
                self._claim(store, config, process)
                outcome = finish(store.sub("results"), self.groups, grid, settings, drive, process)
                self._ended(outcome, began)
                self.world.tell(process.name, f"ends: {outcome}")
            except (LockedError, RunError, ValueError, OSError) as error:
                self.world.tell(process.name, f"ends: {type(error).__name__}: {error}")
            process.kill("its work is over")

        process.start(main)

    def _claim(self, store: Store, config: str, process: Process) -> None:
        """As jobs.evaluate does."""
        manifest = {"name": "run", "of": config}

        def refuse(there: dict[str, Any]) -> None:
            if there["of"] != config:
                self.refused += 1
                raise ValueError("the directory has another config")

        if store.exists(MANIFEST):
            refuse(manifests.read(store, manifest.keys()))
        else:
            manifests.claim(store, manifest, refuse, process)

    # Faults.

    def _acts(self) -> dict[str, Callable[[], object]]:
        return {
            "workers die": lambda: self._a_worker(lambda hand: hand.process.kill("killed")),
            "nodes die": self._node_dies,
            "nodes join": self._join,
            "nodes drain": self._drain,
            "nodes are cut off": self._cut_off,
            "workers stop": lambda: self._a_worker(lambda hand: self._stop(hand.process)),
            "drivers die": lambda: self._a_driver(lambda driver: driver.kill("killed")),
            "drivers stop": lambda: self._a_driver(self._stop),
            "drivers are signalled": lambda: self._a_driver(
                lambda driver: self.stops[driver.name].set()
            ),
            "two drivers": lambda: self._drive("a"),
            "another config": lambda: self._drive("b"),
            "clocks jump": self._jump,
            "the store's clock jumps": self._store_jumps,
            "the store is down": self._down,
            "parts damaged": self._damage,
            "records out of sight": self._hide,
        }

    def _a_worker(self, act: Callable[[Hand], object]) -> None:
        if alive := [hand for hand in self.hands if hand.process.alive]:
            act(self.luck.choice(alive))

    def _a_driver(self, act: Callable[[Process], object]) -> None:
        if alive := [driver for driver in self.drivers if driver.alive]:
            act(self.luck.choice(alive))

    def _stop(self, process: Process) -> None:
        seconds = self.luck.uniform(1, 40)
        self.world.tell(process.name, f"is stopped for {seconds:.1f} s")
        process.stopped_until = self.world.now + seconds

    def _node_dies(self) -> None:
        if len(self.nodes) > 1 or self.luck.random() < 0.3:
            node = self.luck.choice(self.nodes) if self.nodes else ""
            self.nodes = [name for name in self.nodes if name != node]
            self.world.tell(node, "dies")
            for hand in self.hands:
                if hand.process.node == node:
                    hand.process.kill("its node died")
            if not self.nodes:
                self.world.at(self.luck.uniform(1, 20), self._join)

    def _join(self) -> None:
        self.nodes.append(f"node {self.number()}")
        self.world.tell(self.nodes[-1], "joins")

    def _drain(self) -> None:
        if self.nodes:
            self.draining.append(self.luck.choice(self.nodes))

    def _cut_off(self) -> None:
        """A node that the driver cannot reach, whose workers go on and reach the store."""
        if not self.nodes:
            return
        node, seconds = self.luck.choice(self.nodes), self.luck.uniform(1, 25)
        self.world.tell(node, f"is cut off for {seconds:.1f} s")
        self.nodes.remove(node)
        self.cut_off.append(node)
        for hand in self.hands:
            if hand.process.node == node and hand.process.alive:
                hand.process.on_death("its node is out of reach")
                hand.process.on_death = lambda why: None

        def back() -> None:
            for hand in self.hands:
                if hand.process.node == node:
                    hand.process.kill("its node was given up")
            if node in self.cut_off:
                self.cut_off.remove(node)
            self._join()

        self.world.at(seconds, back)

    def _jump(self) -> None:
        everyone = [process for process in self.drivers if process.alive]
        everyone += [hand.process for hand in self.hands if hand.process.alive]
        if everyone:
            process = self.luck.choice(everyone)
            process.ahead += self.luck.choice((3.0, 60.0, 4000.0))
            self.world.tell(process.name, f"its clock jumps to {process.now():.0f}")
            for hand in self.hands:
                if process in (hand.driver, hand.process):
                    self.struck(hand)

    def _store_jumps(self) -> None:
        self.disk.ahead += self.luck.choice((-3600.0, -1.0, 1.0, 3600.0))

    def _down(self) -> None:
        self.disk.fails_until = self.world.now + self.luck.uniform(1, 20)
        self.world.tell("store", f"is down until {self.disk.fails_until:.1f}")

    def _hide(self) -> None:
        self.disk.hidden = "records/", self.world.now + self.luck.uniform(1, 15)
        self.world.tell("store", f"records are out of sight until {self.disk.hidden[1]:.1f}")

    def _damage(self) -> None:
        parts = [name for name in sorted(self.disk.files) if name.startswith(f"{RESULTS}editor=")]
        if parts:
            name = self.luck.choice(parts)
            self.damaged |= self._rows(name, self.disk.files[name].content).keys()
            self.disk.files[name].content = b"PA"
            self.world.tell("store", f"{name} is damaged")

    # What is known.

    def struck(self, hand: Hand, node_lost: bool = False) -> None:
        """A worker is hit: what it has begun, or has next, may be blamed for it, unless its node
        was lost."""
        for lease in hand.given:
            self.excuses.update((hand.driver.name, *key) for key in self.keys_of(lease))
        for lease in hand.given:
            keys = self.keys_of(lease)
            seen = self._visible(hand.driver.node)
            if lease.rows == 1 and not node_lost:
                self.hits.update(keys)
            if not seen.issuperset(keys):
                break

    def reported(self, driver: Process, lease: Lease, report: Report) -> None:
        if report.failure is not None:
            self.excuses.update((driver.name, *key) for key in self.keys_of(lease))

    def begun(self, hand: Hand, lease: Lease, case_id: int) -> None:
        key = (hand.driver.name, lease.group, case_id)
        self.runs[key] += 1
        most = 2 + self._attempts + NODE_LOSSES + self.excuses[key]
        if self.runs[key] > most:
            raise ViolationError(f"{key} is done {self.runs[key]} times, {most} are explained")

    def _rows(self, name: str, content: bytes | None) -> dict[tuple[str, int], str | None]:
        """What a part holds: its keys and their errors."""
        if not isinstance(content, TableBytes) or not name.startswith(f"{RESULTS}editor="):
            return {}
        group = name.removeprefix(RESULTS).rpartition("/")[0]
        return {(group, case_id): error for case_id, error in content.rows.items()}

    def _there(self) -> dict[tuple[str, int], str | None]:
        """Of all parts, as they are and not as somebody sees them."""
        found: dict[tuple[str, int], str | None] = {}
        for name, file in self.disk.files.items():
            for key, error in self._rows(name, file.content).items():
                if error is None or key not in found:
                    found[key] = error
        return found

    def _visible(self, node: str) -> set[tuple[str, int]]:
        found: set[tuple[str, int]] = set()
        for name in self.disk.files:
            if (file := self.disk.seen(name, node)) is not None:
                found |= self._rows(name, file.content).keys()
        return found

    def _watch(self, name: str, old: bytes | None, new: bytes | None) -> None:
        before, after = self._rows(name, old), self._rows(name, new)
        for key, error in before.items():
            if key not in after or (error is None and after[key] is not None):
                there = self._there()
                worse = error is None and there.get(key) is not None
                if key not in there or (worse and key in self.counted):
                    raise ViolationError(f"the row of {key} in {name} is lost")

    def check_done(self, table: LeaseTable) -> None:
        self.counted |= table.done - table.dead.keys()
        missing = table.done - self._there().keys() - self.damaged
        if missing:
            raise ViolationError(f"{sorted(missing)} count as done and are not in the store")

    def _ended(self, outcome: Outcome, began_quiet: bool) -> None:
        if began_quiet:
            self.outcomes.append(outcome)
        there = self._there()
        if outcome.done == outcome.total and set(self.keys) - there.keys() - self.damaged:
            raise ViolationError(f"{outcome} is called done, but the store has {len(there)} rows")

    def finish(self) -> None:
        """Let it all happen, and look at what is there at the end. Raises ViolationError."""
        try:
            with patch.object(index, "WORTHWHILE", 0):
                self._happen()
        finally:
            self.world.end()

    def _happen(self) -> None:
        self.world.run(self._over, EVENTS)
        if not self._over():
            raise ViolationError(f"the run does not end: {self.world.events} events")
        if self.luck.random() < 0.3 and "retries" in self.faults:
            self.bad.clear()
            self.outcomes.clear()
            self.hits.clear()
            self._drive(self._config() or "a", retry=True)
            self.retried = True
            for _ in range(self._attempts - 1):  # No record is to blame for so many.
                self.world.at(
                    self.luck.uniform(1, 5),
                    lambda: self._a_worker(lambda hand: hand.process.kill("killed")),
                )
            self.world.run(self._over, 2 * EVENTS)
            if not self._over():
                raise ViolationError("the retry does not end")
        self._judge()

    def _over(self) -> bool:
        return self._done() and not any(driver.alive for driver in self.drivers)

    def _judge(self) -> None:
        reader = Process(self.world, "reader", "elsewhere")
        store = self.store(reader).sub("results")
        self.disk.hidden, self.disk.fails_until = ("", 0.0), 0.0
        for file in self.disk.files.values():
            file.seen_at = file.torn_until = 0.0
        rows = {}
        names: list[str] = []

        def read() -> None:
            names.extend(store.list("editor=", ".parquet"))
            rows.update(read_parts(store, names).errors)

        reader.start(read)
        self.world.run(lambda: len(rows) > 0, self.world.events + 10_000)
        if rows.keys() != set(self.keys):
            raise ViolationError(f"rows are lost: {sorted(set(self.keys) ^ rows.keys())}")
        doubled = -len(rows)
        for name in names:
            content = self.disk.files[RESULTS + name].content
            if not isinstance(content, TableBytes):
                continue  # Damaged while the last driver did not see it; its rows are elsewhere.
            doubled += content.table.num_rows
            for row in content.table.to_pylist():
                value = self.value(row["case_id"]) + (self._config() == "b")
                if row["error"] is None and row["value"] != value:
                    raise ViolationError(f"{name} has a wrong row: {row}")
        self.doubled = doubled
        if doubled and not LATE.intersection(self.strokes):
            raise ViolationError(f"{doubled} rows are there twice, and nobody wrote late")
        for key, error in rows.items():
            if error is not None and key not in self.bad and self.hits[key] < self._attempts:
                raise ViolationError(
                    f"{key} is innocent, was struck {self.hits[key]} times, and has: {error}"
                )
            if error is None and key in self.bad and not self.retried:
                raise ViolationError(f"{key} is bad and has no error")
