"""What a run is made of: groups of rows, in leases whose names come from their rows alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from cluster.origin import Origin

Key = tuple[str, int]
"""A row: its group and its case id."""


@dataclass(frozen=True)
class Lease:
    """Rows `start` to `stop` (exclusive) of a shard of the input, to be done for one group.

    `attempt` counts, from 1, how often a lease of one single record has been handed out.
    """

    group: str
    shard: int
    start: int
    stop: int
    attempt: int = 1

    @property
    def part(self) -> str:
        """The name of the part; from its rows alone, so that late writers write the same name."""
        return f"{self.group}/part-{self.shard:05d}-{self.start:06d}-{self.stop:06d}.parquet"

    @property
    def rows(self) -> int:
        return self.stop - self.start

    def singles(self) -> list[Lease]:
        """One lease for each record."""
        return [replace(self, start=i, stop=i + 1, attempt=1) for i in range(self.start, self.stop)]


@dataclass(frozen=True)
class Grid:
    """The case ids of each shard of the input, and the number of rows of a lease; and what the
    parts that are made of it are of.

    Raises ValueError where a case id is not unique or `rows` is below 1.
    """

    shards: tuple[tuple[int, ...], ...]
    rows: int
    records: int = 1
    """The records that a row stands for: a row may take so many times a record's time."""
    in_order: bool = False
    """Rows of a shard follow from each other: none is leased before the one before it is done."""
    after: Key | None = None
    """No row is leased before this one, of another group, is done."""
    needs: Mapping[int, tuple[Key, ...]] = field(default_factory=dict)
    """The rows of other groups that must be done before the row of a case id is leased."""
    passing: bool = False
    """Its rows are wanted for those that need them alone: not once these are done, and not where
    what they need themselves is a dead letter."""
    own: Mapping[str, Grid] = field(default_factory=dict)
    """The groups that have a grid of their own instead of this one."""
    origin: Origin = field(default_factory=Origin)
    """What the parts that are made of it are of, also those of `own`."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"A lease has at least 1 row, got {self.rows}.")
        counts = Counter(case_id for shard in self.shards for case_id in shard)
        if twice := [case_id for case_id, count in counts.items() if count > 1]:
            raise ValueError(f"Case ids must be unique over all shards; twice: {twice[:5]}.")

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def of(self, group: str) -> Grid:
        """The grid of a group."""
        return self.own.get(group, self)

    def ids(self, lease: Lease) -> tuple[int, ...]:
        """The case ids of a lease, in the order of the shard."""
        return self.of(lease.group).shards[lease.shard][lease.start : lease.stop]

    def size(self, lease: Lease) -> int:
        """The records of a lease, which its time goes by."""
        return lease.rows * self.of(lease.group).records

    def before(self, lease: Lease) -> Iterator[Key]:
        """The rows that must be done before a lease."""
        grid = self.of(lease.group)
        if grid.in_order and lease.start:
            yield lease.group, grid.shards[lease.shard][lease.start - 1]
        if grid.after:
            yield grid.after
        for case_id in self.ids(lease) if grid.needs else ():
            yield from grid.needs.get(case_id, ())

    def awaited(self) -> set[str]:
        """The groups whose rows other batches wait for; they go first."""
        needed = (keys for grid in self.own.values() for keys in grid.needs.values())
        ordered = {group for group, grid in self.own.items() if grid.in_order}
        return ordered | {group for keys in needed for group, _ in keys}

    def leases(self, group: str) -> Iterator[Lease]:
        grid = self.of(group)
        for number, shard in enumerate(grid.shards):
            for start in range(0, len(shard), grid.rows):
                yield Lease(group, number, start, min(start + grid.rows, len(shard)))
