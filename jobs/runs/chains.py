"""The chains of a run: their records in order, and the leases of their batches and checkpoints.

A chain is two kinds of groups. Below `batches/` each row is a batch of edits, made on what the
batch before it left; beside the parts of other rows lie the scores of each checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from cluster.grid import Grid
from jobs.runs.config import RunConfig
from jobs.runs.parts import BATCHES, at, hive_path
from rome.edits.grouping import Grouping
from rome.options import ConfigError

_EDITS_OF_A_LEASE = 100
"""A worker that is lost costs so many edits of a chain, or one batch, if that has more."""


@dataclass(frozen=True)
class Chain:
    """One chain of a row of the run's table."""

    editor: str
    order: int
    case_ids: tuple[int, ...]
    """In the order of their edits."""
    grouping: Grouping
    path: str
    """Its hive path."""

    @property
    def batches(self) -> str:
        """The group of its batches."""
        return f"{BATCHES}{self.path}"

    def scores(self, edits: int) -> str:
        """The group of its scores at a checkpoint."""
        return f"{self.path}/{hive_path(edits=str(edits))}"

    def batch(self, number: int) -> tuple[int, ...]:
        """The case ids of a batch."""
        size = self.grouping.edits_per_model
        return self.case_ids[number * size : (number + 1) * size]

    def age(self, case_id: int, edits: int) -> int:
        """Edits after the batch of a record, at a checkpoint."""
        size = self.grouping.edits_per_model
        return edits - (self.case_ids.index(case_id) // size + 1) * size


def chains_of(config: RunConfig, editor: str, path: str, case_ids: list[int]) -> list[Chain]:
    """The chains of a row: all records in each order, cut into groups.

    Raises ConfigError where the records are not whole groups.
    """
    grouping = config.grouping(editor)
    if len(case_ids) % grouping.size or not case_ids:
        raise ConfigError(
            f"editors.{editor}: a chain takes {grouping.size} records (edits_per_model x "
            f"sequence), and the run has {len(case_ids)}: set records.limit to a multiple of "
            f"{grouping.size}"
        )
    chains = []
    for order in range(grouping.orders):
        ids = list(case_ids)
        if order:
            random.Random(order).shuffle(ids)  # Python 3.6 to 3.13 shuffle alike.
        for number, start in enumerate(range(0, len(ids), grouping.size)):
            some = tuple(ids[start : start + grouping.size])
            where = f"{path}/{hive_path(order=str(order), chain=str(number))}"
            chains.append(Chain(editor, order, some, grouping, where))
    return chains


def rows_of(config: RunConfig, grid: Grid, chains: list[Chain]) -> dict[str, int]:
    """The rows of a run's table, and how many of the run's each is made of."""
    rows = {}
    for editor in config.editors:
        checkpoints = config.grouping(editor).checkpoints
        for edits in checkpoints:
            rows[at(editor, edits)] = edits * sum(chain.editor == editor for chain in chains)
        if not checkpoints:
            rows[editor] = len(grid)
    return rows


def with_chains(grid: Grid, chains: list[Chain]) -> Grid:
    """The grid of a run with those of its chains' groups."""
    own = {}
    for chain in chains:
        batches = tuple(range(chain.grouping.sequence))
        own[chain.batches] = Grid(
            (batches,),
            _batches_of_a_lease(chain.grouping),
            records=chain.grouping.edits_per_model,
            in_order=True,
        )
        for edits in chain.grouping.checkpoints:
            edited = frozenset(chain.case_ids[:edits])
            shards = (tuple(i for i in shard if i in edited) for shard in grid.shards)
            last = edits // chain.grouping.edits_per_model - 1
            own[chain.scores(edits)] = Grid(tuple(shards), grid.rows, after=(chain.batches, last))
    return replace(grid, own=own)


def groups_of(chains: list[Chain]) -> Iterator[str]:
    """The groups of chains: first all batches, which others wait for."""
    for chain in chains:
        yield chain.batches
    for chain in chains:
        for edits in chain.grouping.checkpoints:
            yield chain.scores(edits)


def _batches_of_a_lease(grouping: Grouping) -> int:
    """So many that each checkpoint is at the end of a lease."""
    size = grouping.edits_per_model
    common = gcd(*(edits // size for edits in grouping.checkpoints))
    most = max(_EDITS_OF_A_LEASE // size, 1)
    return max(number for number in range(1, most + 1) if common % number == 0)
