"""The meter: the reference's way and the engine on the same records, in turn, in one process.

`python tests/perf.py --help`; docs/performance.md says how to read the table. Needs neither Ray,
Polars nor an installed package: with the repository's folder in PYTHONPATH, any Python with torch,
transformers, pyarrow and pyyaml will do.
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

import bench
import flops
import reference
import torch
import transformers
from bench import Bench
from rounds import ALLOWED, STAGES, Clock, Distance, Round, check, distance, run_engine, run_oracle

from rome.deltas import Edit
from rome.editors.rome import Rome
from rome.evaluation import TOKEN_BUDGETS


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
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    yield
    torch.set_float32_matmul_precision("highest")


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
    if len(stages) == len(STAGES):
        work["record"] = sum((work[stage] for stage in STAGES[1:]), work["edit"])
    return work


def measure(made: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both sides in turn, compared and summed up: what `--out` holds."""
    stages, device = options.stages, made.engine.device
    budget = options.token_budget or TOKEN_BUDGETS[device.type]
    rounds: dict[str, list[Round]] = {"oracle": [], "engine": []}
    edits: list[Edit] = []
    if "edit" not in stages:
        editor = Rome(made.engine, made.settings, made.templates, made.solver, budget)
        edits = editor.edit([record.request for record in made.records])
    apart = Distance()
    for i in range(options.repeats):
        if made.reference is not None:
            rounds["oracle"].append(run_oracle(made, stages, edits))
        with precision(options.dtype):
            rounds["engine"].append(run_engine(made, stages, edits, budget))
        if made.reference is not None:
            found = distance(rounds["oracle"][-1], rounds["engine"][-1])
            check(found, options.dtype, random=options.random is not None)
            apart = Distance(*map(max, asdict(apart).values(), asdict(found).values()))
        for side, done in rounds.items():
            if done:
                print(f"round {i + 1}: {side} {done[-1].seconds['record']:.1f} s", file=sys.stderr)
    with precision(options.dtype):
        rate = matmul_rate(device, made.engine.dtype)

    sizes = {"oracle": len(made.oracle_records), "engine": len(made.records)}
    rows = {}
    for name, work in useful_work(made, stages, rounds["engine"][-1]).items():
        row: dict[str, Any] = {"flops": work.flops / len(made.records)}
        for side, done in rounds.items():
            if done:
                every = [r.seconds[name] / sizes[side] for r in done]
                peaks = [r.peak_bytes.get(name, 0) for r in done]
                if name == "record":
                    peaks = [max(r.peak_bytes.values()) for r in done]
                row[side] = {"seconds": median(every), "every": every, "peak_bytes": max(peaks)}
        seconds = row["engine"]["seconds"]
        row["ratio"] = row["oracle"]["seconds"] / seconds if "oracle" in row else None
        row["tokens_per_second"] = work.tokens / len(made.records) / seconds
        row["share_of_matmul"] = row["flops"] / seconds / rate
        rows[name] = row
    return {
        "machine": _machine(device),
        "model": made.engine.name,
        "layer": made.settings.layer,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "matmul_flops_per_second": rate,
        "distance": None if made.reference is None else asdict(apart),
        "rows": rows,
    }


def _machine(device: torch.device) -> dict[str, Any]:
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
        f"{options['oracle_records']} by the oracle, median of {options['repeats']}; matmul "
        f"{result['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s",
        "",
        "| what | oracle s/record | engine s/record | ratio | tokens/s | GFLOP/record | TFLOP/s "
        "| of matmul | oracle peak GiB | engine peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        ours, theirs = row["engine"], row.get("oracle")
        cells = [
            name,
            f"{theirs['seconds']:.3g}" if theirs else "-",
            f"{ours['seconds']:.3g}",
            f"{row['ratio']:.3g}" if theirs else "-",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['flops'] / 1e9:.3g}",
            f"{row['flops'] / ours['seconds'] / 1e12:.3g}",
            f"{row['share_of_matmul']:.1%}",
            *(
                f"{s['peak_bytes'] / 2**30:.2f}" if s and s["peak_bytes"] else "-"
                for s in (theirs, ours)
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    apart = result["distance"]
    lines += [
        "",
        "No oracle: nothing was compared."
        if apart is None
        else _agreement(apart, options["stages"]),
    ]
    return "\n".join(lines)


def _agreement(apart: dict[str, float], stages: Sequence[str]) -> str:
    by_stage = {
        "edit": f"u {apart['direction']:.1e}, v* {apart['value']:.1e} (relative)",
        "probabilities": f"log p {apart['log_p']:.1e} nats",
        "generation": f"{apart['texts']:.0%} of texts differ",
    }
    return f"Engine from oracle, at most: {', '.join(by_stage[stage] for stage in stages)}."


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
    options = parser.parse_args(arguments)
    if not options.stages or not set(options.stages) <= set(STAGES):
        parser.error(f"--stages must be some of {','.join(STAGES)}, got {options.stages}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
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


if __name__ == "__main__":
    sys.exit(main())
