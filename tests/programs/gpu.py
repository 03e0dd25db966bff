"""Is a GPU right, and how fast is it? One script for a machine that has one for a few minutes.

`make gpu`, or `python -m tests.programs.gpu` in the repository's folder, by any Python with torch,
transformers, pyarrow and pyyaml. docs/performance.md says how to read what it prints.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tests.programs import bench, gpu_correctness, gpu_profile, gpu_speed
from tests.programs.gpu_report import Report, Task

# A part, and the share of the time by which it ends; what it has not done by then is left out.
PARTS: dict[str, tuple[Callable[[str], list[Task]], float]] = {
    "correctness": (gpu_correctness.tasks, 0.4),
    "speed": (gpu_speed.tasks, 0.8),
    "profile": (gpu_profile.tasks, 1.0),
}


class TimeUpError(BaseException):
    """The time of a part is over. No library takes it for an error of its own."""


@contextmanager
def until(moment: float) -> Iterator[None]:
    """Raise TimeUpError in the block at a moment of `time.monotonic`."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeUpError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(moment - time.monotonic(), 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(tasks: Sequence[Task], report: Report, moment: float) -> None:
    """Each task in turn, and kept as soon as it is done. One that fails does not end the others."""
    for i, task in enumerate(tasks):
        began = time.monotonic()
        try:
            with until(moment):
                task.run(report)
        except TimeUpError:
            report.left_out += [f"{late.name}: no time was left" for late in tasks[i:]]
            return
        except KeyboardInterrupt:
            report.left_out += [f"{late.name}: it was interrupted" for late in tasks[i:]]
            raise
        except Exception as error:
            traceback.print_exc()
            report.check(task.name, False, f"{type(error).__name__}: {error}")
        finally:
            report.save()
        print(f"{task.name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add: Callable[..., Any] = parser.add_argument
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: every part at toy size")
    add("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    add("--seconds", type=float, default=400, help="in all; what is not done by then is said")
    add("--out", type=Path, default=Path("gpu.json"), help="JSON of all that the table says")
    options = parser.parse_args(arguments)
    if not options.parts or not set(options.parts) <= PARTS.keys():
        parser.error(f"--parts must be some of {','.join(PARTS)}, got {','.join(options.parts)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        print(
            "torch sees no GPU: look at nvidia-smi and at torch.version.cuda "
            f"(now {torch.version.cuda}), or try the script with --device cpu",
            file=sys.stderr,
        )
        return 2
    began = time.monotonic()
    report = Report(options.out, options.device)
    if bench.without_nltk():
        report.left_out.append("GE of whole rows: there is no nltk")

    def ended(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ended)
    interrupted = False
    chosen = [name for name in PARTS if name in options.parts]
    try:
        for name in chosen:
            tasks, share = PARTS[name]
            # The last of the parts that were chosen may use all the time.
            share = 1.0 if name == chosen[-1] else share
            run(tasks(options.device), report, began + share * options.seconds)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGTERM, before)
    report.seconds = time.monotonic() - began
    report.save()
    print(report.text())
    failed = [check for check in report.checks if not check.passed]
    print(f"gpu: {len(report.checks)} checks, {len(failed)} failed")
    return 130 if interrupted else int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
