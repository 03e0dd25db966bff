"""Break runs in every way we know and count what is lost: `make chaos ARGS="FAULT ..."`.

Prints a table: fault -> how often injected and recovered, records lost and duplicated, most runs of
one record, seconds. Ends with 1 if a run was not recovered or anything was lost or duplicated.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from tests.programs.chaos_chain_faults import CHAIN_FAULTS, ChainScene
from tests.programs.chaos_chains import ChainSpec
from tests.programs.chaos_faults import FAULTS, Scene
from tests.programs.chaos_nodes import Nodes, environment
from tests.programs.chaos_task import Spec

COLUMNS = ("fault", "injected", "recovered", "lost", "duplicated", "attempts", "seconds")
EVERY: dict[str, Callable[[Any], int]] = {**FAULTS, **CHAIN_FAULTS}
ON_A_SMALL_DISK = ("disk full", "disk stays full")
SMALL_DISK = "CHAOS_SMALL_DISK"


def trial(name: str, scene: Scene) -> dict[str, Any]:
    """One fault, one seed."""
    started = time.monotonic()
    scene.prepare()
    injected = EVERY[name](scene)
    verdict = scene.judge()
    return {
        "injected": injected,
        "recovered": injected if verdict.lost == 0 else 0,
        "lost": verdict.lost,
        "duplicated": verdict.duplicated,
        "attempts": verdict.attempts,
        "seconds": time.monotonic() - started,
    }


def trials(name: str, seeds: int, records: int, root: str | None) -> dict[str, Any]:
    """One fault, all its seeds, on one cluster: sums, but the most attempts."""
    rows = []
    with cluster(name) as (nodes, variables):
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as log, _folder() as folder:
                where = f"{root}/{name.replace(' ', '-')}-{seed}" if root else folder
                luck = random.Random(seed)
                scene: Scene
                if name in CHAIN_FAULTS:
                    scene = ChainScene(nodes, ChainSpec(where, log), luck, variables)
                else:
                    scene = Scene(nodes, Spec(where, log, records), luck, variables)
                try:
                    rows.append(trial(name, scene))
                except Exception:
                    traceback.print_exc()
                    print(scene.said[-4000:], file=sys.stderr)
                    rows.append(dict.fromkeys(COLUMNS[1:], 0) | {"injected": 1})
    total = {key: sum(row[key] for row in rows) for key in COLUMNS[1:]}
    return total | {"fault": name, "attempts": max(row["attempts"] for row in rows)}


def _folder() -> tempfile.TemporaryDirectory[str]:
    # An interrupted trial leaves workers that still write.
    return tempfile.TemporaryDirectory(dir=os.environ.get(SMALL_DISK), ignore_cleanup_errors=True)


@contextmanager
def cluster(name: str) -> Iterator[tuple[Nodes, dict[str, str]]]:
    extra = {}
    if name == "records out of memory":
        # Ray ends workers when the machine uses more than this; others on it may use more, too.
        memory = psutil.virtual_memory()
        share = min(0.9, 1 - memory.available / memory.total + 0.35)
        extra = {"RAY_memory_usage_threshold": f"{share:.3f}"}
        extra["RAY_memory_monitor_refresh_ms"] = "50"
    with environment(extra) as variables:
        nodes = Nodes(2)
        try:
            yield nodes, variables
        finally:
            nodes.shut()


def on_a_small_disk(arguments: list[str]) -> int:
    """This program again with a file system of 3 MB that no other process sees or needs."""
    folder = tempfile.mkdtemp()
    inner = f'mount -t tmpfs -o size=3m tmpfs {folder} && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inner, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        print(f"{arguments[0]}: skipped, no user namespaces here", file=sys.stderr)
        return 0
    command += [sys.executable, "-m", "tests.programs.chaos", *arguments]
    try:
        return subprocess.run(command, env=os.environ | {SMALL_DISK: folder}).returncode
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def line(values: dict[str, Any]) -> str:
    values = values | {"seconds": round(values["seconds"])}
    return "| " + " | ".join(str(values[column]) for column in COLUMNS) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faults", nargs="*", default=list(EVERY), help="all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--records", type=int, default=6000, help="but for chains")
    parser.add_argument("--store", help="a URI such as s3://bucket/chaos instead of a folder")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # So that no cluster stays behind.
    if SMALL_DISK not in os.environ:
        print("| " + " | ".join(COLUMNS) + " |")
        print("|---" + "|---:" * (len(COLUMNS) - 1) + "|")
    failed = 0
    for name in options.faults:
        if name in ON_A_SMALL_DISK and SMALL_DISK not in os.environ:
            sizes = ["--seeds", str(options.seeds), "--records", str(options.records)]
            failed |= on_a_small_disk([name, *sizes])
            continue
        values = trials(name, options.seeds, options.records, options.store)
        print(line(values), flush=True)
        good = values["recovered"] == values["injected"] and not values["duplicated"]
        failed |= not good
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
