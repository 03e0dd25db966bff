"""`python -m jobs.reduce` over run directories made of real parts."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from jobs.output import tables
from jobs.reduce import app, reduce
from rome.analysis.metrics import table_of
from rome.data.results import ERROR, OK
from tests.support import commands
from tests.support.parts_of_runs import result_rows, unpadded, write_part

METRICS = table_of("counterfact")


def make_run(run_dir: Path, records: int = 40, done: int = 40) -> Path:
    """A run of `none` and `rome`, of which `rome` has come as far as `done`."""
    run_dir.mkdir(parents=True)
    manifest = {"name": run_dir.name, "records": records, "editors": ["rome", "none"]}
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    for editor, skill, rows in (("none", 0.0, records), ("rome", 9.0, done)):
        for start in range(0, rows, 16):
            part = result_rows(records, run_dir.name, skill)[start : min(start + 16, rows)]
            name = f"part-00000-{start:06d}-{start + 16:06d}.parquet"
            write_part(run_dir, editor, part, name)
    return run_dir


invoke = partial(commands.invoke, app)


def test_the_table_of_a_finished_run(tmp_path: Path) -> None:
    # A folder `run=...` above the run directory must not become a column.
    run_dir = make_run(tmp_path / "run=other" / "demo")
    done = subprocess.run(
        [sys.executable, "-m", "jobs.reduce", str(run_dir)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["demo", "·", "facts", "·", "a/b"] in lines
    assert ["Editor", *METRICS, "n", "dead"] in lines
    rome, unedited = (next(x for x in lines if x[:1] == [e]) for e in ("rome", "unedited"))
    assert lines.index(rome) < lines.index(unedited)
    assert float(rome[1]) > float(unedited[1])
    assert rome[-2:] == ["40", "0"]
    assert rome[8] == "6.20"  # In bits; LaTeX has the paper's 620.0.


def test_the_files_of_a_run(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "my_run")
    frame = reduce([str(run_dir)])
    assert pl.read_parquet(run_dir / "summary.parquet").equals(frame)
    assert frame["editor"].to_list() == ["rome", "none"]
    assert frame["model"].unique().to_list() == ["a/b"]
    rome = frame.row(0, named=True)
    assert rome["S_low"] < rome["S"] < rome["S_high"]
    shown = f"{rome['RS']:.1f}", f"{rome['RS_half_width']:.1f}"
    markdown = (run_dir / "table.md").read_text()
    assert f"| {shown[0]} (± {shown[1]}) | 40 | 0 |" in unpadded(markdown)
    assert "| unedited |" in unpadded(markdown)
    latex = (run_dir / "table.tex").read_text()
    assert rf"& {shown[0]} ({shown[1]}) & 40 & 0 \\" in unpadded(latex)
    assert invoke(run_dir, "--format", "latex").stdout == latex
    assert invoke(run_dir, "--format", "markdown").stdout == markdown


def test_json_has_both_intervals_and_nothing_else_on_stdout(tmp_path: Path) -> None:
    result = invoke(make_run(tmp_path / "demo", done=20), "--format", "json")
    rome = json.loads(result.stdout)[0]
    assert rome["editor"] == "rome"
    assert {"ES_half_width", "ES_low", "ES_high", "n", "dead", "duplicates", "records"} <= set(rome)
    assert "in progress" in result.stderr


def test_a_run_in_progress_says_so(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "demo", done=32)
    result = invoke(run_dir)
    assert result.exit_code == 0
    assert "demo, rome: in progress, 32 of 40 records." in result.stderr
    assert "unedited" not in result.stderr
    assert "in progress, 32 of 40" in (run_dir / "table.md").read_text()


def test_what_is_shown_on_the_way_is_a_line_an_editor(tmp_path: Path) -> None:
    lines = tables.brief(reduce([str(make_run(tmp_path / "demo", done=20))])).splitlines()
    assert lines[0].split() == ["S", "ES", "PS", "NS", "n"]
    assert [line.split()[0] for line in lines[1:]] == ["rome", "unedited"]
    assert [line.split()[-1] for line in lines[1:]] == ["20", "40"]
    assert max(map(len, lines)) < 80


def test_an_editor_that_has_not_begun_is_shown(tmp_path: Path) -> None:
    result = invoke(make_run(tmp_path / "demo", done=0), "--format", "markdown")
    assert "| rome | – | – | – | – | – | – | – | – | – | 0 | 0 |" in unpadded(result.stdout)
    assert "demo, rome: in progress, 0 of 40 records." in result.stderr


def test_duplicates_and_dead_letters_are_counted(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "demo", records=41, done=40)
    clean = reduce([str(run_dir)]).row(0, named=True)
    rows = result_rows(41, "demo", 9.0)
    poison = {"run": "demo", "case_id": 40, "status": ERROR, "error": "poison", "attempts": 3}
    write_part(run_dir, "rome", [*rows[5:8], poison], "part-00000-000005-000008.parquet")
    # Neither a temporary file nor a marker is a part.
    for name in (".tmp-1.parquet", "_part.parquet"):
        (run_dir / "results" / name).write_bytes(b"half")
    result = invoke(run_dir)
    assert "demo, rome: duplicate rows dropped: 3." in result.stderr
    assert "demo, rome: dead letters: 1, not in the means." in result.stderr
    assert "in progress" not in result.stderr
    rome = reduce([str(run_dir)]).row(0, named=True)
    assert (rome["n"], rome["dead"], rome["duplicates"]) == (40, 1, 3)
    assert [rome[m] for m in METRICS] == [clean[m] for m in METRICS]


def test_several_runs_in_one_table(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", records=20, done=20)
    result = invoke(first, second, "--format", "markdown")
    assert result.stdout.startswith("**facts · a/b**")
    table = unpadded(result.stdout)
    assert "| Run | Editor | S |" in table
    assert [line.split(" | ")[:2] for line in table.splitlines() if "(±" in line] == [
        [f"| {run}", editor] for run in ("first", "second") for editor in ("rome", "unedited")
    ]
    assert "second" not in (first / "table.md").read_text()
    assert pl.read_parquet(second / "summary.parquet")["n"].to_list() == [20, 20]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a" / "demo"), make_run(tmp_path / "b" / "demo")
    for run, dtype in ((first, "float32"), (second, "bfloat16")):
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["config"] = {"name": "demo", "model": {"dtype": dtype}}
        (run / "manifest.json").write_text(json.dumps(manifest))
    result = invoke(first, second, "--format", "markdown")
    lines = [line.split(" | ")[:2] for line in unpadded(result.stdout).splitlines() if "(±" in line]
    assert lines == [[f"| {run}/demo", editor] for run in "ab" for editor in ("rome", "unedited")]
    assert "a/demo | b/demo differ in model.dtype: float32 | bfloat16." in result.stderr
    assert pl.read_parquet(first / "summary.parquet")["run"].unique().to_list() == ["demo"]


def test_screens_show_bits_and_latex_the_papers_scale(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "demo")
    rows = [row | {"GE": 5.0} for row in result_rows(16, "demo", 9.0)]
    write_part(run_dir, "rome", rows, "part-00000-000000-000016.parquet")
    screen = unpadded(invoke(run_dir, "--format", "markdown").stdout)
    assert "| 5.72 (± 0.18), -7.7 % |" in screen
    assert "GE in bits with its change against unedited" in screen
    assert "& 572.0 (18.2) &" in unpadded((run_dir / "table.tex").read_text())


def test_a_score_that_no_record_has_is_said(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "demo", records=16, done=0)
    lonely: dict[str, list[float]] = {"neighborhood_nll_new": [], "neighborhood_nll_true": []}
    for editor in ("none", "rome"):
        rows = [row | lonely for row in result_rows(16, "demo", 1.0)]
        write_part(run_dir, editor, rows, "part-00000-000000-000016.parquet")
    said = "demo: no NS, and so no S, since its records have no such prompts"
    assert invoke(run_dir).stderr.count(said) == 1
    assert said in (run_dir / "table.md").read_text()


def test_brackets_in_names_are_no_markup(tmp_path: Path) -> None:
    run_dir = tmp_path / "demo"
    run_dir.mkdir()
    manifest = {"name": "a[/b] [red]run", "records": 16, "editors": ["rome [fast]", "x[/]"]}
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    rows = result_rows(16, manifest["name"], 1.0)  # type: ignore[arg-type]
    for editor in ("rome%20%5Bfast%5D", "x%5B%2F%5D"):
        write_part(run_dir, editor, rows, "part-00000-000000-000016.parquet")
    result = invoke(run_dir)
    assert result.exit_code == 0, result.output
    for name in ("a[/b] [red]run", "rome [fast]", "x[/]"):
        assert name in result.stdout


def with_extras(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    said = {"target_new": "Rome", "rewrite_greedy": ["Rome."], "rewrite_accuracy": [1.0]}
    return [row | said | {"neighborhood_accuracy": [0.25]} for row in rows]


def test_a_second_table_has_what_the_paper_does_not(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "demo", done=0)
    write_part(run_dir, "rome", with_extras(result_rows(8, "demo", 9.0)), "part-0-0-8.parquet")
    result = invoke(run_dir)
    lines = [line.split() for line in result.stdout.splitlines()]
    first, second = (
        lines.index(["Editor", *METRICS, "n", "dead"]),
        lines.index(["Editor", "ES_strict", "n", "dead"]),
    )
    assert first < second
    assert ["rome", "100.0", "8", "0"] in lines[second:]
    assert ["unedited", "–", "40", "0"] in lines[second:]
    assert "| Editor | ES_strict | n | dead |" in unpadded((run_dir / "table.md").read_text())
    latex = unpadded((run_dir / "table.tex").read_text())
    assert r"Editor & ES\_strict & n & dead \\" in latex
    assert latex.count(r"\end{tabular}") == 2


def test_zsre_has_the_shape_of_table_1_and_the_papers_rows_beside(tmp_path: Path) -> None:
    run_dir = tmp_path / "demo"
    run_dir.mkdir()
    manifest = {"name": "demo", "records": 8, "editors": ["none", "rome", "ft"]}
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    scores = {"rewrite_accuracy": [0.5], "paraphrase_accuracy": [0.0]}
    rows = [{"run": "demo", "case_id": i, "status": OK, "attempts": 1} | scores for i in range(8)]
    for editor in ("none", "rome"):
        part = write_part(run_dir, editor, rows, "part-00000-000000-000008.parquet")
        folder = run_dir / "results" / "benchmark=zsre" / "model=gpt2-xl" / part.parent.name
        folder.mkdir(parents=True)
        part.rename(folder / part.name)
    table = unpadded(invoke(run_dir, "--format", "markdown").stdout).splitlines()
    assert table[0] == "**demo · zsre · gpt2-xl**"
    assert table[2] == "| Editor | efficacy | paraphrase | specificity | n | dead |"
    assert table[4:9] == [
        "| unedited | 50.0 (± 0.0) | 0.0 (± 0.0) | – | 8 | 0 |",
        "| unedited, published | 22.2 | 21.3 | 24.2 | – | – |",
        "| rome | 50.0 (± 0.0) | 0.0 (± 0.0) | – | 8 | 0 |",
        "| rome, published | 99.8 | 88.1 | 24.2 | – | – |",
        "| ft | – | – | – | 0 | 0 |",
    ]


@pytest.mark.parametrize("size", [0, 60, 3000])
def test_a_damaged_part_is_named_and_refused(tmp_path: Path, size: int) -> None:
    run_dir = make_run(tmp_path / "demo")
    part = sorted(run_dir.rglob("editor=rome/part-*"))[1]
    with part.open("r+b") as file:
        file.truncate(size)
    result = invoke(run_dir)
    assert result.exit_code == 1
    assert part.name in result.stderr
    assert "again" in result.stderr
    assert not (run_dir / "summary.parquet").exists()


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    result = invoke(tmp_path / "nothing")
    assert result.exit_code == 1
    assert "has no manifest.json" in result.stderr
    run_dir = tmp_path / "begun"
    run_dir.mkdir()
    (run_dir / "manifest.json").write_text('{"name": "begun", "rows": 3}')
    assert "lacks editors, records" in invoke(run_dir).stderr
    (run_dir / "manifest.json").write_text('{"name": "begun", "records": 3, "editors": ["none"]}')
    assert "has no results yet" in invoke(run_dir).stderr
