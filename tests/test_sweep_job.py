"""Edits at every token position, and jobs.sweep as a user runs it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import polars as pl
import pytest
import torch
import yaml

from rome.editors.contexts import Position
from rome.editors.rome import Rome
from tests.support import oracle, tiny
from tests.support.commands import command
from tests.support.computations import BUDGET, CLAMPED, correlated_moment
from tests.support.oracle import parts
from tests.support.tiny import REQUESTS, TEMPLATES, close


def position_of(position: str) -> Any:
    """The index of a position by counting tokens from the front."""

    def index(tokenizer: Any, prompt: str, subject: str) -> int:
        before, after = prompt.rstrip().split("{}")
        first = len(oracle.first(tokenizer))
        start = first + len(oracle.tokens(tokenizer, before.removesuffix(" ")))
        word = oracle.tokens(tokenizer, f" {subject}" if before else subject)
        if tokenizer.decode(word[:1]) == " ":  # A space of its own is not the subject's.
            start, word = start + 1, word[1:]
        n = len(word)
        end = start + n + len(oracle.tokens(tokenizer, after))
        return {
            "subject_first": start,
            "subject_middle": start + (n - 1) // 2,
            "subject_last": start + n - 1,
            "subject_after": min(start + n, end - 1),
            "last": end - 1,
        }[position]

    return index


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
@pytest.mark.parametrize("position", get_args(Position))
def test_an_edit_is_made_at_its_position(
    family: str, position: Position, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the oracle, whose edited token is counted from the front."""
    torch.set_num_threads(1)
    monkeypatch.setattr(oracle, "subject_last", position_of(position))
    model, moment = tiny.model(family), correlated_moment()
    settings = replace(CLAMPED, position=position)
    editor = Rome(model, settings, TEMPLATES, moment.solver(), BUDGET)
    for request, edit in zip(REQUESTS, editor.edit(REQUESTS), strict=True):
        expected = oracle.rome(model, settings, TEMPLATES, moment.mean(), request)
        lambda_D, u_K = parts(edit)
        assert close(u_K, expected.u_K, 1e-9)
        assert close(lambda_D, expected.lambda_D, 1e-6)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 in float64, its run file, and a store of six records."""
    folder = tmp_path_factory.mktemp("sweep")
    model = tiny.model("gpt2")
    tiny.save(model, folder / "model")
    config = {
        "name": "tiny",
        "model": {
            "name": "tiny-gpt2",
            "source": str(folder / "model"),
            "dtype": "float64",
            "second_moment": {"corpus": "self", "tokens": 2000},
            "editors": {"rome": {"layer": 1}},
        },
        "benchmark": str(folder / "records"),
        "editors": {"none": {}, "rome": {"value": {"steps": 2}}},
        "templates": {"texts": ["{}"]},
        "lease_records": 6,
        "workers": {"workers": 0},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert command("prepare", "everyday", "--limit", 6, "--out", folder / "records")[0] == 0
    return folder


def sweep(workspace: Path, *options: str) -> tuple[int, str]:
    arguments = [workspace / "tiny.yaml", "--out", workspace / "out", *options]
    return command("sweep", *arguments, ROME_WORKSPACE=workspace)


def test_every_layer_and_position_has_its_scores(workspace: Path) -> None:
    status, text = sweep(workspace)
    assert status == 0, text
    frame = pl.read_parquet(workspace / "out" / "sweep.parquet")
    places = frame.drop_nulls("layer").select("layer", "position").rows()
    assert sorted(places) == sorted((n, p) for n in range(3) for p in get_args(Position))
    assert (frame["n"] == 6).all()
    assert frame.filter(editor="none")["layer"].to_list() == [None]
    assert not {"GE", "RS"} & set(frame.columns)
    rows = pl.read_parquet(workspace / "out" / "results/**/*.parquet", hive_partitioning=True)
    losses = rows.filter(pl.col("editor") != "none").group_by("case_id").agg("edit_loss")
    # Edits of one record at different places are different edits.
    assert all(len({round(x, 12) for x in row}) > 10 for row in losses["edit_loss"])
    assert (workspace / "out/figures/sweep.png").read_bytes().startswith(b"\x89PNG")
    drawn = (workspace / "out/figures/sweep.svg").read_text()
    names = [position.replace("_", " ") for position in get_args(Position)]
    assert all(f">{name}</text>" in drawn for name in [*names, "unedited"])
    assert "ROME's layer, 1" in drawn
    assert "best S" in text
    # One pass over the corpus gave the second moments of all layers.
    assert len(list(workspace.glob("second_moments/**/layer-*.safetensors"))) == 3
    before = {p: p.stat().st_mtime_ns for p in workspace.glob("out/results/**/*.parquet")}
    status, text = sweep(workspace)
    assert status == 0, text
    assert before == {p: p.stat().st_mtime_ns for p in workspace.glob("out/results/**/*.parquet")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--positions", "middle"], "positions must be among subject_first"),
        (["--layers", "1,3"], "layer must be from 0 to 2, got 3"),
    ],
)
def test_places_that_are_none_are_refused(
    workspace: Path, options: list[str], message: str
) -> None:
    status, text = sweep(workspace, *options)
    assert status == 1
    assert message in text
