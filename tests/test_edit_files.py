"""Edits as files: what comes back is what was written, and runs that keep and take edits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.store import DamagedError, MissingError, Store
from jobs.evaluate import evaluate
from jobs.inputs import record_stores
from jobs.inputs.record_stores import grid_of
from jobs.runs import config as configs
from jobs.runs import manifests
from jobs.runs.config import RunConfig
from jobs.tasks import stored_edits
from jobs.tasks.evaluation import Evaluation, EvaluationTask
from rome.data.records import RecordError, Request, from_table
from rome.data.results import TOLD_KINDS
from rome.editors import Editor
from rome.edits import files as edit_files
from rome.edits.deltas import DenseDelta, Edit, LowRankDelta, applied
from rome.edits.files import EditOrigin
from rome.models import EditableModel
from rome.options import ConfigError
from tests.support import tiny
from tests.support.computations import few_steps
from tests.support.tiny import REQUESTS, TEMPLATES


def tensors(edit: Edit) -> dict[str, Tensor]:
    return {
        f"{name} {part}": tensor
        for name, delta in edit.deltas.items()
        for part, tensor in vars(delta).items()
    }


def logits(model: EditableModel, edit: Edit) -> Tensor:
    with applied(model, [edit]):
        return model.hf(torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
@pytest.mark.parametrize("editor", ["rome", "memit", "ft"])
def test_an_edit_comes_back_as_it_was_written(family: str, editor: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    edit = few_steps(model, editor)[1]
    edit_files.save(tmp_path / "new" / "edit.safetensors", edit, model, editor)
    # Into another process's model, so to speak.
    again = tiny.model(family)
    found, origin = edit_files.load(tmp_path / "new" / "edit.safetensors", again)
    assert (origin.editor, origin.model) == (editor, family)
    assert (found.request, found.health) == (edit.request, edit.health)
    assert {type(d) for d in found.deltas.values()} == {type(d) for d in edit.deltas.values()}
    before, after = tensors(edit), tensors(found)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(again, found), logits(model, edit))
    assert not torch.equal(logits(again, found), logits(model, replace(edit, deltas={})))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["edit.safetensors"]


def test_other_programs_find_the_factors_under_the_names_of_the_weights(tmp_path: Path) -> None:
    model = tiny.model("llama")
    edit_files.save(tmp_path / "edit.safetensors", few_steps(model, "rome")[0], model, "rome")
    shapes = {name: list(t.shape) for name, t in load_file(tmp_path / "edit.safetensors").items()}
    name = "model.layers.1.mlp.down_proj.weight"
    assert shapes == {f"{name}/0/left": [16, 1], f"{name}/0/right": [40, 1]}


def test_what_edits_share_is_stored_once() -> None:
    model = tiny.model("gpt2")
    change = DenseDelta(torch.randn(16, 40, dtype=torch.float64))
    edits = [Edit(request, {model.weight_name(1): change}) for request in REQUESTS]
    origin = EditOrigin(editor="ft", model="gpt2", model_fingerprint="f")
    data = edit_files.dumps(edits, origin)
    assert len(data) < 2 * 16 * 40 * 8
    found, _ = edit_files.loads(data, model, "f", "it")
    assert [edit.request for edit in found] == REQUESTS
    assert len({id(delta) for edit in found for delta in edit.deltas.values()}) == 1


def test_an_edit_is_refused_on_other_weights(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    model = tiny.model("gpt2")
    edit_files.save(path, few_steps(model, "rome")[0], model, "rome")
    for other in (tiny.model("gpt2", "float32"), tiny.model("llama")):
        with pytest.raises(ValueError, match=r"of gpt2 with the weights \w{16}, but .* make the"):
            edit_files.load(path, other)
    changed = tiny.model("gpt2")
    changed.hf.transformer.h[0].attn.c_attn.bias[0] += 1e-12
    with pytest.raises(ValueError, match="weights"):
        edit_files.load(path, changed)


@pytest.mark.parametrize(
    ("name", "delta", "message"),
    [
        ("lm_tail.weight", DenseDelta(torch.zeros(2, 2)), "'lm_tail.weight', which gpt2 has not"),
        # Conv1D stores [K, D]: its own shape is the wrong one.
        ("transformer.h.1.mlp.c_proj.weight", DenseDelta(torch.zeros(40, 16)), r"\[40, 16\], but"),
        (
            "transformer.h.1.mlp.c_proj.weight",
            LowRankDelta(torch.zeros(16, 1), torch.zeros(41, 1)),
            r"\[16, 41\], but in gpt2 it is \[16, 40\]",
        ),
        ("transformer.h.1.mlp.c_proj.bias", DenseDelta(torch.zeros(16, 2)), r"it is \[16, 1\]"),
    ],
)
def test_an_edit_is_refused_on_other_shapes(
    name: str, delta: DenseDelta | LowRankDelta, message: str
) -> None:
    model = tiny.model("gpt2")
    origin = EditOrigin(editor="ft", model="gpt2", model_fingerprint="f")
    data = edit_files.dumps([Edit(REQUESTS[0], {name: delta})], origin)
    with pytest.raises(ValueError, match=message):
        edit_files.loads(data, model, "f", "it")


def test_a_damaged_or_foreign_file_says_so(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    path = tmp_path / "edit.safetensors"
    edit_files.save(path, few_steps(model, "rome")[0], model, "rome")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="damaged"):
        edit_files.load(path, model)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no file of edits"):
        edit_files.load(path, model)


def run_config(folder: Path, *overrides: str) -> RunConfig:
    """ROME, fine-tuning and a sequence of ROME on five everyday facts, two a lease."""
    model = tiny.model("gpt2")
    if not (folder / "model").exists():
        tiny.save(model, folder / "model")
        record_stores.prepare("everyday", str(folder / "everyday"), limit=5, shard_rows=4)
    path = folder / "run.yaml"
    path.write_text(
        f"""
        name: kept
        model:
          name: tiny
          source: {folder}/model
          dtype: float64
          editors: {{rome: {{layer: 1, second_moment: false, value: {{steps: 2}}}}}}
        benchmark: {folder}/everyday
        editors: {{none: {{}}, rome: {{}}, ft: {{steps: 2}}, row: {{editor: rome, sequence: 2}}}}
        scoring: {{generation: {{max_tokens: 70}}}}
        lease_records: 2
        workers: {{num_cpus: 0.5, workers: 1}}
        """
    )
    return configs.load(path, overrides)


def test_a_run_scores_the_edits_of_another_without_editing(
    tmp_path: Path, ray_address: str
) -> None:
    kept = str(tmp_path / "kept")
    assert evaluate(run_config(tmp_path, "keep_edits=true"), kept) == 0
    files = {path.relative_to(tmp_path / "kept/edits") for path in Path(kept).glob("edits/**/*.*")}
    parts = {
        path.relative_to(tmp_path / "kept/results").with_suffix(".safetensors")
        for path in Path(kept).glob("results/**/*.parquet")
        if "editor=none" not in str(path)
    }
    assert files == parts
    assert len(parts) == 9

    # Other leases, and a score that the first run did not make.
    again = str(tmp_path / "again")
    taken = ["lease_records=4", f"edits={kept}", "scoring.generation.max_tokens=80"]
    config = run_config(tmp_path, *taken)
    assert evaluate(config, again) == 0
    one, other = (
        pl.read_parquet(f"{run}/results/**/*.parquet", hive_partitioning=True).sort(
            "editor", "case_id"
        )
        for run in (kept, again)
    )
    assert one.select("editor", "case_id").equals(other.select("editor", "case_id"))
    told = [f"{kind}_nll_{target}" for kind in TOLD_KINDS for target in ("new", "true")]
    equal = [name for name in one.columns if name.startswith(("edit_", "rewrite_greedy"))]
    assert one.select(equal).equals(other.select(equal))
    for name in told:
        for a, b in zip(one[name].to_list(), other[name].to_list(), strict=True):
            assert a == pytest.approx(b, rel=1e-9), name
    assert (one["texts"] != other["texts"]).any()
    # Had it edited, its rows would tell: the same line with other settings is another run's.
    changed = run_config(tmp_path, *taken, "editors.rome.value.steps=3")
    with pytest.raises(ConfigError, match=r"other editors or settings(.|\n)*rome\.value"):
        evaluate(changed, str(tmp_path / "third"))
    assert not (tmp_path / "third").exists()


def test_records_out_of_sight_are_the_stores_fault(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    records = Store(tmp_path / "everyday")
    grid = grid_of(records, config.records, 2)
    name = records.list("shard-")[0]
    whole, first = records.read_table(name), next(grid.leases("benchmark=e/model=m/editor=rome"))

    def task() -> EvaluationTask:
        return EvaluationTask(Evaluation(config, records, grid, tuple(TEMPLATES)))

    records.write_table(name, whole.slice(1))
    with pytest.raises(DamagedError, match="in one of its shards"):
        task().run(first)
    records.delete(name)
    with pytest.raises(MissingError, match=name):
        task().run(first)
    records.write_table(name, whole)
    manifest = json.loads(records.read_bytes("manifest.json"))
    manifests.write(records, {**manifest, "reference_texts": 3})
    for name in records.list("reference_texts"):
        records.delete(name)
    with pytest.raises(MissingError, match="reference_texts"):
        task()


def test_only_edits_that_are_there_and_fit_are_scored(tmp_path: Path) -> None:
    config = run_config(tmp_path, "keep_edits=true")
    records = Store(tmp_path / "everyday")
    grid = grid_of(records, config.records, 2)
    group = "benchmark=everyday/model=tiny/editor=rome"
    kept = Store(tmp_path / "kept")
    task = EvaluationTask(Evaluation(config, records, grid, tuple(TEMPLATES), run=kept))
    first = next(grid.leases(group))
    kept.write_table(f"results/{first.part}", task.run(first))
    manifests.write(kept, {"name": "kept", "editors": ["rome"], "records": first.rows})
    other = replace(config, edits=kept.uri)
    scorer = EvaluationTask(Evaluation(other, records, grid, ()))
    assert scorer.run(first)["edit_norm"].to_pylist() == task.run(first)["edit_norm"].to_pylist()
    missing = scorer.run(list(grid.leases(group))[1]).to_pylist()
    assert [row["status"] for row in missing] == ["error", "error"]
    assert all("keeps no edit of case" in row["error"] for row in missing)
    with pytest.raises(ValueError, match="keep_edits: true"):
        scorer.run(next(grid.leases(group.replace("rome", "ft"))))
    # Rows, or their edits, that are out of sight are the store's fault, and no record's.
    manifests.write(kept, {"name": "kept", "editors": ["rome"], "records": first.rows + 1})
    scorer = EvaluationTask(Evaluation(other, records, grid, ()))
    with pytest.raises(DamagedError, match="it must be finished, and have all its files"):
        scorer.run(list(grid.leases(group))[1])
    kept.delete(f"edits/{first.part.replace('.parquet', '.safetensors')}")
    with pytest.raises(MissingError):
        scorer.run(first)
    kept.write_table(f"results/{first.part}", task.run(first))
    # The same case ids of other facts.
    there = from_table(records.read_table("shard-00000.parquet"))[:2]
    stored = stored_edits.StoredEdits(kept, group, task.model, task.fingerprint)
    with pytest.raises(ValueError, match=r"the edit of .* but the record asks for"):
        stored.edit_records([replace(one, subject="Eve") for one in there])


class Fragile:
    """ROME that cannot do some subjects, or does them wrong, and counts how often it is asked."""

    def __init__(self, editor: Editor, bad: dict[str, str]) -> None:
        self.editor, self.bad, self.calls = editor, bad, 0

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        self.calls += 1
        for request in requests:
            if self.bad.get(request.subject) == "error":
                raise RecordError(f"{request.subject} cannot be edited")
            if self.bad.get(request.subject) == "bug":
                raise ValueError("a mistake of ours")
        return [
            replace(edit, health={**edit.health, "norm": float("nan")})
            if self.bad.get(edit.request.subject) == "nan"
            else edit
            for edit in self.editor.edit(requests)
        ]


def test_a_record_that_cannot_be_done_is_a_row_at_once_and_its_neighbours_are_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(tmp_path, "keep_edits=true")
    records = Store(tmp_path / "everyday")
    grid = grid_of(records, config.records, 4)
    kept = Store(tmp_path / "kept")
    task = EvaluationTask(Evaluation(config, records, grid, tuple(TEMPLATES), run=kept))
    lease = next(grid.leases("benchmark=everyday/model=tiny/editor=rome"))
    good = task.run(lease).to_pylist()
    subjects = [row["subject"] for row in good]
    fragile = Fragile(task.editors["rome"], {subjects[1]: "error", subjects[3]: "nan"})
    task.editors["rome"] = fragile
    rows = task.run(lease).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "error", "ok", "error"]
    assert [row["attempts"] for row in rows] == [1] * 4
    assert f"{subjects[1]} cannot be edited" in rows[1]["error"]
    assert "the edit is not finite" in rows[3]["error"]
    assert fragile.calls == 1 + 4
    for n in (0, 2):
        assert rows[n]["rewrite_nll_new"] == pytest.approx(good[n]["rewrite_nll_new"], rel=1e-6)
    # The edits of those that are done lie beside the parts of one that they will have.
    names = {path.name for path in Path(kept.uri).rglob("*.safetensors")}
    singles = {Path(one.part).stem for one in lease.singles()}
    assert {name.removesuffix(".safetensors") for name in names} & singles == {
        Path(lease.singles()[n].part).stem for n in (0, 2)
    }
    assert "Traceback" in caplog.text
    fragile.bad = {subjects[0]: "bug"}
    with pytest.raises(ValueError, match="a mistake of ours"):
        task.run(lease)
