"""A summary as the paper's Table 4: for the terminal, in Markdown, in LaTeX."""

from __future__ import annotations

from typing import Any

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.table import Table

from rome.summary import METRICS

_LABELS = {"none": "unedited"}
_COUNTS = ("n", "dead")
_CAPTION = (
    "All x 100; ± is 1.96 std / sqrt(n) over records. "
    "summary.parquet also has 95 % bootstrap intervals clustered by relation."
)
# Without the sign of a zero.
_VALUE = "{:z.1f}"
_LATEX_ESCAPES = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def terminal(frame: pl.DataFrame) -> Table:
    """Half-widths stand below their values, so that the table fits 80 columns."""
    names = _names(frame)
    table = Table(title=_title(frame), box=SIMPLE_HEAD, padding=0, caption=_CAPTION)
    for name in names:
        table.add_column(name.capitalize())
    for name in (*METRICS, *_COUNTS):
        table.add_column(name, justify="right", no_wrap=True)
    for row in frame.to_dicts():
        metrics = [_metric(row, name, "\n±{:.1f}") for name in METRICS]
        table.add_row(*_labels(row, names), *metrics, *_counts(row))
    return table


def markdown(frame: pl.DataFrame) -> str:
    names = _names(frame)
    header = [*(name.capitalize() for name in names), *METRICS, *_COUNTS]
    ruler = ["---"] * len(names) + ["---:"] * (len(header) - len(names))
    rows = [
        [
            *(label.replace("|", "\\|") for label in _labels(row, names)),
            *(_metric(row, name, " (± {:.1f})") for name in METRICS),
            *_counts(row),
        ]
        for row in frame.to_dicts()
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows)]
    text = [f"**{_title(frame)}**", "", *lines, "", _CAPTION, "", *(f"- {n}" for n in notes(frame))]
    return "\n".join(text).rstrip() + "\n"


def latex(frame: pl.DataFrame) -> str:
    """A `tabular` for the package booktabs, half-widths in brackets as in the paper."""
    names = _names(frame)
    header = [*(name.capitalize() for name in names), *METRICS, *_COUNTS]
    rows = [
        [
            *(label.translate(_LATEX_ESCAPES) for label in _labels(row, names)),
            *(_metric(row, name, " ({:.1f})") for name in METRICS),
            *_counts(row),
        ]
        for row in frame.to_dicts()
    ]
    columns = "l" * len(names) + "r" * (len(header) - len(names))
    return "\n".join(
        [
            *(f"% {line}" for line in (_title(frame), _CAPTION, *notes(frame))),
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            rf"{' & '.join(header)} \\",
            r"\midrule",
            *(rf"{' & '.join(row)} \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def notes(frame: pl.DataFrame) -> list[str]:
    """What a reader of the table has to know, one sentence an editor and matter."""
    return [note for row in frame.to_dicts() for note in _row_notes(row)]


def _row_notes(row: dict[str, Any]) -> list[str]:
    who, done = f"{row['run']}, {_label(row)}", row["n"] + row["dead"]
    partial = [
        f"{name} over {row[f'{name}_n']}" for name in METRICS[1:] if 0 < row[f"{name}_n"] < row["n"]
    ]
    found = {
        f"in progress, {done} of {row['records']} records": done < row["records"],
        f"dead letters: {row['dead']}, not in the means": row["dead"],
        f"duplicate rows dropped: {row['duplicates']}": row["duplicates"],
        f"partial metrics: {', '.join(partial)} of {row['n']} records": partial,
    }
    return [f"{who}: {text}." for text, true in found.items() if true]


def _names(frame: pl.DataFrame) -> list[str]:
    """The columns that tell the rows apart: the editor, and what else differs."""
    return [*(name for name in ("run", "benchmark", "model") if _differs(frame, name)), "editor"]


def _title(frame: pl.DataFrame) -> str:
    same = [name for name in ("run", "benchmark", "model") if not _differs(frame, name)]
    return " · ".join(str(v) for name in same for v in frame[name].drop_nulls().unique())


def _differs(frame: pl.DataFrame, name: str) -> bool:
    return frame[name].drop_nulls().n_unique() > 1


def _labels(row: dict[str, Any], names: list[str]) -> list[str]:
    return [_label(row) if name == "editor" else row[name] or "" for name in names]


def _label(row: dict[str, Any]) -> str:
    return _LABELS.get(row["editor"], str(row["editor"]))


def _counts(row: dict[str, Any]) -> list[str]:
    return [str(row[name]) for name in _COUNTS]


def _metric(row: dict[str, Any], name: str, half_width: str) -> str:
    if row[name] is None:
        return "–"
    width = row[f"{name}_half_width"]
    return _VALUE.format(row[name]) + ("" if width is None else half_width.format(width))
