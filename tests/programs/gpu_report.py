"""What `gpu.py` found: kept as JSON after each task, and one text at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.programs import perf


@dataclass(frozen=True)
class Task:
    """Something to check or to measure, by a name that says what is left out if time runs out."""

    name: str
    run: Callable[[Report], None]


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    note: str


@dataclass
class Report:
    """All checks and measurements so far."""

    out: Path
    device: str
    checks: list[Check] = field(default_factory=list)
    speed: list[dict[str, Any]] = field(default_factory=list)
    profile: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, name: str, passed: bool, note: str) -> None:
        self.checks.append(Check(name, passed, note))
        print(f"{'ok' if passed else 'FAILED'} {name}: {note}", flush=True)

    def save(self) -> None:
        """Whole or not at all, so that an end at any moment leaves what was done."""
        values = {
            "machine": perf.machine(torch.device(self.device)),
            "checks": [asdict(check) for check in self.checks],
            "speed": self.speed,
            "profile": self.profile,
            "left_out": self.left_out,
            "seconds": self.seconds,
        }
        temporary = self.out.with_name(f".{self.out.name}.{os.getpid()}")
        temporary.write_text(json.dumps(values, indent=1))
        temporary.replace(self.out)

    def text(self) -> str:
        machine = perf.machine(torch.device(self.device))
        lines = [
            "",
            f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
            f"transformers {machine['transformers']}; {self.seconds:.0f} s",
        ]
        if self.speed:
            lines += [
                "",
                "| shape, dtype | workers | records at once | token_budget | row | s/record, first "
                "| s/record, warm | records/s | of matmul | peak GiB |",
                "|---|---|---|---|---|---|---|---|---|---|",
                *(_speed(row) for row in self.speed),
            ]
        if self.profile:
            lines += [
                "",
                "| stage | host s | device s | busy | launches | synchronisations |",
                "|---|---|---|---|---|---|",
                *(_profile(row) for row in self.profile),
                "",
                *(
                    f"{row['stage']}, {side}: {', '.join(row[side])}"
                    for row in self.profile
                    for side in ("dearest on the host", "dearest on the device")
                    if row[side]
                ),
            ]
        if failed := [check for check in self.checks if not check.passed]:
            lines += ["", *(f"FAILED {check.name}: {check.note}" for check in failed)]
        if self.left_out:
            lines += ["", *(f"left out: {text}" for text in self.left_out)]
        return "\n".join([*lines, "", f"all of it: {self.out}"])


def _speed(row: dict[str, Any]) -> str:
    share, peak = row["share_of_matmul"], row["peak_bytes"]
    cells = [
        f"{row['shape']}, {row['dtype']}",
        str(row["workers"]),
        str(row["records"]),
        f"{row['token_budget']:,}" if row["token_budget"] else "by itself",
        row["what"],
        "-" if row["first"] is None else f"{row['first']:.3g}",
        f"{row['seconds']:.3g}",
        f"{1 / row['seconds']:.3g}",
        "-" if share is None else f"{share:.1%}",
        f"{peak / 2**30:.2f}" if peak else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _profile(row: dict[str, Any]) -> str:
    cells = [
        row["stage"],
        f"{row['host_seconds']:.3g}",
        f"{row['device_seconds']:.3g}",
        f"{row['device_seconds'] / row['host_seconds']:.0%}",
        f"{row['launches']:,}",
        f"{row['synchronisations']:,}",
    ]
    return f"| {' | '.join(cells)} |"
