"""Who waits for whom? Seconds of host and device, launches and waits, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rome.editors.rome import Rome
from rome.edits.deltas import Edit
from rome.models import memory
from rome.scoring import generation, greedy, probabilities
from tests.programs import gpu_speed, perf
from tests.programs.bench import Bench
from tests.programs.gpu_report import Report, Task

_EVALUATIONS = 4
_TOKENS = 26
_DEAREST = 10


def tasks(device: str) -> list[Task]:
    """Of GPT-2 XL in bfloat16 with the default settings."""
    made = [
        Task(f"profile of {name}", partial(_profiled, device, name, work))
        for name, work in _STAGES.items()
    ]
    return [*made, Task("profile of all stages", _sum)]


def _made(device: str) -> Bench:
    toy = device == "cpu"
    made = gpu_speed.build(*(("gpt2-xl", "bfloat16") if not toy else gpu_speed.TOY), device)
    return replace(made, records=made.records[: 2 if toy else 64])


def _budget(made: Bench) -> int:
    return memory.token_budget(made.engine)


def _edit(made: Bench, edits: list[Edit]) -> None:
    value = replace(made.settings.value, steps=_EVALUATIONS, stop_below=0)
    settings = replace(made.settings, value=value)
    editor = Rome(made.engine, settings, made.templates, made.solver, _budget(made))
    edits[:] = editor.edit([record.request for record in made.records])


def _score(made: Bench, edits: list[Edit]) -> None:
    probabilities.score_records(made.engine, made.records, edits, _budget(made))


def _say(made: Bench, edits: list[Edit]) -> None:
    greedy.say_records(made.engine, made.records, edits, _budget(made))


def _write(made: Bench, edits: list[Edit]) -> None:
    starts = generation.record_starts(made.engine, made.records)
    settings = replace(made.generation, max_tokens=min(len(s.ids) for s in starts) + _TOKENS)
    generation.generate(made.engine, starts, edits, settings, _budget(made))


_STAGES: dict[str, Callable[[Bench, list[Edit]], None]] = {
    f"edit, {_EVALUATIONS} evaluations": _edit,
    "probabilities": _score,
    "greedy answers": _say,
    f"texts of {_TOKENS} tokens": _write,
}
_edits: list[Edit] = []


def _profiled(
    device: str, name: str, work: Callable[[Bench, list[Edit]], None], report: Report
) -> None:
    made = _made(device)
    if len(_edits) != len(made.records):
        _edit(made, _edits)

    def run() -> None:
        work(made, _edits)
        if device != "cpu":
            torch.cuda.synchronize()

    with perf.precision("bfloat16"):
        run()
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
        with profile(activities=activities) as profiler:
            run()
    report.profile.append({"stage": name, "host_seconds": seconds, **_found(profiler)})


def _found(profiler: profile) -> dict[str, Any]:
    """What a profile says. Seconds of the host under it are longer than without."""
    events: Any = profiler.key_averages()
    operators = [e for e in events if e.device_type.name == "CPU"]
    on_device = [e for e in events if e.device_type.name == "CUDA"]

    def count(*texts: str) -> int:
        return sum(e.count for e in operators if any(text in e.key for text in texts))

    def dearest(attribute: str) -> list[str]:
        chosen = sorted(operators, key=lambda e: -getattr(e, attribute))[:_DEAREST]
        return [
            f"{e.key} {getattr(e, attribute) / 1e6:.3g} s ({e.count:,})"
            for e in chosen
            if getattr(e, attribute)
        ]

    return {
        "device_seconds": sum(e.self_device_time_total for e in on_device) / 1e6,
        "launches": count("LaunchKernel", "GraphLaunch"),
        "synchronisations": count("Synchronize"),
        "dearest on the host": dearest("self_cpu_time_total"),
        "dearest on the device": dearest("self_device_time_total"),
    }


def _sum(report: Report) -> None:
    if not report.profile:
        return
    names = ("host_seconds", "device_seconds", "launches", "synchronisations")
    report.profile.append(
        {"stage": "all of these"}
        | {name: sum(row[name] for row in report.profile) for name in names}
        | {"dearest on the host": [], "dearest on the device": []}
    )
