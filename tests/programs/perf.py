"""The meter: the reference's way and the engine on the same records, in turn, in one process.

`python -m tests.programs.perf --help`; docs/performance.md says how to read the table. In the
repository's folder any Python with torch, transformers, pyarrow and pyyaml will do.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from rome import models
from rome.editors.rome import Rome
from rome.edits.deltas import Edit
from rome.models import memory
from tests.programs import bench, counts, flops
from tests.programs.bench import Bench
from tests.programs.rounds import (
    ALLOWED,
    MODELS,
    RECORD_STAGES,
    STAGES,
    Clock,
    Distance,
    Round,
    check,
    distance,
    run_engine,
    run_oracle,
)
from tests.support import reference


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of many large square matmuls."""
    n, repeats = (8192, 20) if device.type == "cuda" else (2048, 8)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    round_ = Round()
    best = math.inf
    for _ in range(repeats):
        with Clock(round_, device).row("matmul"):
            a @ b
        best = min(best, round_.seconds.pop("matmul"))
    return 2 * n**3 / best


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """tf32 for what runs in the block, where that is the dtype."""
    models.use_precision(dtype)
    try:
        yield
    finally:
        models.use_precision("float32")


def useful_work(made: Bench, stages: Sequence[str], engine: Round) -> dict[str, flops.Work]:
    """Of the engine's records, by row."""
    model = made.engine
    costs = flops.Costs.of(model, made.settings.layer)
    work: dict[str, flops.Work] = {}
    if "edit" in stages:
        contexts = [reference.contexts(model, made.templates, r.request) for r in made.records]
        steps = [int(edit.health["steps"]) for edit in engine.edits]
        work["keys"], work["values"] = flops.edit(costs, contexts, steps)
        work["edit"] = work["keys"] + work["values"]
    if "probabilities" in stages:
        work["probabilities"] = flops.probabilities(costs, model, made.records)
    if "generation" in stages:
        work["generation"] = flops.generation(costs, model, made.records, made.generation)
    if set(RECORD_STAGES) <= set(stages):
        work["record"] = sum((work[stage] for stage in RECORD_STAGES[1:]), work["edit"])
    return work


def measure(made: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both sides in turn, compared and summed up: what `--out` holds."""
    stages, device = options.stages, made.engine.device
    budget = options.token_budget or memory.token_budget(made.engine)
    rounds: dict[str, list[Round]] = {"oracle": [], "engine": []}
    edits: list[Edit] = []
    if "edit" not in stages and set(stages) & set(RECORD_STAGES):
        editor = Rome(made.engine, made.settings, made.templates, made.solver, budget)
        edits = editor.edit([record.request for record in made.records])
    apart = Distance()
    for i in range(options.repeats):
        if made.reference is not None and set(stages) & set(RECORD_STAGES):
            rounds["oracle"].append(run_oracle(made, stages, edits))
        with precision(options.dtype):
            rounds["engine"].append(run_engine(made, stages, edits, budget))
        if rounds["oracle"]:
            found = distance(rounds["oracle"][-1], rounds["engine"][-1])
            check(found, options.dtype, random=options.random is not None)
            apart = Distance(*map(max, asdict(apart).values(), asdict(found).values()))
        for side, done in rounds.items():
            if done:
                seconds = sum(done[-1].seconds[name] for name in done[-1].peak_bytes)
                print(f"round {i + 1}: {side} {seconds:.1f} s", file=sys.stderr)
    with precision(options.dtype):
        rate = matmul_rate(device, made.engine.dtype)

    sizes = {"oracle": len(made.oracle_records), "engine": len(made.records)}
    rows: dict[str, Any] = {}
    work = useful_work(made, stages, rounds["engine"][-1])
    whole = [f"row, {name}" for name in MODELS] if "row" in stages else []
    for name in (*work, *whole):
        row: dict[str, Any] = {"ratio": None}
        for side, done in rounds.items():
            if done and name in done[0].seconds:
                row[side] = _summed_up(name, done, sizes[side])
        if "oracle" in row:
            row["ratio"] = row["oracle"]["seconds"] / row["engine"]["seconds"]
        if name in work:
            seconds = row["engine"]["seconds"] * sizes["engine"]
            row["flops"] = work[name].flops / sizes["engine"]
            row["tokens_per_second"] = work[name].tokens / seconds
            row["share_of_matmul"] = work[name].flops / seconds / rate
        else:
            parts = rounds["engine"][-1].parts[name.removeprefix("row, ")]
            row["parts"] = {part: s / sizes["engine"] for part, s in parts.items()}
        rows[name] = row
    return {
        "machine": machine(device),
        "model": made.engine.name,
        "layer": made.settings.layer,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "matmul_flops_per_second": rate,
        "distance": asdict(apart) if rounds["oracle"] else None,
        "rows": rows,
    }


def _summed_up(name: str, done: Sequence[Round], records: int) -> dict[str, Any]:
    """Seconds a record: in the first round, which is cold, and the median of those after it."""
    every = [r.seconds[name] / records for r in done]
    peaks = [r.peak_bytes.get(name, 0) for r in done]
    if name == "record":
        peaks = [max(r.peak_bytes[stage] for stage in RECORD_STAGES) for r in done]
    return {
        "first": every[0],
        "seconds": median(every[1:] or every),
        "every": every,
        "peak_bytes": max(peaks),
    }


def machine(device: torch.device) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    elif (info := Path("/proc/cpuinfo")).exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(result: dict[str, Any]) -> str:
    """The result as the Markdown of docs/performance.md."""
    options, machine = result["options"], result["machine"]
    lines = [
        f"{result['model']}, layer {result['layer']}, {options['dtype']}, {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, transformers "
        f"{machine['transformers']}; {options['records']} records by the engine, "
        f"{options['oracle_records']} by the oracle, median of the rounds after the first of "
        f"{options['repeats']}; matmul {result['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s",
        "",
        "| what | oracle s/record | first round | engine s/record | ratio | tokens/s "
        "| GFLOP/record | TFLOP/s | of matmul | oracle peak GiB | engine peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(_line(name, row) for name, row in result["rows"].items()),
    ]
    for name, row in result["rows"].items():
        if "parts" in row:
            parts = ", ".join(f"{part} {seconds:.2g}" for part, seconds in row["parts"].items())
            lines += ["", f"{name}, last round, s/record: {parts}."]
    apart = result["distance"]
    lines += [
        "",
        "No oracle: nothing was compared."
        if apart is None
        else _agreement(apart, options["stages"]),
    ]
    return "\n".join(lines)


def _line(name: str, row: dict[str, Any]) -> str:
    ours, theirs = row["engine"], row.get("oracle")
    cells = [
        name,
        f"{theirs['seconds']:.3g}" if theirs else "-",
        f"{ours['first']:.3g}",
        f"{ours['seconds']:.3g}",
        f"{row['ratio']:.3g}" if theirs else "-",
    ]
    if "flops" in row:
        cells += [
            f"{row['tokens_per_second']:,.0f}",
            f"{row['flops'] / 1e9:.3g}",
            f"{row['flops'] / ours['seconds'] / 1e12:.3g}",
            f"{row['share_of_matmul']:.1%}",
        ]
    else:
        cells += ["-"] * 4
    cells += [
        f"{side['peak_bytes'] / 2**30:.2f}" if side and side["peak_bytes"] else "-"
        for side in (theirs, ours)
    ]
    return f"| {' | '.join(cells)} |"


def _agreement(apart: dict[str, float], stages: Sequence[str]) -> str:
    by_stage = {
        "edit": f"u {apart['direction']:.1e}, v* {apart['value']:.1e} (relative)",
        "probabilities": f"log p {apart['log_p']:.1e} nats",
        "generation": f"{apart['texts']:.0%} of texts differ",
    }
    compared = [by_stage[stage] for stage in stages if stage in by_stage]
    return f"Engine from oracle, at most: {', '.join(compared)}."


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add: Callable[..., Any] = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", default="float32", choices=ALLOWED, help="the engine's; the oracle has float32")
    add("--threads", type=int, help="default: torch's")
    add("--model", default=bench.SMOLLM2, help="what rome.models.load takes")
    add("--random", metavar="CONFIG", help=f"random weights: {', '.join(bench.SHAPES)}, or JSON")
    add("--layer", type=int, help="default: configs/models, else a third of the depth")
    add("--records", type=int, default=24, help="by the engine")
    add("--oracle-records", type=int, default=2, help="the first of them; 0: engine alone")
    add("--records-file", type=Path, help="COUNTERFACT's JSON; default: everyday facts")
    add("--repeats", type=int, default=3, help="rounds of both sides in turn")
    add("--stages", type=lambda text: text.split(","), default=list(STAGES), help=",".join(STAGES))
    add("--token-budget", type=int, help="the engine's, as in a run's config")
    add("--out", type=Path, help="JSON of everything measured")
    add("--count", action="store_true", help="count the host's work for a device, without one")
    add("--count-records", type=int, default=4, help="records at once, with --count")
    options = parser.parse_args(arguments)
    if not options.stages or not set(options.stages) <= set(STAGES):
        parser.error(f"--stages must be some of {','.join(STAGES)}, got {options.stages}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if options.count:
        return _count(options)
    if bench.without_nltk():
        print("GE is left out of whole rows: there is no nltk", file=sys.stderr)
    try:
        made = bench.build(
            source=options.model,
            random=options.random,
            records_file=options.records_file,
            records=options.records,
            oracle_records=options.oracle_records,
            layer=options.layer,
            dtype=options.dtype,
            device=options.device,
        )
        result = measure(made, options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1))
    print(table(result))
    return 0


def _count(options: argparse.Namespace) -> int:
    """Of the shapes in `bench.NARROW`, or of the one that is asked for."""
    for shape in [options.random] if options.random else bench.NARROW:
        try:
            made = counts.build(shape, options.count_records)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{shape}, {options.count_records} records at once:")
        print("\n".join(counts.lines(counts.count(made))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
