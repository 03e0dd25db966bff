"""How many records a second? The meter at full size, and several processes on one card.

`python -m tests.programs.gpu_speed SHAPE DTYPE DEVICE RECORDS TOKEN_BUDGET ROUNDS SHARE` is one.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from rome.models import memory
from tests.programs import bench, perf
from tests.programs.bench import Bench
from tests.programs.gpu_report import Report, Task
from tests.programs.rounds import STAGES, run_engine


@dataclass(frozen=True)
class Setting:
    """What is measured. Only the edit of the first setting begins in a cold process."""

    shape: str
    dtype: str
    records: int
    token_budget: int | None = None
    """None is the default of a run."""
    stages: tuple[str, ...] = ("row",)
    rounds: int = 2


@dataclass(frozen=True)
class Sharing:
    """So many processes share a card; each has a model and so many records at once."""

    setting: Setting
    workers: int


# Sized for five minutes on an H100.
_FULL: list[Setting | Sharing] = [
    Setting("gpt2-xl", "bfloat16", 128),
    Setting("gpt-j-6b", "bfloat16", 64),
    Setting("gpt2-xl", "tf32", 64),
    Sharing(Setting("gpt2-xl", "bfloat16", 64, rounds=1), 2),
    *(Setting("gpt2-xl", "bfloat16", 128, budget) for budget in (16_384, 65_536)),
    Setting("gpt2-xl", "bfloat16", 32, stages=STAGES),
    Setting("gpt2-xl", "float32", 32),
    Setting("gpt-j-6b", "bfloat16", 64, 16_384),
    Sharing(Setting("gpt2-xl", "bfloat16", 64, rounds=1), 3),
]

_TINY = json.dumps(
    {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 256,
        "vocab_size": 600,
        "initializer_range": 0.1,
    }
)
TOY = (_TINY, "bfloat16")
_TOY: list[Setting | Sharing] = [
    Setting(_TINY, "float32", 2, stages=STAGES),
    Setting(_TINY, "bfloat16", 2, 2048),
    Sharing(Setting(_TINY, "float32", 1, 2048, rounds=1), 2),
]


def tasks(device: str) -> list[Task]:
    made = []
    for item in _TOY if device == "cpu" else _FULL:
        if isinstance(item, Sharing):
            name = f"{item.workers} workers, {_named(item.setting)}"
            made.append(Task(name, partial(_share, device, item)))
        else:
            made.append(Task(_named(item), partial(_measure, device, item)))
    return made


def _named(setting: Setting) -> str:
    budget = f"{setting.token_budget:,}" if setting.token_budget else "by itself"
    return f"{_shape(setting)}, {setting.dtype}, {setting.records} records, budget {budget}"


def _shape(setting: Setting) -> str:
    return setting.shape if setting.shape in bench.SHAPES else "toy"


# The settings of one shape and dtype follow each other, as far as their order allows.
@lru_cache(maxsize=1)
def build(shape: str, dtype: str, device: str) -> Bench:
    """128 everyday facts and a random model, which takes the place of the last."""
    _free(device)
    return bench.build(
        source="",
        random=shape,
        records_file=None,
        records=128,
        oracle_records=0,
        layer=None,
        dtype=dtype,
        device=device,
    )


def _free(device: str) -> None:
    """Give back the memory of the last model, which the allocator would keep from others."""
    build.cache_clear()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def _measure(device: str, setting: Setting, report: Report) -> None:
    made = build(setting.shape, setting.dtype, device)
    made = replace(made, records=made.records[: setting.records])
    budget = setting.token_budget or memory.token_budget(made.engine)
    given = {
        "device": device,
        "dtype": setting.dtype,
        "random": setting.shape,
        "stages": ",".join(setting.stages),
        "repeats": setting.rounds,
        "records": setting.records,
        "oracle-records": 0,
        "token-budget": budget,
    }
    options = perf.parse([f"--{name}={value}" for name, value in given.items()])
    result = perf.measure(made, options)
    for what, row in result["rows"].items():
        engine = row["engine"]
        if not all(second > 0 for second in engine["every"]):
            raise ValueError(f"seconds must be above 0, got {engine['every']} for {what}")
        report.speed.append(
            _row(setting, 1, what, engine["seconds"])
            | {
                "first": engine["first"],
                "share_of_matmul": row.get("share_of_matmul"),
                "peak_bytes": engine["peak_bytes"],
                "token_budget_taken": budget,
                "matmul_flops_per_second": result["matmul_flops_per_second"],
                "parts": row.get("parts"),
            }
        )


def _row(setting: Setting, workers: int, what: str, seconds: float) -> dict[str, Any]:
    return {
        "shape": _shape(setting),
        "dtype": setting.dtype,
        "workers": workers,
        "records": setting.records,
        "token_budget": setting.token_budget,
        "what": what,
        "first": None,
        "seconds": seconds,
        "share_of_matmul": None,
        "peak_bytes": 0,
    }


def _share(device: str, sharing: Sharing, report: Report) -> None:
    """Edited and unedited rows by several processes, all warm, from one moment on."""
    setting = sharing.setting
    command = [sys.executable, "-m", "tests.programs.gpu_speed"]
    command += [setting.shape, setting.dtype, device]
    command += [str(setting.records), str(setting.token_budget or 0), str(setting.rounds)]
    command.append(str(1 / sharing.workers))
    _free(device)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",  # As Ray has it for a worker of one CPU.
    }
    with ExitStack() as stack:
        processes = []
        for _ in range(sharing.workers):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        _said(processes, "ready")
        began = time.perf_counter()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        _said(processes, "done")
        seconds = time.perf_counter() - began
    each = seconds / (sharing.workers * setting.records * setting.rounds)
    report.speed.append(_row(setting, sharing.workers, "rows, both", each))


def _said(processes: Sequence[subprocess.Popen[str]], word: str) -> None:
    for process in processes:
        assert process.stdout is not None
        if (line := process.stdout.readline().strip()) != word:
            raise RuntimeError(f"a worker must say {word!r}, it said {line!r} and ended")


def work(
    shape: str,
    dtype: str,
    device: str,
    records: int,
    token_budget: int,
    rounds: int,
    share: float,
) -> None:
    """One of several processes: warm up, wait for a line, work."""
    bench.without_nltk()
    made = build(shape, dtype, device)
    made = replace(made, records=made.records[:records])
    token_budget = token_budget or memory.token_budget(made.engine, share)
    with perf.precision(dtype):
        run_engine(made, ["row"], [], token_budget)
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(rounds):
            run_engine(made, ["row"], [], token_budget)
        if device != "cpu":
            torch.cuda.synchronize()
    print("done", flush=True)


if __name__ == "__main__":
    shape, dtype, device, records, budget, rounds, share = sys.argv[1:]
    work(shape, dtype, device, int(records), int(budget), int(rounds), float(share))
