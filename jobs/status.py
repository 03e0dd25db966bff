"""Print how far a run is: python -m jobs.status RUN_DIR

From what is in the store alone, on any machine that sees it; the driver is not asked.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from cluster import index
from cluster.lock import LOCK_NAME
from cluster.progress import clock
from cluster.queue import read_parts
from cluster.store import Store
from jobs import cli
from jobs.runs import manifests
from jobs.runs.parts import row_of

RECENT = timedelta(minutes=10)
"""Rate and workers come from the parts committed in so long before the last one."""
SILENT = 30.0
"""A driver that has not written its lock for so many seconds is probably dead."""
SHOWN = 5
"""Cases by name of each reason."""

app = cli.new_app()


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
    found = read_parts(results, parts, known=index.known(results, parts))
    done = Counter(row_of(group) for group, _ in found.errors)
    dead = defaultdict(list)
    for (group, case_id), error in sorted(found.errors.items()):
        if error is not None:
            dead[error].append((row_of(group), case_id))
    rate, workers = _recent(results, written)
    return Status(
        name=manifest["name"],
        total=sum(manifests.rows(manifest).values()),
        done={editor: done[editor] for editor in manifest["editors"]},
        dead=dict(dead),
        duplicates=found.duplicates,
        damaged=found.damaged,
        rate=rate,
        workers=workers,
        driver=_driver(results),
    )


def _recent(results: Store, written: dict[str, datetime]) -> tuple[float, dict[str, int]]:
    """Rows per second, and rows by worker, of the parts that were committed last."""
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
        after_the_first += table.num_rows if number else 0
    seconds = (last - recent[0][0]).total_seconds()
    return (after_the_first / seconds if seconds else 0.0), dict(rows.most_common())


def _driver(results: Store) -> str | None:
    try:
        holder = json.loads(results.read_bytes(LOCK_NAME))
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
    typer.echo(f"{status.name}: {done} of {status.total} rows ({share:.1f} %), {status.left} left")
    for editor, rows in status.done.items():
        typer.echo(f"  {editor}: {rows}")
    working = status.left and status.driver is not None
    left = clock(status.left / status.rate) if working and status.rate else "unknown"
    typer.echo(f"rate: {status.rate:.2f} rows/s in its last {clock(RECENT.total_seconds())}")
    if status.left:
        typer.echo(f"time left: {left}")
    typer.echo(f"driver: {status.driver or 'none; the line that began the run goes on with it'}")
    typer.echo(f"workers: {len(status.workers)} in its last {clock(RECENT.total_seconds())}")
    for worker, rows in status.workers.items():
        typer.echo(f"  {worker}: {rows} rows")
    typer.echo(f"dead letters: {sum(map(len, status.dead.values()))}")
    for reason, cases in sorted(status.dead.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(f"{editor} case {case_id}" for editor, case_id in cases[:SHOWN])
        more = f" and {len(cases) - SHOWN} more" if len(cases) > SHOWN else ""
        typer.echo(f"  {len(cases)} x {reason}: {shown}{more}")
    if status.duplicates:
        typer.echo(f"duplicate rows, which every reader drops: {status.duplicates}")
    for part in status.damaged:
        typer.echo(f"damaged, done again when the run goes on: results/{part}")


@app.command()
def main(
    run_dir: Annotated[str, typer.Argument(help="A run directory, local or s3://...")],
) -> None:
    """Say what is done and left of a run, how fast, by whom, and what failed why."""
    with cli.errors():
        show(status(Store(run_dir)))


if __name__ == "__main__":
    app()
