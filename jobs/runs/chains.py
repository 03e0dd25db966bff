"""The chains of a run: their records in order, and the leases of their batches and checkpoints.

A chain is of two or three kinds of groups. Below `batches/` each row is a batch of edits, made on
what the batch before it left; beside the parts of other rows lie the scores of each checkpoint. If
its batches are large, then below `values/` each row is the value of an edit (z of MEMIT and
AlphaEdit), found on what the batch before left: all workers share these, and one makes the batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from cluster.grid import Grid, Key
from jobs.runs.config import RunConfig
from jobs.runs.parts import BATCHES, VALUES, at, hive_path
from rome.editors import EDITORS
from rome.edits.grouping import Grouping
from rome.options import ConfigError

_EDITS_OF_A_LEASE = 100
"""A worker that is lost costs so many edits of a chain, or one batch, if that has more."""
SHARED_FROM = 500
"""Edits of a batch from which on its values are leased by themselves. A worker that finds some must
have the state before: the edited weights, and with a history K x K a layer more. For fewer edits
that would be slower."""
_SOLVING = 20
"""A batch whose values are known takes this part of the time of one that finds them, or less."""


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
    shares_values: bool = False
    """The values of its edits are leased by themselves."""

    @property
    def batches(self) -> str:
        """The group of its batches."""
        return f"{BATCHES}{self.path}"

    @property
    def values(self) -> str:
        """The group of the values of its edits; a batch's are a shard of it."""
        return f"{VALUES}{self.path}"

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
    shares = EDITORS[config.kind(editor)].values and grouping.edits_per_model >= SHARED_FROM
    for order in range(grouping.orders):
        ids = list(case_ids)
        if order:
            random.Random(order).shuffle(ids)  # Python 3.6 to 3.13 shuffle alike.
        for number, start in enumerate(range(0, len(ids), grouping.size)):
            some = tuple(ids[start : start + grouping.size])
            where = f"{path}/{hive_path(order=str(order), chain=str(number))}"
            chains.append(Chain(editor, order, some, grouping, where, shares))
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
            records=_records_of_a_batch(chain),
            in_order=True,
            needs=_values_of_batches(chain) if chain.shares_values else {},
        )
        if chain.shares_values:
            own[chain.values] = _values_grid(chain, grid.rows)
        for edits in chain.grouping.checkpoints:
            edited = frozenset(chain.case_ids[:edits])
            shards = (tuple(i for i in shard if i in edited) for shard in grid.shards)
            last = edits // chain.grouping.edits_per_model - 1
            own[chain.scores(edits)] = Grid(tuple(shards), grid.rows, after=(chain.batches, last))
    return replace(grid, own=own)


def groups_of(chains: list[Chain]) -> Iterator[str]:
    """The groups of chains: first all batches and their values, which others wait for."""
    for chain in chains:
        yield chain.batches
        if chain.shares_values:
            yield chain.values
    for chain in chains:
        for edits in chain.grouping.checkpoints:
            yield chain.scores(edits)


def _records_of_a_batch(chain: Chain) -> int:
    edits = chain.grouping.edits_per_model
    return max(edits // _SOLVING, 1) if chain.shares_values else edits


def _values_of_batches(chain: Chain) -> dict[int, tuple[Key, ...]]:
    """Map each batch to the values of all its edits, which it needs."""
    return {
        number: tuple((chain.values, case_id) for case_id in chain.batch(number))
        for number in range(chain.grouping.sequence)
    }


def _values_grid(chain: Chain, rows: int) -> Grid:
    """Make a shard of values for each batch; they need the batch before."""
    shards = tuple(chain.batch(number) for number in range(chain.grouping.sequence))
    needs: dict[int, tuple[Key, ...]] = {
        case_id: ((chain.batches, number),)
        for number, shard in enumerate(shards[1:])
        for case_id in shard
    }
    return Grid(shards, rows, needs=needs, passing=True)


def _batches_of_a_lease(grouping: Grouping) -> int:
    """So many that each checkpoint is at the end of a lease."""
    size = grouping.edits_per_model
    common = gcd(*(edits // size for edits in grouping.checkpoints))
    most = max(_EDITS_OF_A_LEASE // size, 1)
    return max(number for number in range(1, most + 1) if common % number == 0)
