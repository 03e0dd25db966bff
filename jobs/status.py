"""Print how far a run is: python -m jobs.status RUN_DIR

From what is in the store alone, on any machine that sees it; the driver is not asked.
"""

from __future__ import annotations

from jobs.commands.status import app as app

if __name__ == "__main__":
    app()  # It comes back for what follows as a module.

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import polars as pl

from cluster import index
from cluster.lease_log import LOGS
from cluster.lock import LOCK_NAME
from cluster.progress import LOG_SECONDS, clock
from cluster.queue import read_parts
from cluster.store import Store
from jobs import cli
from jobs.runs import manifests
from jobs.runs.parts import BATCHES, PARTS, VALUES, hive_values, row_of, scan
from rome.json_text import parsed

RECENT = timedelta(minutes=10)
"""Rate and workers come from the parts committed in so long before the last one."""
SILENT = 30.0
"""A driver that has not written its lock for so many seconds is probably dead."""
SHOWN = 5
"""Cases by name of each reason."""


@dataclass(frozen=True)
class Status:
    """The state of a run in its store."""

    name: str
    total: int
    done: dict[str, int]
    """Rows by editor, dead letters among them; 0 where there is none yet."""
    dead: dict[str, list[tuple[str, int]]]
    """Reason -> (editor, case_id)"""
    duplicates: int
    damaged: list[str]
    """Parts that cannot be read."""
    not_finite: int
    """Rows with numbers that are NaN or infinite."""
    rate: float
    """Rows per second over the last RECENT of the run; 0.0 where that is less than two parts."""
    workers: dict[str, int]
    """Worker -> its rows in the same time."""
    driver: str | None
    """Who holds the run's lock, and when it last wrote it."""

    @property
    def left(self) -> int:
        return self.total - sum(self.done.values())


def status(store: Store) -> Status:
    """Raises ValueError where the store is no run directory, StoreError where it fails."""
    manifest = manifests.read(store)
    results = store.sub("results")
    parts = results.stats(suffix=".parquet")
    written = {name: stat.committed for name, stat in parts.items()}
    for name in parts:
        hive_values(name.rpartition("/")[0])  # Raises where it is none of a run.
    origin = manifests.origin(manifest)
    found = read_parts(results, parts, known=index.known(results, parts), origin=origin)
    done = Counter(row_of(group) for group, _ in found.errors)
    dead = defaultdict(list)
    for (group, case_id), error in sorted(found.errors.items()):
        if error is not None:
            dead[error].append((row_of(group), case_id))
    bad = {*found.damaged}
    rate, workers = _recent(results, written)
    return Status(
        name=manifest["name"],
        total=sum(manifests.rows(manifest).values()),
        done={editor: done[editor] for editor in manifest["editors"]},
        dead=dict(dead),
        duplicates=found.duplicates,
        damaged=found.damaged,
        not_finite=_not_finite(store, [f"{PARTS}{name}" for name in written.keys() - bad]),
        rate=rate,
        workers=workers,
        driver=_driver(results),
    )


def _not_finite(store: Store, parts: Sequence[str]) -> int:
    """Rows of these parts; those that an earlier version wrote do not say it."""
    if not parts:
        return 0
    counts = scan(store, parts, pl.Schema({"not_finite": pl.UInt32()})).select(
        pl.col("not_finite") > 0
    )
    return int(counts.sum().collect().item())


def _recent(results: Store, written: dict[str, datetime]) -> tuple[float, dict[str, int]]:
    """Rows of the table per second, and rows by worker, of the parts that were committed last."""
    if not written:
        return 0.0, {}
    last = max(written.values())
    recent = sorted((when, name) for name, when in written.items() if when >= last - RECENT)
    rows: Counter[str] = Counter()
    after_the_first = 0
    for number, (_, name) in enumerate(recent):
        try:
            table = results.read_table(name, ["case_id", "worker"])
        except (ValueError, FileNotFoundError):
            continue  # Damaged, or set aside meanwhile.
        if "worker" in table.column_names:
            rows.update(worker for worker in table["worker"].to_pylist() if worker is not None)
        # Batches and values are not among what is told as left.
        if number and not name.startswith((BATCHES, VALUES)):
            after_the_first += table.num_rows
    seconds = (last - recent[0][0]).total_seconds()
    return (after_the_first / seconds if seconds else 0.0), dict(rows.most_common())


def _driver(results: Store) -> str | None:
    try:
        holder = parsed(results.read_bytes(LOCK_NAME))
        silent = (datetime.now(UTC) - results.committed(LOCK_NAME)).total_seconds()
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return "unknown: its lock cannot be read"
    return who + (f", silent for {clock(silent)}: probably dead" if silent > SILENT else ", alive")


def show(status: Status) -> None:
    """Print a status to stdout."""
    done = sum(status.done.values())
    share = 100 * done / status.total if status.total else 100.0
    cli.tell(f"{status.name}: {done} of {status.total} rows ({share:.1f} %), {status.left} left")
    for editor, rows in status.done.items():
        cli.tell(f"  {editor}: {rows}")
    working = status.left and status.driver is not None
    left = clock(status.left / status.rate) if working and status.rate else "unknown"
    cli.tell(f"rate: {status.rate:.2f} rows/s in its last {clock(RECENT.total_seconds())}")
    if status.left:
        cli.tell(f"time left: {left}")
    cli.tell(f"driver: {status.driver or 'none; the line that began the run goes on with it'}")
    cli.tell(f"workers: {len(status.workers)} in its last {clock(RECENT.total_seconds())}")
    for worker, rows in status.workers.items():
        cli.tell(f"  {worker}: {rows} rows")
    cli.tell(f"dead letters: {sum(map(len, status.dead.values()))}")
    for reason, cases in sorted(status.dead.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(f"{editor} case {case_id}" for editor, case_id in cases[:SHOWN])
        more = f" and {len(cases) - SHOWN} more" if len(cases) > SHOWN else ""
        cli.tell(f"  {len(cases)} x {reason}: {shown}{more}")
    if status.not_finite:
        cli.tell(f"rows with numbers that are not finite: {status.not_finite}")
    if status.duplicates:
        cli.tell(f"duplicate rows, which every reader drops: {status.duplicates}")
    for part in status.damaged:
        cli.tell(f"damaged, done again when the run goes on: results/{part}")


def show_failed(store: Store, dead: dict[str, list[tuple[str, int]]]) -> None:
    """Print each dead letter with its error, and the logs of leases, with their tracebacks."""
    for reason, cases in dead.items():
        for editor, case_id in cases:
            cli.tell(f"dead letter: {editor} case {case_id}: {reason}")
    logs = store.sub(PARTS).sub(LOGS)
    for name in logs.list(suffix=".log"):
        cli.tell(f"\n{logs.uri}/{name}:\n{logs.read_bytes(name).decode(errors='replace')}")


def main(run_dir: str, watch: bool = False, failed: bool = False) -> None:
    """See `jobs.commands.status`."""
    with cli.errors():
        store = Store(run_dir)
        found = status(store)
        if failed:
            show_failed(store, found.dead)
            return
        show(found)
        while watch and found.left:
            time.sleep(LOG_SECONDS)
            found = status(store)
            cli.tell("")
            show(found)
