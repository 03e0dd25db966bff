"""`python -m jobs.report`: what the page says, and what a reader can do with it in a browser."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from playwright.sync_api import Browser, Page, expect

from jobs.output import leaderboard, report_data
from jobs.output.leaderboard import Board
from jobs.reduce import reduce
from jobs.report import app
from rome.analysis import failures
from rome.data.results import ERROR, OK
from tests.support import commands
from tests.support.browser import LAPTOP, PHONE, browser, opened, overflows
from tests.support.parts_of_runs import write_part
from tests.support.runs_to_report import EDITORS, HOSTILE, make_rows, make_run

__all__ = ["browser"]


invoke = partial(commands.invoke, app)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    run = make_run(folder / "demo")
    trace = folder / "trace"
    (trace / "figures").mkdir(parents=True)
    (trace / "manifest.json").write_text('{"name": "trace"}')
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20"><script>alert(1)</script>'
    (trace / "figures" / "trace-averages.svg").write_text(svg + "</svg>")
    out = folder / "report.html"
    result = invoke(run, trace, "--out", out)
    assert result.exit_code == 0, result.stderr
    return out


LABELS = ["unedited" if editor == "none" else editor for editor in EDITORS]


def embedded(page: str, name: str) -> Any:
    found = re.search(rf'<script type="text/plain" id="{name}">([A-Za-z0-9+/=]*)</script>', page)
    assert found
    return json.loads(gzip.decompress(base64.b64decode(found[1])))


def test_every_failure_by_its_definition() -> None:
    def row(editor: str, case_id: int, **columns: Any) -> dict[str, Any]:
        healthy = {"ES": 1.0, "PS": 1.0, "NS": 1.0, "GE": 6.0, "neighborhood_nll_new": [2.0] * 4}
        zsre = dict.fromkeys(("efficacy", "paraphrase", "specificity"))
        known: dict[str, Any] = {
            "label": editor,
            "editor": editor,
            "case_id": case_id,
            "status": OK,
        }
        known["not_finite"] = 0
        return {**known, **healthy, **zsre, "neighborhood_nll_true": [1.0] * 4, **columns}

    zsre = dict.fromkeys(("ES", "PS", "NS", "neighborhood_nll_new", "neighborhood_nll_true"))
    before = {"neighborhood_nll_true": [1.0, 1.0, 3.0, 3.0]}  # Two of four are right.
    rows = [
        *(row("none", i, **before) for i in range(8)),
        row("none", 8, **zsre, efficacy=0.0, paraphrase=0.0, specificity=0.5),
        row("none", 9, **zsre, efficacy=0.0, paraphrase=0.0, specificity=0.5),
        row("rome", 0),
        row("rome", 1, PS=0.0),
        row("rome", 2, PS=0.5),
        row("rome", 3, neighborhood_nll_true=[3.0, 1.0, 3.0, 3.0]),  # Half of the two is lost,
        row("rome", 4, neighborhood_nll_true=[1.0, 1.0, 3.0, 3.0]),  # nothing,
        row("rome", 5, neighborhood_nll_true=[2.0, 2.0, 1.0, 1.0]),  # both, by ties.
        row("rome", 6, GE=2.9, ES=0.0, PS=0.0),
        row("rome", 7, status=ERROR, **zsre, GE=None),
        row("rome", 8, **zsre, efficacy=1.0, paraphrase=0.5, specificity=0.25),
        row("rome", 9, **zsre, efficacy=0.5, paraphrase=0.5, specificity=0.3),
        row("rome", 10, **zsre, not_finite=3, GE=None),
        row("rome", 99, neighborhood_nll_true=[9.0] * 4, GE=0.0),  # No unedited row: not known.
    ]
    schema = dict.fromkeys(("ES", "PS", "NS", "GE", "efficacy", "paraphrase"), pl.Float64)
    found = failures.with_failures(pl.DataFrame(rows, schema_overrides=schema))
    dead, unlearnt, f1, f2, broken, not_finite = (
        found.filter(pl.col(failure.name))["case_id"].to_list() for failure in failures.FAILURES
    )
    assert (dead, unlearnt, f1, f2, broken) == ([7], [6, 9], [1, 8], [3, 5, 8], [6])
    assert not_finite == [10]


def test_the_page_holds_every_record(page_file: Path) -> None:
    page = page_file.read_text()
    index = embedded(page, "index")
    assert index["case_id"] == index["details"] == list(range(60))
    assert [editor["label"] for editor in index["editors"]] == LABELS
    assert index["shown"] == ["unedited", "rome", "ft<b>"]  # The unedited, the best, the second.
    assert index["editors"][2]["failures"][5] == 1
    record = embedded(page, "chunk-0")[3]
    assert record["paraphrase_prompts"] == ["Where is 3?", "It stands in"]
    (row,) = (row for row in make_rows(60, "rome") if row["case_id"] == 3)
    new, true = (row[f"neighborhood_nll_{target}"] for target in ("new", "true"))
    assert record["2"]["neighborhood_nll_new"] == pytest.approx(np.exp(-np.array(new)), rel=1e-3)
    assert record["2"]["neighborhood_nll_true"] == pytest.approx(np.exp(-np.array(true)), rel=1e-3)
    assert record["2"]["texts"] == [HOSTILE] * 2
    assert (record["2"]["edit_norm"], record["2"]["edit_divisor"]) == (None, None)


def test_nothing_that_a_model_wrote_is_markup(page_file: Path) -> None:
    page = page_file.read_text()
    assert "window.hacked" in page  # In the manifest and the error, as text.
    assert "<script>window.hacked" not in page
    assert "<img src=x" not in page
    assert "<b>ft" not in page
    assert "ft<b>" not in page
    assert "{{ 7*7 }}" in page


def test_the_first_screen_says_who_is_best_and_what_holds(page_file: Path) -> None:
    frame = reduce([str(page_file.parent / "demo")], write=False)
    page = page_file.read_text()
    assert not (page_file.parent / "demo" / "summary.parquet").exists()  # A report writes nothing.
    first, second = frame.filter(pl.col("editor") != "none").sort("S", descending=True).to_dicts()
    markup = page[page.index('class="verdict">') + 16 :].partition("</div>")[0]
    verdict = html.unescape(re.sub(r"<[^>]*>", "", markup))
    assert (
        f"{first['editor']} has the best S, {first['S']:.1f} (95 % {first['S_low']:.1f} to"
        in verdict
    )
    assert f"next is {second['editor']} with {second['S']:.1f}" in verdict
    assert "after Holm" in verdict
    assert f"It writes {first['ES']:.1f} % of facts (ES)" in verdict
    assert f"{first['GE'] / 100:.2f}" in page
    assert f"{first['PS_low']:.1f} to {first['PS_high']:.1f}" in page
    assert "demo, rome: dead letters: 1, not in the means." in page
    assert "180 of 180 rows, 1 dead" in page


def test_a_card_of_counterfact_has_no_score_of_zsre(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    for part in run.rglob("part-*.parquet"):
        table = pl.read_parquet(part).with_columns(
            pl.lit([0.0], pl.List(pl.Float64)).alias("rewrite_accuracy")
        )
        table.write_parquet(part)
    assert invoke(run, "--out", tmp_path / "r.html").exit_code == 0
    assert embedded((tmp_path / "r.html").read_text(), "index")["scores"] == ["ES", "PS", "NS"]


def test_a_run_that_was_moved_from_its_records_says_so_and_takes_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    (tmp_path / "records").rename(tmp_path / "elsewhere")
    out = tmp_path / "report.html"
    result = invoke(run, "--out", out)
    assert result.exit_code == 0
    for said in (" ".join(result.stderr.split()), " ".join(out.read_text().split())):
        assert "records has no records any more: only the edited prompt of each record" in said
    assert embedded(out.read_text(), "chunk-0")[3]["paraphrase_prompts"] is None
    result = invoke(run, "--out", out, "--records", tmp_path / "elsewhere")
    assert "any more" not in result.stderr
    assert embedded(out.read_text(), "chunk-0")[3]["paraphrase_prompts"][0] == "Where is 3?"
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["benchmark"] = {"name": "b", "fingerprint": "of others"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "elsewhere" / "manifest.json").write_text('{"fingerprint": "f"}')
    result = invoke(run, "--out", out, "--records", tmp_path / "elsewhere")
    assert result.exit_code == 1
    assert "has other records than the run had" in result.stderr


def test_of_a_large_run_the_page_has_the_details_of_some_records(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "demo"), tmp_path / "report.html"
    result = invoke(run, "--out", out, "--records", "sample:7")
    page = out.read_text()
    index = embedded(page, "index")
    assert len(index["case_id"]) == 60
    assert sorted(index["details"])[-8:] == [-1, *range(7)]
    assert len(embedded(page, "chunk-0")) == 7
    for said in (page, " ".join(result.stderr.split())):
        assert "in this page of 7 of 60 records, drawn at random; scores are of all" in said
    invoke(run, "--out", out, "--records", "failures")
    index = embedded(out.read_text(), "index")
    flags = np.array([editor["failures"] for editor in index["editors"]]).max(axis=0)
    assert [place >= 0 for place in index["details"]] == (flags > 0).tolist()
    assert invoke(run, "--out", out, "--records", "sample:x").exit_code == 1
    rows = pl.DataFrame({"case_id": range(30_000), "label": ["a"] * 30_000})
    large = report_data.chosen(rows, "")
    assert len(large.cases) == report_data.MOST
    assert "22,000 of 30,000" in large.note


def test_every_chart_has_a_name_and_its_numbers_in_a_table(page_file: Path) -> None:
    page = page_file.read_text()
    for name in ("differences", "relations", "spreads", "health"):
        spec = embedded(page, f"spec-{name}")
        figure = page[page.index(f'id="chart-{name}"') :].partition("</figure>")[0]
        assert spec["description"].split(".")[0] in figure.partition(">")[0]
        assert figure.count("<tr>") == 1 + len(spec["data"]["values"]) > 1
    pairs = [row["pair"] for row in embedded(page, "spec-differences")["data"]["values"]]
    assert list(dict.fromkeys(pairs)) == ["rome − unedited", "ft<b> − unedited", "rome − ft<b>"]


def test_only_traces_or_no_run_are_refused(page_file: Path, tmp_path: Path) -> None:
    result = invoke(page_file.parent / "trace", "--out", tmp_path / "x.html")
    assert result.exit_code == 1
    assert "a report needs a run of jobs.evaluate" in result.stderr
    result = invoke(tmp_path, "--out", tmp_path / "x.html")
    assert "is not a run directory" in result.stderr


def count(page: Page) -> str:
    return page.locator("#count").inner_text()


def board(page: Page) -> list[str]:
    return page.locator("#board tbody th").all_inner_texts()


def test_the_verdict_on_chains_is_of_the_checkpoints_after_the_most_edits() -> None:
    def row(label: str, score: float) -> dict[str, Any]:
        cell = {"text": f"{score:.1f}", "value": score, "low": None, "high": None}
        counts = dict.fromkeys(("F2: bleeds over to neighbors", "broken text"), 0)
        cells = dict.fromkeys(("ES", "NS"), cell)
        known = {"label": label, "unedited": False, "n": 9, "score": cell}
        return known | {"cells": cells, "counts": counts}

    rows = [row("memit@10", 90), row("rome@10", 80), row("rome@1000", 70), row("memit@1000", 60)]
    said = leaderboard.verdict(Board("S", [], {}, rows, None), pl.DataFrame())[0]
    text = "".join(one.text for one in said)
    assert text == "After 1,000 edits rome@1000 has the best S, 70.0; next is memit@1000 with 60.0."


def test_the_leaderboard_sorts_and_counts_open_their_records(
    page_file: Path, browser: Browser
) -> None:
    with opened(browser, page_file) as page:
        page.wait_for_selector(".record")
        assert board(page) == ["rome", "ft<b>", "unedited"]
        assert page.locator("#board tbody b").first.is_visible()
        heading = page.locator("#board th", has_text="NS")
        heading.locator("button").click()
        assert board(page)[0] == "unedited"
        assert heading.get_attribute("aria-sort") == "descending"
        heading.locator("button").press("Enter")
        assert board(page)[-1] == "unedited"
        link = page.locator("#board tbody tr", has_text="rome").locator("a").last
        number = link.inner_text()
        link.click()
        assert count(page) == f"{number} of 60 records"
        assert page.locator("select[name=editor]").input_value() == "rome"


def test_what_is_copied_is_the_table(page_file: Path, browser: Browser) -> None:
    with opened(browser, page_file, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.wait_for_selector(".record")
        for kind, begins in (("Markdown", "**demo"), ("CSV", "run,"), ("LaTeX", "% demo")):
            page.locator(".copy", has_text=kind).click()
            expect(page.locator("#copied")).to_have_text("copied")
            assert page.evaluate("navigator.clipboard.readText()").startswith(begins)


def test_charts_are_drawn_without_a_right_to_make_code(page_file: Path, browser: Browser) -> None:
    with opened(browser, page_file) as page:
        page.wait_for_selector("body[data-drawn]")
        assert page.locator(".drawing svg").count() == 4
        cell = page.locator("#chart-relations .mark-rect path").first
        cell.click()
        expect(page).to_have_url(re.compile(r"#records\?relation=P"))
        assert count(page) != "60 of 60 records"


def test_the_browser_filters(page_file: Path, browser: Browser) -> None:
    index = embedded(page_file.read_text(), "index")
    flags = np.array([editor["failures"] for editor in index["editors"]])
    with opened(browser, page_file) as page:
        page.wait_for_selector(".record")
        assert count(page) == "60 of 60 records"
        assert page.locator(".record").count() == 20
        page.locator(".next").first.click()
        assert "case 20" in page.locator(".record").first.inner_text()
        assert page.locator(".where").first.inner_text() == "page 2 of 3"
        for bit, name in enumerate(index["failures"]):
            page.locator("select[name=failure]").select_option(name)
            expected = int(((flags >> bit) & 1).any(axis=0).sum())
            assert count(page) == f"{expected} of 60 records"
        page.locator("select[name=failure]").select_option(index["failures"][3])
        page.locator("select[name=editor]").select_option("rome")
        bleeding = np.flatnonzero((flags[2] >> 3) & 1)
        assert 0 < len(bleeding) < 60
        assert count(page) == f"{len(bleeding)} of 60 records"
        page.locator("select[name=relation]").select_option("P2")
        assert count(page) == f"{(bleeding % 7 == 2).sum()} of 60 records"
        for name in ("failure", "editor", "relation"):
            page.locator(f"select[name={name}]").select_option("")
        words = page.locator("input[name=words]")
        for sought, expected in (("17 tower", 1), ("case:1", 1), ("paris located", 60), ("x y", 0)):
            words.fill(sought)
            assert count(page) == f"{expected} of 60 records", sought
        words.fill("")
        page.locator("input[name=differ]").check()
        differing = (flags[1] != flags[2]).sum()
        assert count(page) == f"{differing} of 60 records"


def test_sorting_editors_and_the_address(page_file: Path, browser: Browser) -> None:
    index = embedded(page_file.read_text(), "index")
    with opened(browser, page_file) as page:
        page.wait_for_selector(".record")
        page.locator("#editors label", has_text="ft<b>").locator("input").uncheck()
        assert page.locator(".record").nth(1).locator(".chips b").all_inner_texts() == [
            "unedited", "rome",
        ]  # fmt: skip
        page.locator("select[name=sort]").select_option("change NS")
        before, rome = index["editors"][0]["NS"], index["editors"][2]["NS"]
        change = {i: rome[i] - before[i] for i in range(60) if rome[i] is not None}
        worst = min(change, key=lambda i: (change[i], i))
        assert f"case {worst} " in page.locator(".record").first.inner_text()
        address = page.evaluate("location.href")
        again = page.context.new_page()
        again.goto(address)
        again.wait_for_selector(".record")
        assert again.locator("#list").inner_text() == page.locator("#list").inner_text()
        assert again.locator("select[name=sort]").input_value() == "change NS"


def test_the_keyboard_does_all(page_file: Path, browser: Browser) -> None:
    with opened(browser, page_file) as page:
        page.wait_for_selector(".record")
        page.keyboard.press("/")
        page.keyboard.type("case:7")
        assert count(page) == "1 of 60 records"
        page.locator("input[name=words]").fill("")
        page.locator("input[name=words]").blur()
        for key in "jjjk":
            page.keyboard.press(key)
        page.keyboard.press("Enter")
        card = page.locator(".record").nth(1)
        card.locator("table").wait_for()
        assert card.get_attribute("open") is not None


def test_a_record_shows_before_and_after_and_stays_text(page_file: Path, browser: Browser) -> None:
    with opened(browser, page_file) as page:
        page.wait_for_selector(".record")
        card = page.locator(".record").nth(3)
        card.locator("summary").click()
        card.locator("table").first.wait_for()
        shown = card.inner_text()
        assert HOSTILE in shown
        assert "Neighbor 9 of 3" in shown
        assert f"WILD “wild {HOSTILE}”" in shown
        assert f"probe {HOSTILE}" in shown
        assert "hop, any: x / Rome" in shown
        for table in card.locator("table").all():
            assert table.locator("th").all_inner_texts()[1:] == LABELS
        assert card.locator(".texts").count() == 2
        assert card.locator(".texts").first.locator("div").count() == 3
        record = embedded(page_file.read_text(), "chunk-0")[3]
        new, true = (np.array(record["2"][f"rewrite_nll_{t}"]) for t in ("new", "true"))
        was_new, was_true = (np.array(record["0"][f"rewrite_nll_{t}"]) for t in ("new", "true"))
        flipped = bool(((new > true) != (was_new > was_true))[0])
        cell = card.locator("tbody tr").first.locator("td").nth(3)
        assert ("flipped" in (cell.get_attribute("class") or "")) == flipped
        dead = page.locator(".record").nth(5)
        dead.locator("summary").click()
        dead.locator("table").wait_for()
        assert f"rome: {HOSTILE}" in dead.inner_text()
        assert page.evaluate("window.hacked") is None


def test_print_shows_the_tables_and_no_controls(page_file: Path, browser: Browser) -> None:
    with opened(browser, page_file) as page:
        page.wait_for_selector("body[data-drawn]")
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("#board").is_visible()
        assert page.locator("#all table").first.is_visible()
        for hidden in ("nav", "#browser", ".copy"):
            assert not page.locator(hidden).first.is_visible()


@pytest.mark.parametrize("width", [LAPTOP, PHONE])
def test_it_fits_the_screen_in_light_and_dark(
    page_file: Path, browser: Browser, width: int
) -> None:
    backgrounds = set()
    for scheme in ("light", "dark"):
        with opened(browser, page_file, width, color_scheme=scheme) as page:
            page.wait_for_selector(".record")
            page.locator(".record summary").first.click()
            page.locator(".record table").wait_for()
            page.wait_for_selector("body[data-drawn]")
            assert not overflows(page)
            ink, paper = page.evaluate(
                "[getComputedStyle(document.querySelector('figure svg text')).fill,"
                " getComputedStyle(document.body).backgroundColor]"
            )
            assert contrast(ink, paper) > 7
            backgrounds.add(paper)
            assert page.locator("figure img").evaluate("image => image.naturalWidth") == 40
    assert len(backgrounds) == 2


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of two CSS colors."""

    def luminance(color: str) -> float:
        channels = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_one_editor_of_zsre(tmp_path: Path) -> None:
    rows = [
        {
            "run": "zsre", "case_id": case_id, "prompt": "Where is {}?", "subject": "it",
            "target_new": "Rome", "neighborhood_targets": ["x"], "status": OK, "attempts": 1,
            "rewrite_accuracy": [1.0], "paraphrase_accuracy": [case_id % 2 / 2],
            "neighborhood_accuracy": [0.25], "neighborhood_greedy": ["y"],
        }
        for case_id in range(8)
    ]  # fmt: skip
    run = tmp_path / "zsre"
    write_part(run, "rome", rows, "part-00000-000000-000008.parquet")
    manifest = {"name": "zsre", "records": 9, "editors": ["rome", "ft"]}
    (run / "manifest.json").write_text(json.dumps(manifest))
    result = invoke(run, "--out", tmp_path / "report.html")
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "report.html").read_text()
    assert re.search("efficacy<small>.*paraphrase<small>.*specificity<small>", page)
    assert "Where editors differ" not in page
    assert "rome</b> has efficacy 100.0" in page
    assert "zsre, rome: in progress, 8 of 9 records." in page
    assert "neither bleeding nor broken text can be told" in page
    index = embedded(page, "index")
    assert index["scores"] == ["efficacy", "paraphrase", "specificity"]
    assert index["editors"][0]["failures"] == [4] * 8
    assert embedded(page, "chunk-0")[0]["paraphrase_prompts"] is None
