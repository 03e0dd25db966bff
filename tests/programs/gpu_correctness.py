"""Does a device compute what the CPU computes, and leave nothing behind?

With `--device cpu` the other side is the CPU with CUDA's ways: its attention, its static shapes.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rome import models
from rome.editors.rome import Rome, RomeSettings
from rome.editors.values import ValueSettings
from rome.edits.deltas import dense
from rome.models import EditableModel, kernels
from rome.scoring import generation, probabilities
from rome.scoring.settings import GenerationSettings
from tests.programs import bench
from tests.programs.gpu_report import Report, Task
from tests.programs.rounds import Clock, Round
from tests.support import computations, tiny
from tests.support.computations import COMPUTATIONS, EDITORS, FAMILIES, RECORDS, distance
from tests.support.two_gpus import costs_like

# Relative, of float32: an H200 stayed within 2e-5 of a CPU. A mistake is of the order of one.
ROUNDING = 1e-3
# Adam on weights divides each element of a gradient by its own size, UltraEdit each input by its
# deviation, so that an element that is only rounding becomes a step: 1.8e-3 and 1.0e-3 were seen on
# an H200.
DIVIDED_ROUNDING = 1e-2
DIVIDING = ("edit ft", "edit attnedit", "edit lora", "ultraedit")


def tasks(device: str) -> list[Task]:
    """One for each family and computation, editor, and limit of memory."""
    made = [
        Task(f"{family}, {name}, on {device}", partial(_agrees, device, family, name))
        for family in FAMILIES
        for name in COMPUTATIONS
    ]
    made += [
        Task(f"{family}, edit {name}, A B A", partial(_comes_back, device, family, name))
        for family in FAMILIES
        for name in EDITORS
        if name != "none" and not name.endswith(("sequence", "together"))
    ]
    made += [
        Task(f"{name} in little memory", partial(_halves, device, name, work))
        for name, work in _LARGE.items()
    ]
    return [*made, Task("device: auto", partial(_spreads, device))]


def moved(model: EditableModel, device: str) -> EditableModel:
    """The model on the device, laid out as `load` does there."""
    hf: Any = model.hf
    hf.to(device)
    kernels.give_room(hf)
    return model


def ways_of_cuda(device: str) -> AbstractContextManager[Any]:
    """In the block, a CPU goes the ways that pay on CUDA."""
    return costs_like("cuda", "cpu") if device == "cpu" else nullcontext()


def _agrees(device: str, family: str, name: str, report: Report) -> None:
    if name.startswith("edit lora") and not _has_peft():
        report.left_out.append(f"{family}, {name}: it needs peft, which is not installed")
        return
    asked = COMPUTATIONS[name]
    expected = asked.compute(asked.make(family, "float32"))
    with ways_of_cuda(device):
        found = asked.compute(moved(asked.make(family, "float32"), device))
    apart = distance(found, expected)
    allowed = DIVIDED_ROUNDING if any(editor in name for editor in DIVIDING) else ROUNDING
    report.check(f"{family}, {name}, on {device}", apart <= allowed, f"{apart:.1e} from the CPU")


def _has_peft() -> bool:
    try:
        import peft  # noqa: F401
    except ImportError:
        return False
    return True


def _comes_back(device: str, family: str, name: str, report: Report) -> None:
    editor = EDITORS[name](moved(tiny.model(family, "float32"), device))
    first, _, again = (
        [dense(d).cpu() for edit in editor.edit([RECORDS[i].request]) for d in edit.deltas.values()]
        for i in (1, 3, 1)
    )
    apart = distance(again, first)
    same = all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    how = "A twice to the bit" if same else f"A twice within {apart:.1e}, not to the bit"
    report.check(f"{family}, edit {name}, A B A", apart <= ROUNDING, how)


# Logits of a large vocabulary take most of its memory.
_SHAPE = (
    '{"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, '
    '"vocab_size": 60000, "initializer_range": 0.1}'
)
_RECORDS = 24


def _edit(made: bench.Bench) -> Any:
    settings = RomeSettings(0, ValueSettings(steps=2, stop_below=0), second_moment=False)
    editor = Rome(made.engine, settings, made.templates, None, 10**6)
    edits = editor.edit([record.request for record in made.records])
    return [dense(delta).cpu() for edit in edits for delta in edit.deltas.values()]


def _score(made: bench.Bench) -> Any:
    edits = [generation.UNEDITED] * len(made.records)
    return probabilities.score_records(made.engine, made.records, edits, 10**6)


def _write(made: bench.Bench) -> Any:
    starts = generation.record_starts(made.engine, made.records) * 4
    edits = [generation.UNEDITED] * len(made.records)
    return generation.generate(made.engine, starts, edits, GenerationSettings(max_tokens=20), 10**6)


_LARGE: dict[str, Callable[[bench.Bench], Any]] = {
    "ROME": _edit,
    "scores": _score,
    "texts": _write,
}


def _halves(device: str, name: str, work: Callable[[bench.Bench], Any], report: Report) -> None:
    made = bench.build(
        source="",
        random=_SHAPE,
        records_file=None,
        records=_RECORDS,
        oracle_records=0,
        layer=0,
        dtype="float32",
        device=device,
    )
    done = Round()
    with Clock(done, torch.device(device)).stage("whole"):
        expected = work(made)
    peak = done.peak_bytes["whole"]
    with _warnings_of("rome.models.memory") as said, little_memory(device, peak // 2):
        found = work(made)
    apart = distance(found, expected)
    passed = bool(said) and apart <= ROUNDING
    report.check(
        f"{name} in little memory",
        passed,
        f"{len(said)} halvings with half of {peak / 2**20:.0f} MiB, {apart:.1e} from the whole",
    )


@contextmanager
def little_memory(device: str, more: int) -> Iterator[None]:
    """Give this process at most `more` bytes beyond those that it has."""
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    else:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def _warnings_of(name: str) -> Iterator[list[str]]:
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, logger = Keep(logging.WARNING), logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def _spreads(device: str, report: Report) -> None:
    """A model over all cards that there are."""
    if device == "cpu":
        report.left_out.append("device: auto: it needs a GPU")
        return
    try:
        import accelerate  # noqa: F401
    except ImportError:
        report.left_out.append("device: auto: it needs accelerate, which is not installed")
        return
    compute = computations.COMPUTATIONS["edit rome 1"].compute
    for family in FAMILIES:
        model = tiny.model(family, "float32")
        expected = compute(model)
        with tempfile.TemporaryDirectory() as folder:
            tiny.save(model, folder)
            spread = models.load(folder, "float32", "auto")
        cards = {str(parameter.device) for parameter in spread.hf.parameters()}
        apart = distance(compute(spread), expected)
        report.check(
            f"{family}, device: auto",
            apart <= ROUNDING and len(cards) == min(torch.cuda.device_count(), len(spread.layers)),
            f"on {', '.join(sorted(cards))}, {apart:.1e} from the CPU",
        )
