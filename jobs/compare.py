"""python -m jobs.compare RUN_DIR... [--metric ES ...] [--format FORMAT] [--out FILE]

Every pair of editors of one or more runs, compared on the records that both have.
"""

from __future__ import annotations

from jobs.commands.compare import Format
from jobs.commands.compare import app as app

if __name__ == "__main__":
    app()  # It comes back for what follows as a module.

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from cluster.store import Store
from jobs import cli
from jobs.cli import say
from jobs.output.tables import on_screen, pipes
from jobs.runs import differences, manifests
from jobs.runs.labels import differing_notes, row_labels
from jobs.runs.parts import collect
from rome.analysis import comparison
from rome.analysis.metrics import SUCCESSES, harmonic_mean, table_of
from rome.analysis.own_metrics import metrics_in
from rome.analysis.summary import with_metrics
from rome.data.results import OK


def read(run_dirs: Sequence[str]) -> pl.DataFrame:
    """The result rows of all runs with their metrics, one per (`label`, `case_id`).

    Labels are those of `jobs.runs.labels.row_labels`, in the order of the runs' manifests.
    Raises ValueError where a path is no run directory with results, where one is given twice, or
    where runs differ in what makes their numbers comparable: benchmark, weights, protocol or
    scoring.
    """
    runs = manifests.of_runs(run_dirs)
    for one, other in pairwise(runs):
        _refuse_another((one, runs[one]), (other, runs[other]))
    found = {
        uri: collect(
            Store(uri), lambda rows: with_metrics(rows).collect(), manifests.origin(runs[uri])
        ).with_columns(folder=pl.lit(uri))
        for uri in runs
    }
    editors = {
        uri: list(dict.fromkeys([*runs[uri]["editors"], *rows["editor"].unique().sort()]))
        for uri, rows in found.items()
    }
    labels = row_labels(runs, editors)
    known = pl.DataFrame(
        [(*key, label, place) for place, (key, label) in enumerate(labels.items())],
        schema=["folder", "editor", "label", "place"],
        orient="row",
    )
    return (
        pl.concat(found.values(), how="diagonal")
        .join(known, on=["folder", "editor"], maintain_order="left")
        .pipe(lambda rows: rows.with_columns(_over_orders(list(metrics_in(rows.lazy())))))
        # As in the summary, a scored row is kept in preference to a dead letter.
        .sort("place", pl.col("status") != OK, maintain_order=True)
        .unique(("label", "case_id"), keep="first", maintain_order=True)
        .drop("place")
    )


def _over_orders(metrics: Sequence[str]) -> list[pl.Expr]:
    """A record's numbers in a chain: their mean over the orders that the chain was made in."""
    chained = pl.when(pl.col("order").is_not_null())
    means = (pl.col(name).mean().over("label", "case_id") for name in metrics)
    return [
        chained.then(mean).otherwise(name).alias(name)
        for name, mean in zip(metrics, means, strict=True)
    ]


def ranked(rows: pl.DataFrame) -> list[str]:
    """The labels of `read`, the best first, by S or what there is of it; the unedited last."""
    scores = [*SUCCESSES, *table_of("zsre")]
    means = rows.group_by("label", maintain_order=True).agg(
        (pl.col("editor") == "none").first().alias("unedited"),
        pl.col(scores).filter(pl.col("status") == OK).mean(),
    )
    score = pl.coalesce(harmonic_mean(), pl.mean_horizontal(scores))
    best_first = means.sort(
        "unedited", score, descending=[False, True], nulls_last=True, maintain_order=True
    )
    return best_first["label"].to_list()


def paired(rows: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    """`rome.analysis.comparison.compare` of all pairs, each the better minus the worse.

    First all editors minus the unedited model, then the best minus the others, and so on.
    """
    order = ranked(rows)
    places = pl.col("label").replace_strict({label: i for i, label in enumerate(order)})
    pairs = comparison.compare(rows.sort(places, maintain_order=True), metrics)
    unedited = rows.filter(editor="none")["label"].unique()
    return pairs.sort(~pl.col("b").is_in(unedited.implode()), maintain_order=True)


def _refuse_another(one: tuple[str, Any], other: tuple[str, Any]) -> None:
    there, now = (
        {key: manifest.get(key) for key in ("benchmark", "model_fingerprint", "protocol")}
        | {"scoring": manifest.get("config", {}).get("scoring")}
        for _, manifest in (one, other)
    )
    if changed := differences.difference(there, now):
        raise ValueError(
            "runs can be compared if benchmark, weights, protocol and scoring are the same; "
            f"{other[0]} differs from {one[0]}, which is 'there':\n" + "\n".join(changed)
        )


def compare(
    run_dirs: Sequence[str], metrics: Sequence[str]
) -> tuple[pl.DataFrame, pl.DataFrame, list[str]]:
    """`paired` and `rome.analysis.comparison.health` of the editors of the runs, see `read`, and
    notes that a reader of them needs.

    `metrics`: empty for those of the paper's table of the benchmark.
    """
    rows = read(run_dirs)
    if not metrics:
        counterfact = [name for name in table_of("counterfact")[1:] if rows[name].count()]
        metrics = counterfact or table_of("zsre")
    return paired(rows, metrics), comparison.health(rows), _notes(rows)


def _notes(rows: pl.DataFrame) -> list[str]:
    odd = rows.filter(pl.col("not_finite") > 0).group_by("label", maintain_order=True).len()
    return [
        f"note: {count} records of {label} have numbers that are not finite; they are in no pair "
        "that would need them"
        for label, count in odd.iter_rows()
    ]


Cell = Callable[[dict[str, Any]], str]

TESTS = {"mcnemar": "McNemar", "wilcoxon": "Wilcoxon"}
"""The tests of `rome.analysis.comparison`, as readers know them."""


def probability(p: float) -> str:
    """Of a test; no probability is 0."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def interval(row: dict[str, Any]) -> str:
    """The 95 % interval of a pair's difference."""
    if row["low"] is None:
        return "–"
    low, high = (on_screen(row["metric"], row[end], "+") for end in ("low", "high"))
    return f"{low} to {high}"


_METRIC: dict[str, Cell] = {"Metric": lambda row: row["metric"]}
_NUMBERS: dict[str, Cell] = {
    "A": lambda row: on_screen(row["metric"], row["mean_a"]),
    "B": lambda row: on_screen(row["metric"], row["mean_b"]),
    "A − B": lambda row: on_screen(row["metric"], row["difference"], "+"),
    "95 %": interval,
    "p": lambda row: probability(row["p"]),
    "p (Holm)": lambda row: probability(row["p_holm"]),
    "Test": lambda row: TESTS[row["test"]],
}
# A block of the terminal says who is who, and how many, above it.
_BLOCK = _METRIC | {name: cell for name, cell in _NUMBERS.items() if name != "p"}
_PAIRS: dict[str, Cell] = {
    **_METRIC,
    "Editor A": lambda row: row["a"],
    "Editor B": lambda row: row["b"],
    "n": lambda row: f"{row['n']}",
    **_NUMBERS,
}
_PAIRS_CAPTION = (
    "In %, magnitudes in points, GE in bits, over the records that both have; 95 %: bootstrap "
    "clustered by relation; p (Holm): adjusted for all pairs and metrics shown. McNemar: the exact "
    "test of records that are right or wrong; Wilcoxon: that of signed ranks, of the others."
)


def _count(name: str) -> Cell:
    return lambda row: "–" if row[name] is None else str(row[name])


_COLUMNS = 79
_WORDS = ("Metric", "Editor", "Test")
_HEALTH: dict[str, Cell] = {
    "Editor": lambda row: row["label"],
    "Edits": _count("n"),
    "Small\ndivisor": _count("small_divisor"),
    "Large\nnorm": _count("large_norm"),
    "Low\nentropy": _count("low_entropy"),
    "Disabling": _count("disabling"),
}
_HEALTH_CAPTION = (
    f"Small divisor: below {comparison.SMALL_DIVISOR:g} of the editor's median. "
    f"Disabling: the update's norm is above {comparison.LARGE_NORM:g} times the editor's median, "
    f"or GE below {comparison.LOW_ENTROPY:g} of the unedited model's on the same record."
)


def _blocks(pairs: pl.DataFrame) -> Iterator[Table]:
    """A table for each pair, none wider than 80 columns; no number is cut."""
    for (a, b), found in pairs.group_by("a", "b", maintain_order=True):
        counts = sorted({row["n"] for row in found.to_dicts()})
        n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        yield _terminal(found, _BLOCK, title=f"A: {a}   B: {b}   n: {n}")


def _terminal(frame: pl.DataFrame, cells: dict[str, Cell], **options: Any) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", **options)
    for name in cells:
        table.add_column(name, justify="left" if name in _WORDS else "right", no_wrap=True)
    for row in frame.to_dicts():
        table.add_row(*(cell(row) for cell in cells.values()))
    return table


def _markdown(frame: pl.DataFrame, cells: dict[str, Cell], caption: str) -> str:
    rows = [[cell(row) for cell in cells.values()] for row in frame.to_dicts()]
    header = [name.replace("\n", " ") for name in cells]
    return f"{pipes(header, rows, len(cells))}\n\n{caption}\n"


def main(
    run_dirs: list[str],
    metric: list[str] | None = None,
    format: Format = Format.TABLE,
    out: Path | None = None,
) -> None:
    """See `jobs.commands.compare`."""
    with cli.errors():
        pairs, health, notes = compare(run_dirs, metric or [])
        notes += differing_notes(manifests.of_runs(run_dirs))
        if out:
            pairs.write_parquet(out)
    if format == Format.TABLE:
        cli.print_table(Group(*_blocks(pairs)))
        cli.tell(fill(_PAIRS_CAPTION, _COLUMNS))
        if len(health):
            cli.print_table(_terminal(health, _HEALTH))
            cli.tell(fill(_HEALTH_CAPTION, _COLUMNS))
    else:
        cli.tell(_markdown(pairs, _PAIRS, _PAIRS_CAPTION))
        if len(health):
            cli.tell(_markdown(health, _HEALTH, _HEALTH_CAPTION))
    for note in notes:
        say(note)
