"""Writes the documents that follow from the code: `make documents`.

docs/configuration.md: every key of a config, from the dataclasses. docs/metrics.md: every metric.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from cluster.settings import RunSettings
from jobs.judge import JudgePrompt
from jobs.runs.config import CorpusConfig, ModelConfig, RunConfig, SliceConfig, TemplateConfig
from jobs.tasks.tracing import TraceConfig
from jobs.tasks.training import DataConfig, TrainConfig
from rome.analysis.metrics import METRICS
from rome.editors import EDITORS
from rome.editors.training import TrainingSettings
from rome.editors.values import ValueSettings
from rome.edits.grouping import Grouping
from rome.scoring.settings import GenerationSettings, ScoringSettings, WildSettings
from rome.tracing import TraceSettings

DOCS = Path(__file__).parents[2] / "docs"

_SECTIONS: dict[str, tuple[str, type]] = {
    "A run": ("`configs/runs`, the file of `jobs.evaluate`.", RunConfig),
    "records": ("Of a run.", SliceConfig),
    "templates": ("Of a run.", TemplateConfig),
    "scoring": ("Of a run.", ScoringSettings),
    "scoring.wild": ("Of a run.", WildSettings),
    "scoring.generation": ("Of a run.", GenerationSettings),
    "workers": ("Of a run, a training, a trace.", RunSettings),
    "A row of `editors`": ("Beside the settings of its editor, below.", Grouping),
    "A model": ("`configs/models`; also the key `model` of a run.", ModelConfig),
    "model.second_moment": ("C = E[k k^T].", CorpusConfig),
    "value": ("Of the editors `rome` and `memit`: the optimisation of v*.", ValueSettings),
    "A training": ("`configs/train`, the file of `jobs.train`.", TrainConfig),
    "data": ("Of a training.", DataConfig),
    "training": ("Of a training.", TrainingSettings),
    "A trace": ("`configs/traces`, the file of `jobs.trace`.", TraceConfig),
    "trace": ("Of a trace.", TraceSettings),
    "A judge": ("`configs/judges`, the file of `jobs.judge --prompt`.", JudgePrompt),
}

_HEAD = """# Every key of a config

`python -m jobs.COMMAND CONFIG --set key=value` sets any of them: `--set workers.num_gpus=1`,
`--set editors.rome.value.steps=30`. A run's file names a model, whose file is
`configs/models/NAME.yaml`; settings of an editor come from here, then from the model's file, then
from the run's. `make documents` writes this page from the code, and a test compares the two.
"""


def configuration() -> str:
    """The text of docs/configuration.md."""
    parts = [_HEAD]
    for title, (about, kind) in _SECTIONS.items():
        parts += [f"## {title}\n\n{about}\n", *_table(kind)]
    for name, editor in EDITORS.items():
        parts += [f"## Editor `{name}`\n", *_table(editor.settings)]
    return "\n".join(parts)


def _table(kind: type) -> Iterator[str]:
    known = fields(kind)
    if not known:
        yield "It has no settings.\n"
        return
    yield "| key | type | default | what |\n|---|---|---|---|"
    told = _told(kind)
    for field in known:
        written = str(field.type).replace("|", "\\|")
        said = " ".join(told.get(field.name, "").split()).replace("|", "\\|")
        yield f"| `{field.name}` | `{written}` | {_default(field)} | {said} |"
    yield ""


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        value = "null" if field.default is None else str(field.default)
        return f"`{value.lower() if isinstance(field.default, bool) else value}`"
    return "required" if field.default_factory is MISSING else "its own defaults"


def _told(kind: type) -> dict[str, str]:
    """What stands below each attribute of a class and of those that it extends."""
    told: dict[str, str] = {}
    for part in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
        assert isinstance(body, ast.ClassDef)
        for one, other in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(one, ast.AnnAssign)
                and isinstance(one.target, ast.Name)
                and isinstance(other, ast.Expr)
                and isinstance(other.value, ast.Constant)
            ):
                told[one.target.id] = str(other.value.value)
    return told


_UNITS = {"%": "%", "points": "points: probabilities x 100", "bits": "bits"}


_METRICS_HEAD = """# Every metric

Screens and pages show a mean over records in the unit below; `summary.parquet`, JSON and LaTeX have
all x 100 as the paper. S is the harmonic mean of ES, PS and NS. `make documents` writes this page
from `rome/analysis/metrics.py`.

| metric | what it says | unit | table of | also |
|---|---|---|---|---|"""


def metrics() -> str:
    """The text of docs/metrics.md."""
    lines = [_METRICS_HEAD]
    for name, metric in METRICS.items():
        table = {"counterfact": "COUNTERFACT", "zsre": "zsRE", None: "both"}[metric.benchmark]
        cells = (f"`{name}`", _whole(name), _UNITS[metric.unit], table, metric.caption)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _whole(name: str) -> str:
    """A meaning that goes on from the one before, after it."""
    names = list(METRICS)
    meaning = METRICS[name].meaning
    place = names.index(name)
    while meaning.startswith("..."):
        before = next(
            METRICS[other].meaning
            for other in reversed(names[:place])
            if METRICS[other].unit == METRICS[name].unit
            and not METRICS[other].meaning.startswith("...")
        )
        meaning = before + meaning[3:]
    return meaning


PAGES = {"configuration.md": configuration, "metrics.md": metrics}

if __name__ == "__main__":
    for file, text in PAGES.items():
        (DOCS / file).write_text(text(), "utf-8")
