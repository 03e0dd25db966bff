"""A world of processes, a clock and a disk in one thread, whose every move follows from a seed.

A process is a set of greenlets. It runs until it sleeps or touches the disk, and only there it can
be killed, be stopped, or see others act. Nothing here knows what the processes are for.
"""

from __future__ import annotations

import contextlib
import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
from greenlet import GreenletExit, getcurrent, greenlet

from cluster.clock import Clock
from cluster.store import DamagedError, MissingError, Stat, Store, StoreError

NEVER = 1e12


class Killed(GreenletExit):  # type: ignore[misc]
    """Raised in a process that is dead."""


class World:
    """Time, what will happen when, and what did (`said`, if `tells`)."""

    def __init__(self, seed: int, tells: bool = False) -> None:
        self.luck = random.Random(seed)
        self.now = 0.0
        self.events = 0
        self.said: list[str] = []
        self.tells = tells
        self.hub = getcurrent()
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._number = 0
        self._greenlets: list[greenlet] = []

    def tell(self, who: str, text: Callable[[], str] | str) -> None:
        if self.tells:
            self.said.append(
                f"{self.now:9.3f} {who:12} {text if isinstance(text, str) else text()}"
            )

    def at(self, seconds: float, call: Callable[[], object]) -> None:
        """Call after so many seconds."""
        self._number += 1
        heapq.heappush(self._queue, (self.now + seconds, self._number, call))

    def run(self, until: Callable[[], bool], most: int) -> None:
        """Let things happen until something is true, or at most so many."""
        while self._queue and self.events < most and not until():
            self.now, _, call = heapq.heappop(self._queue)
            self.events += 1
            call()

    def greenlet(self, function: Callable[[], object]) -> greenlet:
        made = greenlet(function, parent=self.hub)
        self._greenlets.append(made)
        return made

    def end(self) -> None:
        """End every process; none does anything more."""
        for each in self._greenlets:
            if each and not each.dead:
                each.throw(Killed)


class Pause:
    """A greenlet that waits, and is resumed once."""

    def __init__(self, process: Process) -> None:
        self.process, self.greenlet, self.over = process, getcurrent(), False

    def resume(self) -> None:
        process = self.process
        if self.over or not process.alive:
            return
        if process.stopped_until > process.world.now:
            process.world.at(process.stopped_until - process.world.now, self.resume)
            return
        self.over = True
        self.greenlet.switch()


class Process(Clock):
    """A process with a clock of its own. on_death is called once, when it dies."""

    def __init__(self, world: World, name: str, node: str) -> None:
        self.world, self.name, self.node = world, name, node
        self.alive = True
        self.stopped_until = 0.0
        self.ahead = 0.0
        """Seconds that its clock has jumped ahead."""
        self.operations = 0
        self.dies_at: int | None = None
        """Dies at its operation on the disk of that number."""
        self.on_death: Callable[[str], None] = lambda why: None

    def start(self, function: Callable[[], object]) -> None:
        def body() -> None:
            with contextlib.suppress(Killed):
                function()

        self.world.at(0, self._first(self.world.greenlet(body)))

    def _first(self, made: greenlet) -> Callable[[], None]:
        def begin() -> None:
            if self.alive:
                made.switch()

        return begin

    def kill(self, why: str) -> None:
        if not self.alive:
            return
        self.alive = False
        self.world.tell(self.name, lambda: f"dies: {why}")
        self.on_death(why)

    def ensure_alive(self) -> None:
        if not self.alive:
            raise Killed

    def wait(self) -> None:
        """Give the others their turn, until a Pause that was made before is resumed."""
        self.ensure_alive()
        self.world.hub.switch()
        self.ensure_alive()

    def now(self) -> float:
        return self.world.now + self.ahead

    def sleep(self, seconds: float) -> None:
        pause = Pause(self)
        self.world.at(seconds, pause.resume)
        self.wait()

    def every(self, seconds: float, call: Callable[[], bool]) -> Callable[[], None]:
        ended = busy = False

        def repeat() -> None:
            nonlocal busy
            while True:
                self.sleep(seconds)
                if ended:
                    return
                busy = True
                try:
                    if not call():
                        return
                finally:
                    busy = False

        def end() -> None:
            nonlocal ended
            ended = True
            while busy:
                self.sleep(0.01)

        self.start(repeat)
        return end


class TableBytes(bytes):
    """The bytes of a whole Parquet file, which stay a table: encoding one takes longer than all
    that a simulated run does with it."""

    table: pa.Table
    rows: dict[int, str | None]
    """Case ids and their errors, of a part."""

    @classmethod
    def of(cls, table: pa.Table) -> TableBytes:
        made = cls(b"PAR1")
        made.table = table
        if "error" in table.column_names:
            ids, errors = table["case_id"].to_pylist(), table["error"].to_pylist()
            made.rows = dict(zip(ids, errors, strict=True))
        return made


@dataclass
class File:
    """A file, and what those on other nodes than its writer's see until a time."""

    content: bytes
    written: float
    node: str
    seen_at: float = 0.0
    torn_until: float = 0.0


class Disk:
    """Files of all processes. watch is told of every file that is replaced or deleted."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.files: dict[str, File] = {}
        self.strokes: Counter[str] = Counter()
        """How often it failed, in which way."""
        self.ahead = 0.0
        self.fails_until = 0.0
        self.failing = 0.0
        """Share of operations that fail; all of them until `fails_until`."""
        self.lies = 0.0
        """Share of writes that are done though the writer hears of a failure."""
        self.slow = 0.0
        """Share of writes that take long, and are done though the writer dies meanwhile."""
        self.prompt = ""
        """The name of a file whose writes never take long, and are seen at once."""
        self.late = 0.0
        """Share of new files that others see late."""
        self.torn = 0.0
        """Share of files that others see half for a while."""
        self.hidden: tuple[str, float] = ("", 0.0)
        """A prefix of names that nobody sees until a time."""
        self.watch: Callable[[str, bytes | None, bytes | None], None] = lambda *_: None

    def put(self, name: str, content: bytes, node: str) -> None:
        luck, now, old = self.world.luck, self.world.now, self.files.get(name)
        file = File(content, now + self.ahead, node)
        # What replaces a file is seen at once, as S3 promises, and NFS to those who open it.
        if old is None and name != self.prompt and luck.random() < self.late:
            file.seen_at = now + luck.uniform(0.1, 12)
            self.strokes["files are late"] += 1
        if luck.random() < self.torn:
            file.torn_until = now + luck.uniform(0.01, 0.3)
            self.strokes["files are torn"] += 1
        self.files[name] = file
        self.watch(name, None if old is None else old.content, content)

    def remove(self, name: str) -> None:
        old = self.files.pop(name)
        self.watch(name, old.content, None)

    def seen(self, name: str, node: str) -> File | None:
        """What a node sees under a name."""
        prefix, until = self.hidden
        if prefix and self.world.now < until and name.startswith(prefix):
            return None
        file = self.files.get(name)
        if file is not None and file.node != node and self.world.now < file.seen_at:
            return None
        return file


def _size(content: bytes) -> int:
    return int(content.table.nbytes) if isinstance(content, TableBytes) else len(content)


class SimulatedStore(Store):
    """A Store of a process on a disk."""

    def __init__(self, disk: Disk, process: Process, root: str = "") -> None:
        object.__setattr__(self, "uri", f"sim://{root}")
        self.__dict__.update(disk=disk, process=process, root=root)

    def sub(self, path: str) -> Store:
        made = self.__dict__
        return SimulatedStore(made["disk"], made["process"], f"{made['root']}{path}/")

    def _begin(self, what: str, name: str) -> tuple[Disk, Process, str]:
        """Take the time of an operation, and fail as the disk fails."""
        disk, process = self.__dict__["disk"], self.__dict__["process"]
        process.ensure_alive()
        process.operations += 1
        dies = process.operations == process.dies_at
        if dies and disk.world.luck.random() < 0.5:
            process.kill(f"before its operation {process.operations}, {what} {name}")
        process.sleep(disk.world.luck.uniform(0.001, 0.02))
        if disk.world.now < disk.fails_until or disk.world.luck.random() < disk.failing:
            disk.strokes["the store fails"] += 1
            raise StoreError(f"simulated failure to {what} {name}")
        if dies and what not in ("write", "delete"):
            process.kill(f"in its operation {process.operations}, {what} {name}")
            process.sleep(0)
        return disk, process, self.__dict__["root"] + name

    def _done(self, process: Process, disk: Disk, what: str, name: str) -> None:
        if process.operations == process.dies_at:
            process.kill(f"after its operation {process.operations}, {what} {name}")
        process.sleep(0.001)
        if disk.world.luck.random() < disk.lies:
            disk.strokes["writes lie"] += 1
            raise StoreError(f"simulated timeout of {what} {name}, which was done")

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        disk, process, path = self._begin("write", name)
        if disk.world.luck.random() < disk.slow and name != disk.prompt:
            disk.strokes["writes are slow"] += 1
            seconds = disk.world.luck.uniform(0.5, 15)
            disk.world.at(seconds, lambda: disk.put(path, data, process.node))
            process.sleep(seconds)
        else:
            disk.put(path, data, process.node)
        disk.world.tell(process.name, lambda: f"wrote {path}")
        self._done(process, disk, "write", name)

    def create(self, name: str, data: bytes) -> bool:
        disk, process, path = self._begin("write", name)
        if path in disk.files:
            return False
        disk.put(path, data, process.node)
        disk.world.tell(process.name, lambda: f"created {path}")
        self._done(process, disk, "write", name)
        return True

    def write_table(self, name: str, table: pa.Table) -> int:
        self.write_bytes(name, TableBytes.of(table))
        return _size(TableBytes.of(table))

    def _read(self, name: str) -> File:
        disk, process, path = self._begin("read", name)
        if (file := disk.seen(path, process.node)) is None:
            raise MissingError(f"sim://{path} is not there")
        if disk.world.now < file.torn_until and file.node != process.node:
            return File(b"torn", file.written, file.node)
        return file

    def read_bytes(self, name: str) -> bytes:
        return self._read(name).content

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        content = self._read(name).content
        if not isinstance(content, TableBytes):
            raise DamagedError(f"{self.uri}{name} is not a whole Parquet file")
        if columns is None:
            return content.table
        return content.table.select([c for c in columns if c in content.table.column_names])

    def read_tables(
        self, names: Sequence[str], columns: Sequence[str]
    ) -> Iterator[pa.Table | DamagedError]:
        for name in names:
            try:
                yield self.read_table(name, columns)
            except DamagedError as error:
                yield error

    def exists(self, name: str) -> bool:
        disk, process, path = self._begin("look", name)
        return disk.seen(path, process.node) is not None

    def committed(self, name: str) -> datetime:
        return datetime.fromtimestamp(self._read(name).written, UTC)

    def stats(self, prefix: str = "", suffix: str = "") -> dict[str, Stat]:
        disk, process, path = self._begin("list", prefix)
        found = {}
        for name in sorted(disk.files):
            inner = name.removeprefix(self.__dict__["root"])
            if (
                name.startswith(path)
                and inner.endswith(suffix)
                and not any(part.startswith((".", "_")) for part in inner.split("/"))
                and (file := disk.seen(name, process.node)) is not None
            ):
                found[inner] = Stat(_size(file.content), datetime.fromtimestamp(file.written, UTC))
        return found

    def delete(self, name: str) -> None:
        disk, process, path = self._begin("delete", name)
        if disk.seen(path, process.node) is None:
            raise MissingError(f"sim://{path} is not there")
        disk.remove(path)
        disk.world.tell(process.name, lambda: f"deleted {path}")
        self._done(process, disk, "delete", name)
