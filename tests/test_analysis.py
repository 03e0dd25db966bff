"""Every block of docs/analysis.md on a run of a tiny model, as a reader would paste it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cluster.store import Store
from jobs.inputs import record_stores
from jobs.inputs.record_stores import grid_of
from jobs.runs import config as configs
from jobs.tasks.evaluation import Evaluation, EvaluationTask, group_of
from tests.support import tiny
from tests.support.tiny import TEMPLATES

DOCUMENT = (Path(__file__).parents[1] / "docs" / "analysis.md").read_text("utf-8")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of `none`, `rome` and `ft+l`, over everyday facts of several relations."""
    folder = tmp_path_factory.mktemp("analysis")
    model = tiny.model("gpt2")
    tiny.save(model, folder / "model")
    record_stores.prepare("everyday", str(folder / "everyday"), limit=12)
    (folder / "run.yaml").write_text(
        f"""
        name: tiny
        model:
          {{name: tiny/gpt2, source: {folder}/model, dtype: float64,
            editors: {{rome: {{layer: 1, second_moment: false, value: {{steps: 3}}}}}}}}
        benchmark: {folder}/everyday
        editors: {{none: {{}}, rome: {{}}, ft+l: {{layer: 1, steps: 3}}}}
        scoring: {{generation: {{max_tokens: 70}}}}
        lease_records: 12
        """
    )
    config = configs.load(folder / "run.yaml")
    store, run = Store(folder / "everyday"), Store(folder / "run" / "results")
    grid = grid_of(store, config.records, config.lease(gpus=False))
    task = EvaluationTask(Evaluation(config, store, grid, tuple(TEMPLATES)))
    for editor in config.editors:
        for lease in grid.leases(group_of(config, "everyday", editor)):
            run.write_table(lease.part, task.run(lease))
    return folder / "run"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


def test_there_are_ten_questions_and_one_in_duckdb() -> None:
    assert len(re.findall(r"^## \d+\. .*\?$", DOCUMENT, re.MULTILINE)) == 11
    assert len(blocks()) == 12  # One opens the run.


def test_every_question_has_an_answer(run_dir: Path) -> None:
    names: dict[str, Any] = {}
    setup, *questions = (block.replace("RUN_DIR", str(run_dir)) for block in blocks())
    exec(setup, names)
    assert set(names["rows"]["editor"]) == {"none", "rome", "ft+l"}
    assert set(names["rows"]["model"]) == {"tiny/gpt2"}
    for question in questions:
        parsed = ast.parse(question)
        last = parsed.body.pop()
        assert isinstance(last, ast.Expr), question
        exec(compile(parsed, "analysis.md", "exec"), names)
        answer = eval(ast.unparse(last), names)
        assert isinstance(answer, pl.DataFrame), question
        assert not answer.is_empty(), question
        # An answer of nulls alone would mean that a column is not what the question takes it for.
        assert all(column.null_count() < len(column) for column in answer), question
    # The last is DuckDB's, which must read the names of the folders as Polars does.
    assert set(answer["editor"]) == {"none", "rome", "ft+l"}
    assert set(answer["model"]) == {"tiny/gpt2"}
