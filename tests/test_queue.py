"""The lease table: nothing lost, nothing twice, the guilty alone pays."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from cluster import index
from cluster.grid import Grid, Lease
from cluster.queue import NODE_LOSSES, LeaseTable
from cluster.store import DamagedError, Store

GROUP = "benchmark=b/model=m/editor=rome"
GRID = Grid(((10, 11, 12, 13, 14), (20, 21)), rows=2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def commit(store: Store, lease: Lease, error: str | None = None) -> None:
    ids = GRID.ids(lease)
    table = pa.table({"case_id": ids, "error": pa.array([error] * len(ids), pa.string())})
    store.write_table(lease.part, table)


def spans(leases: Sequence[Lease]) -> list[tuple[int, int, int, int]]:
    return [(lease.shard, lease.start, lease.stop, lease.attempt) for lease in leases]


def drain(table: LeaseTable) -> list[Lease]:
    leases = []
    while lease := table.lease("drain"):
        leases.append(lease)
    return leases


def take(table: LeaseTable, worker: str) -> Lease:
    lease = table.lease(worker)
    assert lease is not None
    return lease


def test_leases_lie_on_a_fixed_grid_inside_each_shard(store: Store) -> None:
    table = LeaseTable(store, [GROUP], GRID)
    leases = drain(table)
    assert spans(leases) == [(0, 0, 2, 1), (0, 2, 4, 1), (0, 4, 5, 1), (1, 0, 2, 1)]
    assert leases[1].part == f"{GROUP}/part-00000-000002-000004.parquet"
    assert [i for lease in leases for i in GRID.ids(lease)] == [10, 11, 12, 13, 14, 20, 21]
    assert table.total == 7
    assert not table.finished


def test_grid_refuses_a_case_id_twice_and_empty_leases() -> None:
    with pytest.raises(ValueError, match=r"unique over all shards; twice: \[3\]"):
        Grid(((1, 3), (3,)), 2)
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        Grid(((1,),), 0)


def test_resume_leases_only_what_no_part_holds(store: Store) -> None:
    first = LeaseTable(store, [GROUP], GRID)
    commit(store, take(first, "a"))
    table = LeaseTable(store, [GROUP], GRID)
    assert len(table.done) == 2
    assert spans(drain(table)) == [(0, 2, 4, 1), (0, 4, 5, 1), (1, 0, 2, 1)]


def test_resume_of_a_split_lease_leases_its_missing_singles(store: Store) -> None:
    commit(store, Lease(GROUP, 0, 3, 4))
    assert spans(drain(LeaseTable(store, [GROUP], GRID)))[:3] == [
        (0, 0, 2, 1),
        (0, 2, 3, 1),
        (0, 4, 5, 1),
    ]


def test_longer_leases_fall_into_those_of_the_grid_where_some_of_it_is_done(store: Store) -> None:
    commit(store, Lease(GROUP, 0, 0, 2))
    table = LeaseTable(store, [GROUP], GRID)
    table.queue(4)
    assert spans(drain(table)) == [(0, 2, 4, 1), (0, 4, 5, 1), (1, 0, 2, 1)]
    commit(store, Lease(GROUP, 0, 2, 3))
    table = LeaseTable(store, [GROUP], GRID)
    table.queue(100)
    assert spans(drain(table)) == [(0, 3, 4, 1), (0, 4, 5, 1), (1, 0, 2, 1)]


def test_resume_with_another_lease_size_trusts_ids_not_names(store: Store) -> None:
    for lease in GRID.leases(GROUP):
        commit(store, lease)
    assert LeaseTable(store, [GROUP], Grid(GRID.shards, rows=3)).finished


def test_groups_are_separate_and_come_in_turn(store: Store) -> None:
    """What is done at any time is of the same records, as nearly as it can be."""
    commit(store, Lease(GROUP, 0, 0, 2))
    table = LeaseTable(store, [GROUP, "editor=none"], GRID)
    leases = drain(table)
    assert table.total == 14
    assert [lease.group for lease in leases] == ["editor=none", *[GROUP, "editor=none"] * 3]
    assert spans(leases[1::2]) == spans(leases[2::2]) == [(0, 2, 4, 1), (0, 4, 5, 1), (1, 0, 2, 1)]


def test_rows_found_twice_are_counted_and_done_once(store: Store) -> None:
    commit(store, Lease(GROUP, 0, 0, 2))
    commit(store, Lease(GROUP, 0, 0, 1))
    table = LeaseTable(store, [GROUP], GRID)
    assert table.duplicates == 1
    assert len(table.done) == 2


def test_a_part_of_other_data_is_refused(store: Store) -> None:
    store.write_table(f"{GROUP}/part-00000-000000-000002.parquet", pa.table({"case_id": [10, 99]}))
    with pytest.raises(ValueError, match=r"holds case 99 .* belongs to other data"):
        LeaseTable(store, [GROUP], GRID)


def test_a_part_without_case_ids_is_refused_by_name(store: Store) -> None:
    name = f"{GROUP}/part-00000-000000-000002.parquet"
    store.write_table(name, pa.table({"x": [1]}))
    with pytest.raises(ValueError, match=f"{name} has no column case_id"):
        LeaseTable(store, [GROUP], GRID)


def test_death_splits_the_oldest_lease_and_returns_the_others_whole(store: Store) -> None:
    table = LeaseTable(store, [GROUP], GRID)
    take(table, "a"), take(table, "a")
    take(table, "b")
    assert table.lose("a") is None
    assert spans(drain(table)) == [(0, 2, 4, 1), (1, 0, 2, 1), (0, 0, 1, 1), (0, 1, 2, 1)]


def test_death_after_the_commit_does_not_redo_the_lease(store: Store) -> None:
    table = LeaseTable(store, [GROUP], GRID)
    commit(store, take(table, "a"))
    assert table.lose("a") is None
    assert table.done == {(GROUP, 10), (GROUP, 11)}
    assert spans(drain(table)) == [(0, 2, 4, 1), (0, 4, 5, 1), (1, 0, 2, 1)]


def test_after_a_commit_the_next_lease_in_the_queue_is_to_blame(store: Store) -> None:
    table = LeaseTable(store, [GROUP], GRID)
    commit(store, take(table, "a"))
    take(table, "a")
    table.lose("a")
    assert spans(drain(table))[-2:] == [(0, 2, 3, 1), (0, 3, 4, 1)]


def test_death_in_the_middle_of_single_commits_redoes_the_rest_only(store: Store) -> None:
    table = LeaseTable(store, [GROUP], GRID)
    lease = take(table, "a")
    commit(store, lease.singles()[0], error="boom")
    table.lose("a")
    assert table.dead == {(GROUP, 10): "boom"}
    assert spans(drain(table))[-1] == (0, 1, 2, 1)


def test_only_deaths_while_alone_are_attempts_and_they_are_bounded(store: Store) -> None:
    table = LeaseTable(store, [GROUP], GRID, max_attempts=3)
    runs = 0
    exhausted = None
    while exhausted is None:  # Case 10 kills whoever runs it.
        lease = take(table, "a")
        if 10 in GRID.ids(lease):
            runs += 1
            exhausted = table.lose("a")
        else:
            table.complete("a", lease, {})
    assert runs == 4
    assert spans([exhausted]) == [(0, 0, 1, 3)]
    table.complete("a", exhausted, {10: "it died"})
    for lease in drain(table):
        table.complete("drain", lease, {})
    assert table.finished
    assert table.dead == {(GROUP, 10): "it died"}
    assert len(table.done) == table.total


def test_a_failure_that_the_worker_survives_splits_too(store: Store) -> None:
    table = LeaseTable(store, [GROUP], GRID, max_attempts=1)
    lease = take(table, "a")
    second = take(table, "a")
    assert table.fail("a", lease) is None
    table.complete("a", second, {})
    # At the end of the queue, for what made it fail may pass.
    single = drain(table)[-2]
    assert spans([single]) == [(0, 0, 1, 1)]
    assert table.fail("drain", single) == single


def test_dead_letters_stay_dead_unless_a_retry_is_asked_for(store: Store) -> None:
    for lease in GRID.leases(GROUP):
        for one in lease.singles() if lease.shard == 1 else [lease]:
            commit(store, one, error="boom" if one.shard == 1 else None)
    again = LeaseTable(store, [GROUP], GRID)
    assert again.finished
    assert again.dead == {(GROUP, 20): "boom", (GROUP, 21): "boom"}

    retry = LeaseTable(store, [GROUP], GRID, retry_dead=True)
    assert retry.dead == {}
    first, second = take(retry, "a"), take(retry, "a")
    # Both were single parts and must be again, or the old rows would stay beside the new ones.
    assert spans([first, second]) == [(1, 0, 1, 1), (1, 1, 2, 1)]
    # The old dead letter in the store does not make the retried lease look committed.
    retry.lose("a")
    assert spans([take(retry, "b"), take(retry, "b")]) == [(1, 1, 2, 1), (1, 0, 1, 2)]
    commit(store, second)
    retry.complete("b", second, {})
    retry.complete("b", Lease(GROUP, 1, 0, 1, 2), {20: "boom again"})
    assert retry.finished
    assert retry.dead == {(GROUP, 20): "boom again"}
    assert LeaseTable(store, [GROUP], GRID).dead == {(GROUP, 20): "boom"}


def test_a_late_writer_and_the_new_driver_write_the_same_name(store: Store) -> None:
    old = LeaseTable(store, [GROUP], GRID)
    late = take(old, "a")
    new = LeaseTable(store, [GROUP], GRID)
    commit(store, take(new, "b"))
    commit(store, late)
    found = LeaseTable(store, [GROUP], GRID)
    assert (len(found.done), found.duplicates) == (2, 0)


def test_a_lost_node_blames_no_record_until_it_happens_too_often(store: Store) -> None:
    table = LeaseTable(store, [GROUP], GRID)
    for _ in range(NODE_LOSSES):
        assert spans([take(table, "a")]) == [(0, 0, 2, 1)]
        assert table.lose("a", node_lost=True) is None
    take(table, "a")
    table.lose("a", node_lost=True)
    assert spans(drain(table))[-2:] == [(0, 0, 1, 1), (0, 1, 2, 1)]


def test_a_lease_given_back_is_the_next_and_no_attempt(store: Store) -> None:
    table = LeaseTable(store, [GROUP], GRID)
    table.give_back("a", take(table, "a"))
    assert spans(drain(table))[0] == (0, 0, 2, 1)


def test_of_two_copies_the_first_counts_and_the_second_changes_nothing(store: Store) -> None:
    table = LeaseTable(store, [GROUP], GRID)
    lease = take(table, "slow")
    for other in drain(table):
        table.complete("drain", other, {})
    assert table.copy("fast", lease)
    assert not table.copy("third", lease)
    assert table.complete("fast", lease, {}) == 2
    assert table.finished
    assert table.complete("slow", lease, {10: "too late"}) == 0


def test_a_lease_that_one_of_two_lost_stays_with_the_other(store: Store) -> None:
    table = LeaseTable(store, [GROUP], GRID)
    lease = take(table, "a")
    table.copy("b", lease)
    pending = table.pending
    assert table.lose("a") is None
    table.give_back("a", lease)
    assert table.fail("a", lease) is None
    assert table.pending == pending
    table.lose("b")  # The last that had it: now its records go alone.
    assert spans(drain(table))[-2:] == [(0, 0, 1, 1), (0, 1, 2, 1)]


def test_a_death_during_a_copied_lease_is_not_blamed_on_the_next_one(store: Store) -> None:
    table = LeaseTable(store, [GROUP], replace(GRID, rows=1), max_attempts=1)
    hanging, next_one = take(table, "a"), take(table, "a")
    table.copy("b", hanging)
    assert table.lose("a") is None
    assert spans([take(table, "c")]) == spans([next_one])
    assert table.lose("b") == hanging


def test_a_death_during_a_lease_that_its_copy_has_done_is_not_blamed_either(store: Store) -> None:
    table = LeaseTable(store, [GROUP], replace(GRID, rows=1), max_attempts=1)
    slow, next_one = take(table, "a"), take(table, "a")
    table.copy("b", slow)
    table.complete("b", slow, {})
    assert table.lose("a", during=slow) is None
    assert spans([take(table, "c")]) == spans([next_one])


def test_what_the_index_knows_is_not_opened_unless_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "WORTHWHILE", 1)
    opened: list[str] = []

    class Counting(Store):
        def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
            opened.append(name)
            return super().read_table(name, columns)

    def resume() -> tuple[int, dict[tuple[str, int], str]]:
        opened.clear()
        table = LeaseTable(Counting(tmp_path), [GROUP], GRID)
        return len(table.done), table.dead

    store, leases = Store(tmp_path), list(GRID.leases(GROUP))
    for lease in leases:
        commit(store, lease)
        os.utime(tmp_path / lease.part, (1e9, 1e9))
    assert resume() == (7, {})
    assert set(opened) == {lease.part for lease in leases}
    assert resume() == (7, {})
    assert opened == [index.INDEX]
    # Another content, size or time, a part that is gone, one that is new.
    commit(store, leases[3], error="boom")
    (tmp_path / leases[0].part).unlink()
    commit(store, leases[0].singles()[0])
    assert resume() == (6, {(GROUP, 20): "boom", (GROUP, 21): "boom"})
    assert set(opened) == {index.INDEX, leases[3].part, leases[0].singles()[0].part}
    # What is as young as the index may have been replaced since, in the same moment.
    assert resume()[0] == 6
    assert leases[3].part in opened
    store.write_bytes(index.INDEX, b"PAR1")
    assert resume()[0] == 6


class Half(Store):
    """Shows one part half while it is written."""

    shown = 0

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        type(self).shown += 1
        if self.shown == 1:
            raise DamagedError(name)
        return super().read_table(name, columns)


def test_a_part_that_is_still_being_written_is_not_set_aside(tmp_path: Path) -> None:
    lease = Lease(GROUP, 0, 0, 2)
    commit(Store(tmp_path), lease)
    table = LeaseTable(Half(tmp_path), [GROUP], GRID)
    assert (Half.shown, table.set_aside, len(table.done)) == (2, [], 2)
    assert Store(tmp_path).exists(lease.part)


def test_a_damaged_part_is_set_aside_and_its_rows_are_done_again(store: Store) -> None:
    whole, damaged = Lease(GROUP, 0, 0, 2), Lease(GROUP, 0, 2, 4)
    for lease in (whole, damaged):
        commit(store, lease)
    store.write_bytes(damaged.part, store.read_bytes(damaged.part)[:-9])
    table = LeaseTable(store, [GROUP], GRID)
    assert table.set_aside == [f"_damaged/{damaged.part}"]
    assert store.exists(table.set_aside[0])
    assert not store.exists(damaged.part)
    assert spans(drain(table)) == [(0, 2, 4, 1), (0, 4, 5, 1), (1, 0, 2, 1)]


def test_a_lease_that_another_did_is_not_done_again_because_a_copy_of_it_failed(
    store: Store,
) -> None:
    table = LeaseTable(store, [GROUP], GRID, max_attempts=1)
    lease = take(table, "slow")
    assert table.copy("fast", lease)
    table.complete("fast", lease, {})
    pending = table.pending
    assert table.fail("slow", lease) is None
    table.give_back("slow", lease)
    assert table.pending == pending


BATCHES, SCORES = "batches/editor=memit", "benchmark=b/model=m/editor=memit/edits=4"
CHAIN = Grid(
    GRID.shards,
    rows=2,
    own={
        BATCHES: Grid((tuple(range(4)),), rows=1, records=100, in_order=True),
        SCORES: Grid(((10, 20),), rows=2, after=(BATCHES, 1)),
    },
)


def test_rows_in_order_wait_for_each_other_and_groups_for_a_row_of_another(store: Store) -> None:
    table = LeaseTable(store, [BATCHES, SCORES], CHAIN)
    assert (table.total, table.pending) == (6, 1)
    first = take(table, "a")
    assert CHAIN.size(first) == 100
    assert table.lease("b") is None
    table.complete("a", first, {})
    second = take(table, "a")
    assert (second.group, second.start) == (BATCHES, 1)
    table.complete("a", second, {})
    # The chain goes on first, and its scores are done beside it.
    assert take(table, "a").start == 2
    scores = take(table, "b")
    assert (scores.group, CHAIN.ids(scores)) == (SCORES, (10, 20))
    assert table.lease("c") is None
    assert not table.finished


def test_a_chain_goes_on_from_its_last_part_and_past_a_dead_letter(store: Store) -> None:
    def write(row: int, error: str | None = None) -> None:
        errors = pa.array([error], pa.string())
        part = Lease(BATCHES, 0, row, row + 1).part
        store.write_table(part, pa.table({"case_id": [row], "error": errors}))

    write(0)
    write(1, "no such key")
    table = LeaseTable(store, [BATCHES, SCORES], CHAIN)
    assert spans(drain(table)) == [(0, 2, 3, 1), (0, 0, 2, 1)]
    # A dead letter that is tried again holds back what follows from it.
    table = LeaseTable(store, [BATCHES, SCORES], CHAIN, retry_dead=True)
    assert spans(drain(table)) == [(0, 1, 2, 1)]


VALUES = "values/editor=memit"
SPREAD = Grid(
    (),
    rows=2,
    own={
        BATCHES: Grid(
            (tuple(range(2)),),
            rows=1,
            in_order=True,
            needs={0: tuple((VALUES, i) for i in (5, 6, 7)), 1: ((VALUES, 8), (VALUES, 9))},
        ),
        VALUES: Grid(
            ((5, 6, 7), (8, 9)),
            rows=2,
            needs={8: ((BATCHES, 0),), 9: ((BATCHES, 0),)},
            passing=True,
        ),
    },
)


def test_a_row_waits_for_all_that_it_needs_whatever_their_order(store: Store) -> None:
    table = LeaseTable(store, [BATCHES, VALUES], SPREAD)
    a, b = take(table, "a"), take(table, "b")
    assert [SPREAD.ids(a), SPREAD.ids(b)] == [(5, 6), (7,)]
    assert table.lease("c") is None
    table.complete("b", b, {})
    assert table.lease("b") is None
    table.complete("a", a, {})
    batch = take(table, "a")
    assert (batch.group, batch.start) == (BATCHES, 0)
    assert table.lease("b") is None
    table.complete("a", batch, {})
    values = take(table, "a")
    assert (values.group, SPREAD.ids(values)) == (VALUES, (8, 9))
    # One that fails is done row by row, and the batch waits for each.
    table.fail("a", values)
    first, second = take(table, "a"), take(table, "b")
    table.complete("b", second, {9: "no such key"})
    assert table.lease("c") is None
    table.complete("a", first, {})
    assert (take(table, "a").group, table.pending) == (BATCHES, 0)


def test_what_is_needed_for_what_is_done_is_not_done(store: Store) -> None:
    """Such as values of batches that an earlier version made, or that somebody removed."""
    store.write_table(Lease(BATCHES, 0, 0, 1).part, pa.table({"case_id": [0]}))
    table = LeaseTable(store, [BATCHES, VALUES], SPREAD)
    assert (table.pending, SPREAD.ids(take(table, "a"))) == (1, (8, 9))
    store.write_table(Lease(BATCHES, 0, 1, 2).part, pa.table({"case_id": [1]}))
    assert LeaseTable(store, [BATCHES, VALUES], SPREAD).finished


def test_nothing_is_done_for_what_cannot_be(store: Store) -> None:
    """After a batch that failed, the next ones are asked at once, and find it so."""
    table = LeaseTable(store, [BATCHES, VALUES], SPREAD)
    for name in "ab":
        table.complete(name, take(table, name), {})
    table.complete("a", take(table, "a"), {0: "no such key"})
    lease = take(table, "a")
    assert (lease.group, lease.start, table.pending) == (BATCHES, 1, 0)
    table.complete("a", lease, {1: "it ended"})
    assert table.finished
    assert len(table.done) == table.total == 7
    error = pa.array(["no such key"], pa.string())
    for row in range(2):
        part = Lease(BATCHES, 0, row, row + 1).part
        store.write_table(part, pa.table({"case_id": [row], "error": error}))
    assert LeaseTable(store, [BATCHES, VALUES], SPREAD).finished
    again = LeaseTable(store, [BATCHES, VALUES], SPREAD, retry_dead=True)
    for name in "ab":
        again.complete(name, take(again, name), {})
    again.complete("a", take(again, "a"), {})
    values = take(again, "a")
    assert (values.group, SPREAD.ids(values)) == (VALUES, (8, 9))


def test_what_failed_and_others_wait_for_goes_before_the_rest(store: Store) -> None:
    table = LeaseTable(store, [BATCHES, VALUES, GROUP], replace(SPREAD, shards=GRID.shards))
    table.fail("a", take(table, "a"))
    assert [lease.group for lease in drain(table)] == [VALUES] * 3 + [GROUP] * 4


def test_what_is_needed_is_done_again_before_it_is_used(store: Store) -> None:
    error = pa.array(["no such key"], pa.string())
    write = Lease(VALUES, 0, 2, 3).part
    store.write_table(write, pa.table({"case_id": [7], "error": error}))
    rows = Lease(VALUES, 0, 0, 2).part
    store.write_table(rows, pa.table({"case_id": [5, 6]}))
    assert take(LeaseTable(store, [BATCHES, VALUES], SPREAD), "a").group == BATCHES
    again = LeaseTable(store, [BATCHES, VALUES], SPREAD, retry_dead=True)
    lease = take(again, "a")
    assert (lease.group, SPREAD.ids(lease)) == (VALUES, (7,))
    assert again.lease("b") is None
    again.complete("a", lease, {})
    assert take(again, "a").group == BATCHES


def test_a_lease_of_a_chain_that_failed_goes_row_by_row(store: Store) -> None:
    grid = Grid((), 1, own={BATCHES: Grid((tuple(range(4)),), rows=2, in_order=True)})
    table = LeaseTable(store, [BATCHES], grid)
    table.fail("a", take(table, "a"))
    first = take(table, "a")
    assert (first.start, first.stop, table.pending) == (0, 1, 0)
    table.complete("a", first, {})
    assert spans([take(table, "a")]) == [(0, 1, 2, 1)]
    table.complete("a", Lease(BATCHES, 0, 1, 2), {})
    assert spans([take(table, "a")]) == [(0, 2, 4, 1)]
