"""Leases, attempts, dead letters: the state of a run, always rebuilt from the parts in the store.

A part is a Parquet file with a `case_id` column and, where rows can fail, an `error` column (null
for a row that is fine). A row with an error is a dead letter, and is alone in its part, so that
its retry replaces it. `Key` names a row: (group, case_id).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

from cluster import index
from cluster.clock import REAL, Clock
from cluster.grid import Grid, Key, Lease
from cluster.index import Rows
from cluster.origin import Origin
from cluster.store import DamagedError, Stat, Store

NODE_LOSSES = 5
"""A lease during which so many nodes were lost is no longer innocent."""

WRITTEN_SECONDS = 1.0
"""Between two looks at a part that is not whole."""


@dataclass(frozen=True)
class Found:
    """The rows of some parts: each with its error or None, and how many rows were there twice.

    damaged: the parts that are no whole Parquet files. rows: those of each other part.
    """

    errors: dict[Key, str | None]
    duplicates: int
    damaged: list[str]
    rows: dict[str, Rows]


def read_parts(
    store: Store,
    names: Iterable[str],
    clock: Clock = REAL,
    known: Mapping[str, Rows] | None = None,
    origin: Origin | None = None,
) -> Found:
    """Read which rows the parts hold. Of two rows of one key, one without an error counts.

    What is `known` of parts is not read. A part is damaged if it still is after a second: some
    stores show a part while it is written.
    Raises ValueError naming the file where a part has no case ids, or is of something else.
    """
    origin = origin or Origin()
    rows: dict[str, Rows] = dict(known or {})
    odd: list[str] = []

    def look(names: Sequence[str]) -> None:
        for name, table in zip(names, store.read_tables(names, ("case_id", "error")), strict=True):
            if isinstance(table, DamagedError):
                odd.append(name)
                continue
            origin.check(f"{store.uri}/{name}", name.rpartition("/")[0], table.schema)
            if "case_id" not in table.column_names:
                raise ValueError(
                    f"{store.uri}/{name} has no column case_id: it is not a part of a run. "
                    "Move it away and run the same command again."
                )
            ids, errors = table["case_id"].to_pylist(), [None] * table.num_rows
            if "error" in table.column_names:
                errors = table["error"].to_pylist()
            rows[name] = ids, errors

    look([name for name in names if name not in rows])
    if odd:
        clock.sleep(WRITTEN_SECONDS)
        again, odd = odd, []
        look(again)
    found: dict[Key, str | None] = {}
    for name, (ids, errors) in rows.items():
        group = name.rpartition("/")[0]
        for case_id, error in zip(ids, errors, strict=True):
            if error is None or (group, case_id) not in found:
                found[group, case_id] = error
    return Found(found, sum(len(ids) for ids, _ in rows.values()) - len(found), odd, rows)


class LeaseTable:
    """The leases that wait and the leases of each worker; plain Python, kept by the driver.

    A worker does its leases in the order it got them. A lease of many records that failed or was
    lost is split into leases of one record; one of those that failed `max_attempts` times is
    returned to the caller, who writes the dead letter and calls `complete`. Two workers may have
    the same lease (`copy`): the first to complete it wins, and both write the same part.
    """

    def __init__(
        self,
        store: Store,
        groups: Sequence[str],
        grid: Grid,
        max_attempts: int = 3,
        retry_dead: bool = False,
        clock: Clock = REAL,
    ) -> None:
        """Read the parts of `groups` in the store and queue what is not in them.

        With `retry_dead`, dead letters of former runs count as not done. A damaged part is set
        aside, and its rows are done again. Raises ValueError where a part is of something else or
        holds a case id that the grid does not know.
        """
        self._store, self._grid, self._max_attempts = store, grid, max_attempts
        self._clock = clock
        self.total = sum(len(grid.of(group)) for group in groups)
        self._queues: dict[str, deque[Lease]] = {}
        self._pending: deque[Lease] = deque()
        self._held: dict[Key, list[Lease]] = {}
        self.set_aside: list[str] = []
        """The new places of damaged parts."""
        found = self._read_all(groups)
        self._refuse_strangers(found)
        self.duplicates = found.duplicates
        self.done: set[Key] = set()
        self.dead: dict[Key, str] = {}
        self._retrying = {
            key for key in found.errors if retry_dead and found.errors[key] is not None
        }
        self._mark(found.errors)
        self._copied: set[Lease] = set()
        self._node_losses: Counter[Lease] = Counter()
        self._groups, self._awaited = groups, grid.awaited()
        self._pass_over()
        self.queue(grid.rows)

    def queue(self, rows: int) -> None:
        """Queue what is not done in leases of so many rows, while no worker has one."""
        own = {
            group: grid if grid.in_order else replace(grid, rows=rows)
            for group, grid in self._grid.own.items()
        }
        grid = replace(self._grid, rows=rows, own=own)
        self._pending.clear()
        self._held.clear()
        # First what others wait for; then the groups in turn, so that what is done at any time is
        # of the same records for all.
        awaited = [group for group in self._groups if group in self._awaited]
        others = [group for group in self._groups if group not in self._awaited]
        turns = chain(
            chain.from_iterable(map(grid.leases, awaited)),
            filter(None, chain.from_iterable(zip_longest(*map(grid.leases, others)))),
        )
        self._put(lease for whole in turns for lease in self._rest(whole))

    @property
    def pending(self) -> int:
        """The number of leases that no worker has and one could do now."""
        return len(self._pending)

    @property
    def finished(self) -> bool:
        return not self._pending and not self._held and not any(self._queues.values())

    def lease(self, worker: str) -> Lease | None:
        """Hand the next lease to a worker; None where none is pending."""
        if not self._pending:
            return None
        lease = self._pending.popleft()
        self._queues.setdefault(worker, deque()).append(lease)
        return lease

    def copy(self, worker: str, lease: Lease) -> bool:
        """Give a lease that another worker has to this one as well, once; returns whether."""
        if lease in self._copied or self._keys(lease)[0] in self.done:
            return False
        self._copied.add(lease)
        self._queues.setdefault(worker, deque()).append(lease)
        return True

    def complete(self, worker: str, lease: Lease, errors: Mapping[int, str]) -> int:
        """The part of a lease is in the store; `errors` are its dead letters by case id.

        Returns how many rows are new: none of a copy that came second.
        """
        for holder in list(self._queues) if lease in self._copied else [worker]:
            self._drop(holder, lease)
        before, keys = len(self.done), self._keys(lease)
        self._retrying.difference_update(keys)
        self._mark({key: errors.get(key[1]) for key in keys})
        return len(self.done) - before

    def fail(self, worker: str, lease: Lease) -> Lease | None:
        """A worker could not do a lease and lives on. Returns it if that was its last try."""
        self._drop(worker, lease)
        return None if self._elsewhere(lease) or self._is_done(lease) else self._again(lease)

    def give_back(self, worker: str, lease: Lease) -> None:
        """A worker could not do a lease through no fault of its records."""
        self._drop(worker, lease)
        if not self._elsewhere(lease) and not self._is_done(lease):
            self._pending.appendleft(lease)

    def lose(
        self, worker: str, node_lost: bool = False, during: Lease | None = None
    ) -> Lease | None:
        """A worker died, `during` the oldest lease that it has not answered for. Returns the lease
        to blame if that was its last try.

        What it committed before it died is done. The oldest of what is left is to blame, unless the
        whole node was lost; the others had not begun and go back as they were. Nobody is to blame
        for a death during a lease that another worker has done meanwhile.
        """
        queue = self._queues.get(worker, deque())
        left = [lease for lease in queue if not self._committed(lease)]
        self._queues.pop(worker, None)
        if not left:
            return None
        if during in self._copied and during not in left:
            self._pending.extendleft(reversed(left))
            return None
        suspect, *innocent = left
        self._pending.extendleft(one for one in reversed(innocent) if not self._elsewhere(one))
        if self._elsewhere(suspect):
            return None  # Its copy will show.
        if node_lost and self._node_losses[suspect] < NODE_LOSSES:
            self._node_losses[suspect] += 1
            self._pending.appendleft(suspect)
            return None
        return self._again(suspect)

    def _again(self, lease: Lease) -> Lease | None:
        # At the end of the queue: where workers are killed in a row for another reason, their
        # records are tried again in quieter times.
        if lease.rows > 1:
            self._put(one for one in lease.singles() if not self._is_done(one))
        elif lease.attempt < self._max_attempts:
            self._put([replace(lease, attempt=lease.attempt + 1)])
        else:
            return lease
        return None

    def _committed(self, lease: Lease) -> bool:
        """True if the store has every row of a lease: in its own part or in parts of one."""
        names = dict.fromkeys(one.part for one in (lease, *lease.singles()))
        self._mark(self._read([n for n in names if self._store.exists(n)]).errors)
        return self._is_done(lease)

    def _put(self, leases: Iterable[Lease]) -> None:
        """Queue leases, those that others wait for before the rest; one that must wait for rows is
        held back until the last of them is done."""
        for lease in leases:
            left = next((key for key in self._grid.before(lease) if key not in self.done), None)
            if left is not None:
                self._held.setdefault(left, []).append(lease)
            elif self._in_vain(lease):
                self._mark(dict.fromkeys(self._keys(lease)))
            elif lease.group in self._awaited:
                others = (i for i, x in enumerate(self._pending) if x.group not in self._awaited)
                self._pending.insert(next(others, len(self._pending)), lease)
            else:
                self._pending.append(lease)

    def _in_vain(self, lease: Lease) -> bool:
        """True if nobody will want the rows, since what they need is a dead letter."""
        passing = self._grid.of(lease.group).passing
        return passing and any(key in self.dead for key in self._grid.before(lease))

    def _pass_over(self) -> None:
        """Take what is wanted no more as done: passing rows, if those that need them are done."""
        passing = {group for group in self._groups if self._grid.of(group).passing}
        for group, grid in self._grid.own.items() if passing else ():
            for case_id, keys in grid.needs.items():
                if (group, case_id) in self.done:
                    self.done.update(key for key in keys if key[0] in passing)

    def _is_done(self, lease: Lease) -> bool:
        return self.done.issuperset(self._keys(lease))

    def _read(self, names: Iterable[str], known: Mapping[str, Rows] | None = None) -> Found:
        found = read_parts(self._store, names, self._clock, known, self._grid.origin)
        self.set_aside += [self._store.set_aside(name) for name in found.damaged]
        return found

    def _read_all(self, groups: Sequence[str]) -> Found:
        """Read the parts of groups, opening those that the index does not know as they are."""
        parts: dict[str, Stat] = {}
        for group in groups:
            parts |= self._store.stats(f"{group}/part-", ".parquet")
        known = index.known(self._store, parts)
        found = self._read(sorted(parts), known)
        if len(parts) - len(known) > index.WORTHWHILE:
            index.save(self._store, parts, found.rows)
        return found

    def _elsewhere(self, lease: Lease) -> bool:
        """True if some worker still has a lease."""
        return lease in self._copied and any(lease in queue for queue in self._queues.values())

    def _mark(self, errors: Mapping[Key, str | None]) -> None:
        for key, error in errors.items():
            if error is None:
                self.dead.pop(key, None)
                self._retrying.discard(key)
            elif key in self._retrying:
                continue  # The old dead letter, which is still there while its record is retried.
            else:
                self.dead[key] = error
            self.done.add(key)
            self._put(self._held.pop(key, ()))

    def _rest(self, whole: Lease) -> list[Lease]:
        """The rest of a lease: all of it, or those of the grid in it, or single records of them."""
        keys = self._keys(whole)
        if self.done.isdisjoint(keys) and self._retrying.isdisjoint(keys):
            return [whole]
        if whole.rows > (rows := self._grid.of(whole.group).rows):
            starts = range(whole.start, whole.stop, rows)
            parts = [replace(whole, start=i, stop=min(i + rows, whole.stop)) for i in starts]
            return [lease for part in parts for lease in self._rest(part)]
        return [one for one in whole.singles() if not self._is_done(one)]

    def _keys(self, lease: Lease) -> list[Key]:
        return [(lease.group, case_id) for case_id in self._grid.ids(lease)]

    def _drop(self, worker: str, lease: Lease) -> None:
        if lease in (queue := self._queues.get(worker, deque())):
            queue.remove(lease)

    def _refuse_strangers(self, found: Found) -> None:
        known = {
            group: {case_id for shard in self._grid.of(group).shards for case_id in shard}
            for group in {group for group, _ in found.errors}
        }
        if strangers := [key for key in found.errors if key[1] not in known[key[0]]]:
            group, case_id = strangers[0]
            raise ValueError(
                f"{self._store.uri}/{group} holds case {case_id} ({len(strangers)} such rows), "
                "which is not in these records: it belongs to other data. "
                "Choose another run directory."
            )
