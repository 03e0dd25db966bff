"""python -m jobs.report RUN_DIR... [--out report.html] [--texts 2] [--records all]

Runs as one page that needs no network: who is best and what holds, charts, and a browser of all
records. It writes nothing into the runs.
"""

from __future__ import annotations

from jobs.commands.report import app as app

if __name__ == "__main__":
    app()  # It comes back for what follows as a module.

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from rich.progress import track

from cluster.store import Store
from jobs import cli
from jobs.cli import say
from jobs.compare import TESTS, interval, paired, probability, ranked, read
from jobs.output import leaderboard, report_charts, report_data, tables
from jobs.output.pages import packed, render
from jobs.reduce import reduce
from jobs.runs import manifests
from jobs.runs.labels import Runs, differing_notes, row_labels
from jobs.runs.parts import SWEEP
from rome.analysis import comparison, failures
from rome.analysis.failures import FAILURES
from rome.analysis.metrics import METRICS, SUCCESSES, table_of
from rome.analysis.own_metrics import caption_of, named_in
from rome.data.results import ERROR, OK
from rome.paths import CONFIGS

_FIGURES = "figures/"
_WAY_OUT = "Give what jobs.evaluate, jobs.sweep or jobs.trace wrote to."
_DEAD_SHOWN = 200
_AT_FIRST = 2
"""Edited editors that the browser shows at first."""


def report(
    run_dirs: Sequence[str], texts: int, records: str = "", moved: str | None = None
) -> tuple[str, list[str]]:
    """The page of runs of one benchmark and model, and of the sweeps and traces given with them;
    and what whoever made it should know.

    `texts`: how many generated texts a record and editor are shown with; the parts have them all.
    `records`: see `report_data.chosen`; `moved`: see `report_data.read_prompts`.
    Raises ValueError where a path is no run with results, where runs cannot be compared (see
    `jobs.compare.read`), or where all are sweeps or traces.
    """
    stores = [Store(run_dir) for run_dir in run_dirs]
    manifest_of = {store.uri: manifests.read(store, (), _WAY_OUT) for store in stores}
    runs = {
        store.uri: manifest_of[store.uri]
        for store in stores
        if "editors" in manifest_of[store.uri] and not store.exists(SWEEP)
    }
    if not runs:
        raise ValueError(
            "a report needs a run of jobs.evaluate; sweeps and traces add their figures to it. "
            f"Got {', '.join(run_dirs)}."
        )
    rows = failures.with_failures(read(list(runs)))
    summary = _labelled(runs)
    prompts, notes = report_data.read_prompts(runs, moved)
    benchmark = "counterfact" if rows["ES"].count() else "zsre"
    metrics, extra = (
        [name for name in names if _has(summary, name)]
        for names in (
            table_of(benchmark),  # type: ignore[arg-type]
            [*table_of(None), *named_in(summary.columns)],
        )
    )
    per_record = [name for name in metrics if name != "S"]
    rates = [m for m in (SUCCESSES if benchmark == "counterfact" else metrics) if m in per_record]
    order = ranked(rows)
    pairs = paired(rows, per_record) if len(order) > 1 else pl.DataFrame()
    board = leaderboard.board(rows, summary, order, benchmark)
    names = yaml.safe_load((CONFIGS / "relations.yaml").read_text("utf-8"))
    details = report_data.chosen(rows, records)
    unedited = [label for label in order if label in set(rows.filter(editor="none")["label"])]
    edited = [label for label in order if label not in unedited]
    charts = [
        report_charts.differences(pairs, rates, order[0]),
        report_charts.relations(rows, rates, names, order),
        report_charts.spreads(rows, per_record, order),
        report_charts.health(rows, rates, order),
    ]
    drawn = {chart.name: chart for chart in charts if chart is not None}
    page = render(
        "report",
        parts=("leaderboard", "charts", "records"),
        libraries=[report_charts.library()],
        title=" · ".join(dict.fromkeys(str(manifest["name"]) for manifest in runs.values())),
        facts=leaderboard.facts(runs, rows),
        verdict=leaderboard.verdict(board, pairs),
        board=board,
        records_link=leaderboard.records_link,
        summary=summary.to_dicts(),
        tables=[names_of for names_of in (metrics, extra) if names_of],
        on_screen=tables.on_screen,
        metrics=METRICS,
        captions={name: caption_of(name) for name in extra if name not in METRICS},
        copies={
            "Markdown": tables.markdown(summary),
            "CSV": summary.drop("label").write_csv(),
            "LaTeX": tables.latex(summary),
        },
        notes=[*tables.notes(summary), *differing_notes(runs), *notes],
        failures=FAILURES,
        failure_counts=failures.failure_counts(rows).to_dicts(),
        unedited=bool(unedited),
        pairs=[
            row
            | {
                "said": tables.on_screen(row["metric"], row["difference"], "+"),
                "interval": interval(row),
                "test": TESTS[row["test"]],
                "p": probability(row["p"]),
                "p_holm": probability(row["p_holm"]),
            }
            for row in pairs.to_dicts()
        ],
        health=comparison.health(rows).to_dicts(),
        dead=_dead(rows),
        dead_total=len(rows.filter(status=ERROR)),
        charts=drawn,
        specs={name: packed(json.dumps(chart.spec).encode()) for name, chart in drawn.items()},
        figures=[figure for store in stores for figure in _figures(store)],
        manifests={uri: _pretty(manifest) for uri, manifest in manifest_of.items()},
        records_note=details.note,
        index=packed(
            report_data.index(rows, texts, details.cases, [*unedited, *edited[:_AT_FIRST]], names)
        ),
        chunks=[
            packed(chunk)
            for chunk in track(
                report_data.chunks(rows, prompts, texts, details.cases),
                "records",
                total=-(-len(details.cases) // report_data.CHUNK),
                console=cli.CONSOLE,
                disable=not cli.CONSOLE.is_terminal,
            )
        ],
    )
    return page, [*notes, *([details.note] if details.note else [])]


def _labelled(runs: Runs) -> pl.DataFrame:
    """The summary of all runs with the column `label` of `jobs.compare.read`."""
    frames = {uri: reduce([uri], write=False) for uri in runs}
    labels = row_labels(runs, {uri: frame["editor"].to_list() for uri, frame in frames.items()})
    labelled = [
        frame.with_columns(
            pl.Series("label", [labels[uri, editor] for editor in frame["editor"]], pl.String)
        )
        for uri, frame in frames.items()
    ]
    # Probe sets and judges are of one run or another.
    return pl.concat(labelled, how="diagonal").with_columns(pl.col("^.*_n$").fill_null(0))


def _has(summary: pl.DataFrame, metric: str) -> bool:
    return summary[metric].count() > 0


def _dead(rows: pl.DataFrame) -> list[dict[str, Any]]:
    dead = rows.filter(pl.col("status") != OK).select(
        "label", "case_id", "relation_id", "attempts", "error"
    )
    return dead.head(_DEAD_SHOWN).to_dicts()


def _figures(store: Store) -> list[dict[str, str]]:
    """The figures that a sweep or trace drew, as images: what is in them cannot run here."""
    kinds = {".svg": "image/svg+xml", ".png": "image/png"}
    chosen = {
        name[: -len(ending)]: name  # SVG, where there are both.
        for ending in reversed(kinds)
        for name in store.list(_FIGURES, ending)
    }
    return [
        {
            "name": stem.removeprefix(_FIGURES),
            "run": store.uri.rpartition("/")[2],
            "kind": kinds[name[-4:]],
            "data": base64.b64encode(store.read_bytes(name)).decode(),
        }
        for stem, name in sorted(chosen.items())
    ]


def _pretty(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False)


def main(run_dirs: list[str], out: Path, texts: int, records: list[str]) -> None:
    """See `jobs.commands.report`."""
    which = [word for word in records if word.partition(":")[0] in ("failures", "sample", "all")]
    places = [word for word in records if word not in which]
    with cli.errors():
        if len(which) > 1 or len(places) > 1:
            raise ValueError(f"--records takes one choice and one folder, got {', '.join(records)}")
        page, notes = report(run_dirs, texts, *which or [""], *places)
        out.write_text(page, "utf-8")
    for note in notes:
        say(f"note: {note}")
    say(f"report: {out} ({len(page) / 1e6:.1f} MB)")
