"""python -m jobs.report RUN_DIR... [--out report.html] [--texts 2]

Runs as one page that needs no network: tables and figures, and a browser of all records.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer
from markupsafe import Markup

from cluster.store import Store
from jobs import cli
from jobs.cli import say
from jobs.compare import read
from jobs.output import report_data, report_figures, tables
from jobs.output.pages import packed, render
from jobs.reduce import reduce
from jobs.runs import manifests
from jobs.sweep import SWEEP
from rome.analysis import comparison, failures
from rome.analysis.failures import FAILURES
from rome.analysis.metrics import SUCCESSES, table_of
from rome.analysis.own_metrics import named_in
from rome.data.results import ERROR, OK

_FIGURES = "figures/"
_WAY_OUT = "Give what jobs.evaluate, jobs.sweep or jobs.trace wrote to."
_DEAD_SHOWN = 200


def report(run_dirs: Sequence[str], texts: int) -> str:
    """The page of runs of one benchmark and model, and of the sweeps and traces given with them.

    `texts`: how many generated texts a record and editor are shown with; the parts have them all.
    Raises ValueError where a path is no run with results, where runs cannot be compared (see
    `jobs.compare.read`), or where all are sweeps or traces.
    """
    stores = [Store(run_dir) for run_dir in run_dirs]
    manifest_of = {store.uri: manifests.read(store, (), _WAY_OUT) for store in stores}
    runs = [
        store for store in stores if "editors" in manifest_of[store.uri] and not store.exists(SWEEP)
    ]
    if not runs:
        raise ValueError(
            "a report needs a run of jobs.evaluate; sweeps and traces add their figures to it. "
            f"Got {', '.join(run_dirs)}."
        )
    uris = [store.uri for store in runs]
    rows = failures.with_failures(read(uris))
    summary = reduce(uris)
    prompts = report_data.read_prompts([manifest_of[uri] for uri in uris])
    counterfact = bool(rows["ES"].count())
    metrics, extra = (
        [name for name in names if _has(summary, name)]
        for names in (
            table_of("counterfact" if counterfact else "zsre"),
            [*table_of(None), *named_in(summary.columns)],
        )
    )
    per_record = [name for name in metrics if name != "S"]
    successes = [m for m in (SUCCESSES if counterfact else metrics) if m in per_record]
    pairs = _pairs(rows, per_record)
    style = report_figures.styles(rows)
    return render(
        "report",
        title=" · ".join(dict.fromkeys(manifest_of[uri]["name"] for uri in uris)),
        records=rows["case_id"].n_unique(),
        summary=summary.to_dicts(),
        tables=[names for names in (metrics, extra) if names],
        notes=tables.notes(summary),
        failures=FAILURES,
        failure_counts=failures.failure_counts(rows).to_dicts(),
        unedited="none" in rows["editor"],
        pairs=pairs.to_dicts(),
        health=comparison.health(rows).to_dicts(),
        dead=_dead(rows),
        dead_total=len(rows.filter(status=ERROR)),
        distributions=Markup(report_figures.distributions(rows, per_record, style)),
        relations=Markup(report_figures.relations(rows, successes, style)),
        differences=Markup(report_figures.differences(pairs, successes)) if len(pairs) else "",
        health_figure=Markup(report_figures.health(rows, successes, style)),
        figures=[figure for store in stores for figure in _figures(store)],
        manifests={uri: _pretty(manifest) for uri, manifest in manifest_of.items()},
        index=packed(report_data.index(rows, texts)),
        chunks=map(packed, report_data.chunks(rows, prompts, texts)),
    )


def _has(summary: pl.DataFrame, metric: str) -> bool:
    return summary[metric].count() > 0


def _pairs(rows: pl.DataFrame, metrics: Sequence[str]) -> pl.DataFrame:
    if rows["label"].n_unique() < 2:
        return pl.DataFrame()
    return comparison.compare(rows, metrics)


def _dead(rows: pl.DataFrame) -> list[dict[str, Any]]:
    dead = rows.filter(pl.col("status") != OK).select(
        "label", "case_id", "relation_id", "attempts", "error"
    )
    return dead.sort("label", "case_id").head(_DEAD_SHOWN).to_dicts()


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


app = cli.new_app()


@app.command()
def main(
    run_dirs: Annotated[
        list[str], typer.Argument(help="Run directories of evaluate, sweep and trace.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
    texts: Annotated[
        int, typer.Option(min=0, help="Generated texts to show of each record and editor.")
    ] = 2,
) -> None:
    """Write a report of one or more runs, finished or in progress."""
    with cli.errors():
        page = report(run_dirs, texts)
        out.write_text(page, "utf-8")
    say(f"report: {out} ({len(page) / 1e6:.1f} MB)")


if __name__ == "__main__":
    app()
