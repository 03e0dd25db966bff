"""A summary as the paper's Table 4 (COUNTERFACT) or Table 1 (zsRE): terminal, Markdown, LaTeX.

Where the paper has a row for the benchmark and model, it stands below the measured one. A second
table has the metrics that the paper does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import polars as pl
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from tabulate import tabulate

from jobs.runs.labels import UNEDITED
from rome.analysis.metrics import METRICS, SUCCESSES, table_of
from rome.analysis.own_metrics import caption_of, named_in
from rome.paths import CONFIGS

_COUNTS = ("n", "dead")
_CAPTION = (
    "{scale}; ± is 1.96 std / sqrt(n) over records. "
    "summary.parquet also has 95 % bootstrap intervals clustered by relation."
)

Row = dict[str, Any]


class _Form(NamedTuple):
    """How the numbers of a table are written; `{}` takes a half-width, or a change in per cent."""

    half_width: str
    change: str
    paper: bool = False
    """All x 100 as in the paper; else in the units of `Metric.unit`."""


_TERMINAL = _Form("\n±{}", "\n{:+z.1f} %")
_MARKDOWN = _Form(" (± {})", ", {:+z.1f} %")
_LATEX = _Form(" ({})", "", paper=True)


class _Block(NamedTuple):
    """One table: its metrics and the rows of the summary, or of the paper, in it."""

    metrics: Sequence[str]
    rows: list[Row]


def terminal(frame: pl.DataFrame) -> Group:
    """Half-widths stand below their values, so that a table fits 80 columns."""
    names, blocks = _names(frame), _blocks(frame)
    tables = []
    for i, block in enumerate(blocks):
        table = Table(box=SIMPLE_HEAD, padding=0)
        table.title = None if i else _title(frame)
        table.caption = _caption(blocks, _TERMINAL) if i == len(blocks) - 1 else None
        for place, name in enumerate(_header(names, block)):
            number = place >= len(names)
            table.add_column(name, justify="right" if number else "left", no_wrap=number)
        for cells in _cells(names, block, _TERMINAL):
            table.add_row(*cells)
        tables.append(table)
    return Group(*tables)


def brief(frame: pl.DataFrame) -> str:
    """The rates of a benchmark and their number of records alone, a line an editor."""
    block = _measured(frame)[0]
    rates = [name for name in block.metrics if name in ("S", *SUCCESSES, *table_of("zsre"))]
    rows = [
        [_label(row), *(on_screen(name, row[name]) for name in rates), str(row["n"])]
        for row in block.rows
    ]
    return _written("plain", ["", *rates, "n"], rows, 1)


def markdown(frame: pl.DataFrame) -> str:
    names, blocks = _names(frame), _blocks(frame)
    text = [f"**{_title(frame)}**", ""]
    for block in blocks:
        text += [pipes(_header(names, block), _cells(names, block, _MARKDOWN), len(names)), ""]
    text += [_caption(blocks, _MARKDOWN), "", *(f"- {note}" for note in notes(frame))]
    return "\n".join(text).rstrip() + "\n"


def latex(frame: pl.DataFrame) -> str:
    """A `tabular` a table for the package booktabs, half-widths in brackets as in the paper."""
    names, blocks = _names(frame), _blocks(frame)
    text = [f"% {line}" for line in (_title(frame), _caption(blocks, _LATEX), *notes(frame))]
    for block in blocks:
        cells = _cells(names, block, _LATEX)
        text += [_written("latex_booktabs", _header(names, block), cells, len(names)), ""]
    return "\n".join(text)


def pipes(header: Sequence[str], rows: Sequence[Sequence[str]], labels: int) -> str:
    """A Markdown table whose first `labels` columns are words, and the others numbers."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return _written("pipe", header, escaped, labels)


def _written(form: str, header: Sequence[str], rows: Sequence[Sequence[str]], labels: int) -> str:
    aligned = ["left"] * labels + ["right"] * (len(header) - labels)
    return tabulate(rows, header, tablefmt=form, disable_numparse=True, colalign=aligned)


def _header(names: Sequence[str], block: _Block) -> list[str]:
    return [*(name.capitalize() for name in names), *block.metrics, *_COUNTS]


def _cells(names: list[str], block: _Block, form: _Form) -> list[list[str]]:
    before = {row["run"]: row["GE"] for row in block.rows if _label(row) == UNEDITED}
    return [
        [*_labels(row, names), *_numbers(row, block.metrics, before.get(row["run"]), form)]
        for row in block.rows
    ]


def notes(frame: pl.DataFrame) -> list[str]:
    """Notes that a reader of the table needs, one sentence an editor and matter."""
    return list(
        dict.fromkeys(
            note
            for metrics, rows in _measured(frame)
            for row in rows
            for note in _row_notes(row, [name for name in metrics if name != "S"])
        )
    )


def _row_notes(row: Row, metrics: Sequence[str]) -> list[str]:
    who, done = f"{row['run']}, {_label(row)}", row["n"] + row["dead"]
    some = [
        f"{name} over {row[f'{name}_n']}" for name in metrics if 0 < row[f"{name}_n"] < row["n"]
    ]
    lost = [name for name in SUCCESSES if name in metrics and row["n"] and not row[f"{name}_n"]]
    found = {
        f"in progress, {done} of {row['records']} records": done < row["records"],
        f"dead letters: {row['dead']}, not in the means": row["dead"],
        f"records with numbers that are not finite ({row['not_finite_in']}): {row['not_finite']}, "
        "not in the means that they would be in": row["not_finite"],
        f"duplicate rows dropped: {row['duplicates']}": row["duplicates"],
        f"partial metrics: {', '.join(some)} of {row['n']} records": some,
    }
    told = [f"{who}: {text}." for text, true in found.items() if true]
    if lost:
        told.append(
            f"{row['run']}: no {' and no '.join(lost)}, and so no S, since its records have no "
            "such prompts; jobs.prepare says why."
        )
    return told


def _measured(frame: pl.DataFrame) -> list[_Block]:
    """The rows with the paper's metrics of their benchmark, then with the others that some have."""
    rows = frame.to_dicts()
    # An editor that has not begun has no metric: what its run is of, the others know.
    runs = {row["run"] for row in rows if row["ES"] is None and row["efficacy"] is not None}
    zsre = [row for row in rows if row["run"] in runs]
    others = [row for row in rows if row["run"] not in runs]
    named = [*table_of(None), *named_in(frame.columns)]
    extra = [name for name in named if any(row[name] is not None for row in rows)]
    blocks = (
        _Block(table_of("counterfact"), others),
        _Block(table_of("zsre"), zsre),
        _Block(extra, rows),
    )
    return [block for block in blocks if block.metrics and block.rows]


def _blocks(frame: pl.DataFrame) -> list[_Block]:
    return [
        _Block(metrics, list(_with_published(metrics, rows))) for metrics, rows in _measured(frame)
    ]


def _with_published(metrics: Sequence[str], rows: Sequence[Row]) -> Iterator[Row]:
    for row in rows:
        yield row
        there = published(row)
        if not there.keys().isdisjoint(metrics):
            others = [*metrics, *(f"{name}_half_width" for name in metrics), *_COUNTS]
            label = {"editor": f"{_label(row)}, published"}
            yield row | dict.fromkeys(others) | there | label


def published(row: Row) -> dict[str, float]:
    """Metric -> the paper's value x 100, of a row of a summary; empty where it has none."""
    of_model = _published().get(row["benchmark"], {}).get(row["model"], {})
    found: dict[str, float] = of_model.get(row["editor"], {})
    return found


@cache
def _published() -> dict[str, Any]:
    """Benchmark -> model -> row of the table -> metric -> the paper's value."""
    found: dict[str, Any] = yaml.safe_load((CONFIGS / "published.yaml").read_text("utf-8"))
    return found


def _caption(blocks: Sequence[_Block], form: _Form) -> str:
    shown = [name for block in blocks for name in block.metrics if name != "S"]
    in_bits = [name for name in shown if is_in_bits(name)]
    scale = "All x 100" if form.paper else "In %, magnitudes in points"
    if in_bits and not form.paper:
        scale += f", {in_bits[0]} in bits with its change against unedited"
    captions = dict.fromkeys(filter(None, map(caption_of, shown)))
    return _CAPTION.format(scale=scale) + (f" {'; '.join(captions)}." if captions else "")


def _names(frame: pl.DataFrame) -> list[str]:
    """The columns that tell the rows apart: the editor, and what else differs."""
    return [*(name for name in ("run", "benchmark", "model") if _differs(frame, name)), "editor"]


def _title(frame: pl.DataFrame) -> str:
    same = [name for name in ("run", "benchmark", "model") if not _differs(frame, name)]
    return " · ".join(str(v) for name in same for v in frame[name].drop_nulls().unique())


def _differs(frame: pl.DataFrame, name: str) -> bool:
    return frame[name].drop_nulls().n_unique() > 1


def _labels(row: Row, names: list[str]) -> list[str]:
    return [_label(row) if name == "editor" else row[name] or "" for name in names]


def _label(row: Row) -> str:
    return UNEDITED if row["editor"] == "none" else str(row["editor"])


def _numbers(row: Row, metrics: Sequence[str], before: float | None, form: _Form) -> list[str]:
    """The cells of the metrics and counts; `before`: GE of the unedited model in the run."""
    cells = [_metric(row, name, form) for name in metrics]
    measured = row["n"] is not None and row["GE"] is not None and row["editor"] != "none"
    if before and measured and "GE" in metrics:
        cells[metrics.index("GE")] += form.change.format(change(row["GE"], before))
    return cells + ["–" if row[name] is None else str(row[name]) for name in _COUNTS]


def _metric(row: Row, name: str, form: _Form) -> str:
    value, width = row[name], row[f"{name}_half_width"]
    if value is None:
        return "–"
    written = (lambda number: f"{number:z.1f}") if form.paper else partial(on_screen, name)
    return written(value) + ("" if width is None else form.half_width.format(written(width)))


def on_screen(metric: str, value: float | None, sign: str = "") -> str:
    """A mean of a summary, which has all x 100, in the metric's own unit; `sign`: + for changes."""
    if value is None:
        return "–"
    if is_in_bits(metric):
        return f"{value / 100:{sign}z.2f}"
    return f"{value:{sign}z.1f}"


def is_in_bits(metric: str) -> bool:
    return metric in METRICS and METRICS[metric].unit == "bits"


def change(now: float, before: float) -> float:
    """In per cent of what it was before."""
    return 100 * (now / before - 1)
