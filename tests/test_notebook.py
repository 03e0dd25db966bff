"""docs/notebook.ipynb: its cells on a tiny model, and what it shows to those who only read it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import polars as pl
import pytest

from tests.support import tiny
from tests.support.commands import command

CELLS = json.loads((Path(__file__).parents[1] / "docs" / "notebook.ipynb").read_text("utf-8"))
CODE = [cell for cell in CELLS["cells"] if cell["cell_type"] == "code"]


def run(cell: dict[str, Any], names: dict[str, Any]) -> Any:
    """What the cell's last line gives, if it is an expression."""
    parsed = ast.parse("".join(cell["source"]))
    last = parsed.body.pop() if isinstance(parsed.body[-1], ast.Expr) else None
    exec(compile(parsed, "notebook.ipynb", "exec"), names)
    return None if last is None else eval(ast.unparse(last), names)


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the cell with the tag `parameters` says, of a tiny model."""
    model = tiny.model("gpt2", "float32")
    tiny.save(model, tmp_path / "model")
    assert command("prepare", "everyday", "--limit", 6, "--out", tmp_path / "records")[0] == 0
    (tmp_path / "run.yaml").write_text(
        f"""
        name: tiny
        model:
          {{name: tiny, source: {tmp_path}/model, dtype: float32,
            editors: {{rome: {{layer: 1, value: {{steps: 3}}}}, ft: {{layer: 1, steps: 3}}}}}}
        benchmark: {tmp_path}/records
        editors: {{none: {{}}}}
        """
    )
    given = {"MODEL": tmp_path / "model", "CONFIG": tmp_path / "run.yaml", "RUN": tmp_path / "run"}
    return {name: str(path) for name, path in given.items()} | {"LAYER": 1}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:ROME takes the identity")
def test_it_edits_scores_asks_and_draws(
    names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plt, "show", lambda: None)  # Here is no screen.
    parameters, *cells = CODE
    assert parameters["metadata"]["tags"] == ["parameters"]
    assert set(re.findall("^([A-Z]+) =", "".join(parameters["source"]), re.M)) == set(names)
    try:
        health, said, status, records, likely, _ = [run(cell, names) for cell in cells]
    finally:
        pl.Config.restore_defaults()
        plt.close("all")
    assert health["norm"].item() > 0
    assert (said["before"] != said["after"]).all()
    assert status == 0
    assert records["editor"].to_list() == ["ft"] * 6 + ["rome"] * 6
    assert records.null_count().sum_horizontal().item() == 0
    assert likely["editor"].to_list() == ["ft", "none", "rome"]
    # A tiny model's probabilities are 0 when rounded.
    learnt = names["likely"].group_by("editor").agg(pl.col("rewrite").list.first().mean())
    (rome,), (unedited,) = (learnt.filter(editor=name)["rewrite"] for name in ("rome", "none"))
    assert rome > unedited
    # Per editor as many points as there are prompts.
    drawn = [[len(line.get_xdata()) for line in axes.lines] for axes in names["panels"]]
    assert drawn == [[6] * 3, [12] * 3, [60] * 3]


def test_what_it_shows_is_whole_and_names_no_machine() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE[1:]:
        assert any("data" in output for output in cell["outputs"]), "execute the notebook"
    shown = json.dumps([cell["outputs"] for cell in CODE])
    assert not re.search(r"/(home|root|tmp|work|Users)/|Traceback", shown)
