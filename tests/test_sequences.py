"""Groups of records that share an edited model, against weights written one by one by hand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml

from cluster.store import Store
from jobs.inputs.record_stores import grid_of
from jobs.runs import config as configs
from jobs.runs import manifests
from jobs.tasks.evaluation import Evaluation, EvaluationTask
from rome.data.records import Request, to_table
from rome.editors import Editor, Unedited
from rome.editors.rome import Rome, RomeSettings
from rome.editors.values import ValueSettings
from rome.edits.deltas import DenseDelta, Edit, LowRankDelta, dense
from rome.edits.grouping import Grouping
from rome.edits.sequences import grouped
from rome.evaluation import evaluate
from rome.models import EditableModel
from rome.options import ConfigError
from tests.support import tiny
from tests.support.computations import RECORDS, scores
from tests.support.oracle import edited
from tests.support.tiny import REQUESTS, TEMPLATES

LAYER = 1
STAGES = ("edit", "probabilities", "greedy", "wild", "generation")
SECONDS = [f"seconds_{stage}" for stage in STAGES]
SETTINGS = RomeSettings(LAYER, ValueSettings(steps=3, stop_below=0), second_moment=False)


class Dense:
    """The same changes as another editor's, every second of them as a dense delta."""

    def __init__(self, editor: Editor) -> None:
        self.editor, self.count = editor, 0

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        edits = []
        for edit in self.editor.edit(requests):
            self.count += 1
            if self.count % 2:
                deltas = {name: DenseDelta(dense(delta)) for name, delta in edit.deltas.items()}
                edit = replace(edit, deltas=deltas)
            edits.append(edit)
        return edits


class Joined:
    """Edits requests together, as one change that is the sum of the changes that each wants."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        return self.editor.edit(requests)

    def edit_together(self, requests: Sequence[Request]) -> Edit:
        edits = self.editor.edit(requests)
        (name,) = edits[0].deltas
        change_DK = torch.stack([dense(edit.deltas[name]) for edit in edits]).sum(0)
        return Edit(requests[0], {name: DenseDelta(change_DK)}, {"steps": 3})


def rome(model: EditableModel) -> Rome:
    return Rome(model, SETTINGS, TEMPLATES, None, 300)


def by_hand(model: EditableModel, scored: Literal["after", "end"]) -> list[dict[str, Any]]:
    """Each edit is written into the weight before the next one; records are scored as they are."""
    rows, healths = [], []
    with ExitStack() as stack:
        for record in RECORDS:
            (edit,) = rome(model).edit([record.request])
            (delta,) = edit.deltas.values()
            stack.enter_context(edited(model, LAYER, dense(delta)))
            healths.append({f"edit_{name}": value for name, value in edit.health.items()})
            if scored == "after":
                rows += scores(model, Unedited(), [record])
        if scored == "end":
            rows = scores(model, Unedited(), RECORDS)
    return [row | health for row, health in zip(rows, healths, strict=True)]


def check_same(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if isinstance(value, float) or (value and "_nll_" in name):
                assert value == pytest.approx(other[name], rel=1e-7, abs=1e-12), name
            else:
                assert value == other[name], name


@pytest.mark.parametrize("scored", ["after", "end"])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_a_sequence_equals_weights_written_by_hand(
    family: str, scored: Literal["after", "end"]
) -> None:
    model = tiny.model(family)
    before = model.fingerprint()
    expected = by_hand(model, scored)
    editor = grouped(model, rome(model), Grouping(sequence=len(RECORDS), scored=scored))
    rows = scores(model, editor, RECORDS)
    check_same(rows, expected)
    # That it is a sequence matters: all edits but the first are others than they would be alone.
    alone = scores(model, rome(model), RECORDS)
    same = [
        row["edit_loss"] == pytest.approx(one["edit_loss"], rel=1e-9)
        for row, one in zip(rows, alone, strict=True)
    ]
    assert same == [True, False, False, False, False]
    first, alone_first = (made[0]["rewrite_nll_new"] for made in (rows, alone))
    assert (first == pytest.approx(alone_first, rel=1e-9)) == (scored == "after")
    assert model.fingerprint() == before


def test_ranks_add_up_and_dense_deltas_combine() -> None:
    model = tiny.model("gpt2")
    low = grouped(model, rome(model), Grouping(sequence=5, scored="after")).edit(REQUESTS)
    ranks = []
    for edit in low:
        (delta,) = edit.deltas.values()
        assert isinstance(delta, LowRankDelta)
        ranks.append(delta.left_DR.shape[1])
    assert ranks == [1, 2, 3, 4, 5]
    mixed = grouped(model, Dense(rome(model)), Grouping(sequence=5, scored="after")).edit(REQUESTS)
    for one, other in zip(low, mixed, strict=True):
        (a,), (b,) = one.deltas.values(), other.deltas.values()
        assert isinstance(b, DenseDelta)
        assert torch.allclose(dense(a), dense(b), rtol=1e-9, atol=1e-12)


def test_the_change_of_a_long_sequence_is_no_larger_than_the_weight() -> None:
    model = tiny.model("gpt2")
    quick = RomeSettings(LAYER, ValueSettings(steps=1), second_moment=False)
    editor = Rome(model, quick, TEMPLATES[:1], None, 300)
    edits = grouped(model, editor, Grouping(sequence=40)).edit(REQUESTS * 8)
    ((delta, *others),) = ({id(d): d for edit in edits for d in edit.deltas.values()}.values(),)
    assert others == []
    assert isinstance(delta, DenseDelta)


def test_a_sequence_scored_on_the_way_holds_a_few_models_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its rows are those of the whole sequence in one piece."""
    config = configs.load(run_file(tmp_path, sequence=3, scored="after"), ["lease_records=3"])
    store = Store(tmp_path / "records")
    grid = grid_of(store, config.records, config.lease(gpus=False))
    (first, _) = grid.leases("benchmark=records/model=tiny-gpt2/editor=many")
    rows = []
    for at_a_time in (8, 2, 1):
        monkeypatch.setattr("rome.edits.sequences._SCORED_TOGETHER", at_a_time)
        sizes: list[int] = []
        task = EvaluationTask(Evaluation(config, store, grid, tuple(TEMPLATES)))
        monkeypatch.setattr(
            "jobs.tasks.evaluation.evaluate",
            lambda *args, sizes=sizes: sizes.append(len(args[2])) or evaluate(*args),
        )
        rows.append(task.run(first).drop_columns(SECONDS).to_pylist())
        assert max(sizes) == min(at_a_time, 3)
    check_same(rows[1], rows[0])
    check_same(rows[2], rows[0])
    assert rows[0][0]["edit_loss"] != rows[0][1]["edit_loss"]


def test_together_is_one_edit_for_all() -> None:
    model = tiny.model("gpt2")
    joined = Joined(rome(model))
    edits = grouped(model, joined, Grouping(edits_per_model=5)).edit(REQUESTS)
    assert [edit.request for edit in edits] == REQUESTS
    assert {id(delta) for edit in edits for delta in edit.deltas.values()} == {
        id(delta) for delta in edits[0].deltas.values()
    }
    assert all(edit.health == {"steps": 3} for edit in edits)
    with pytest.raises(ValueError, match="Rome, which has no edit_together"):
        grouped(model, rome(model), Grouping(edits_per_model=5))


@pytest.mark.parametrize("scored", ["after", "end"])
def test_batches_follow_each_other(scored: Literal["after", "end"]) -> None:
    """Each is made on the weights with those before it, written by hand."""
    model = tiny.model("gpt2")
    expected = []
    with ExitStack() as stack:
        for some in (RECORDS[:2], RECORDS[2:4], RECORDS[4:]):
            edit = Joined(rome(model)).edit_together([record.request for record in some])
            (delta,) = edit.deltas.values()
            stack.enter_context(edited(model, LAYER, dense(delta)))
            if scored == "after":
                expected += scores(model, Unedited(), some)
        if scored == "end":
            expected = scores(model, Unedited(), RECORDS)
    grouping = Grouping(edits_per_model=2, sequence=3, scored=scored)
    rows = scores(model, grouped(model, Joined(rome(model)), grouping), RECORDS)
    check_same(rows, [row | {"edit_steps": 3} for row in expected])


def test_prune_damps_what_is_scored_and_not_what_edits_go_on_from() -> None:
    model = tiny.model("gpt2")
    name = model.weight_name(LAYER)
    weight_KD = model.hf.get_parameter(name).detach()
    largest = torch.linalg.matrix_norm(weight_KD, 2)
    plain, damped = (Grouping(sequence=5, prune=prune) for prune in (False, True))
    loud = replace(SETTINGS, value=replace(SETTINGS.value, learning_rate=20.0))
    editor = Rome(model, loud, TEMPLATES, None, 300)
    totals = [
        grouped(model, editor, one).edit(REQUESTS)[-1].deltas[name] for one in (plain, damped)
    ]
    before_R, after_R = (torch.linalg.svdvals(dense(total)) for total in totals)
    assert before_R[0] > largest
    expected_R = torch.where(
        before_R > largest,
        torch.minimum((before_R / largest).log() + largest, before_R),
        before_R,
    )
    assert torch.allclose(after_R, expected_R.sort(descending=True).values, rtol=1e-9, atol=1e-9)


def test_a_failed_edit_leaves_the_weights_as_they_were() -> None:
    model = tiny.model("gpt2")
    before = model.fingerprint()
    editor = grouped(model, rome(model), Grouping(sequence=3))
    with pytest.raises(ValueError, match=r"'\{\}'"):
        editor.edit([REQUESTS[0], REQUESTS[1], Request("no braces", "Bob", "Rome")])
    assert model.fingerprint() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"edits_per_model": 0}, "at least 1, got 0, 1, 1"),
        ({"sequence": -1}, "at least 1, got 1, -1, 1"),
        ({"orders": 0, "checkpoints": (1,)}, "at least 1, got 1, 1, 0"),
        ({"orders": 2}, "orders must be 1 without checkpoints, got 2"),
        ({"sequence": 4, "checkpoints": (4, 2)}, r"must be rising .* got \[4, 2\]"),
        ({"sequence": 4, "checkpoints": (2, 2)}, r"must be rising .* got \[2, 2\]"),
        ({"sequence": 4, "checkpoints": (5,)}, r"the last .* \(4\), got \[5\]"),
        ({"sequence": 4, "checkpoints": (0, 4)}, r"got \[0, 4\]"),
        ({"edits_per_model": 2, "sequence": 2, "checkpoints": (3,)}, r"multiples of .* \(2\)"),
        ({"sequence": 4, "checkpoints": (2,)}, r"the last .* \(4\), got \[2\]"),
        ({"sequence": 2, "checkpoints": (2,), "scored": "after"}, "scored must be 'end'"),
    ],
)
def test_a_group_is_refused_if_it_contradicts_itself(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Grouping(**settings)


def run_file(folder: Path, **row: Any) -> Path:
    """A run of ROME on a tiny GPT-2 over the records, two of them a lease, in shards of three."""
    model = tiny.model("gpt2")
    tiny.save(model, folder / "model")
    store = Store(folder / "records")
    for i in range(2):
        store.write_table(f"shard-{i:05d}.parquet", to_table(RECORDS[3 * i : 3 * i + 3]))
    manifests.write(store, {"reference_texts": 0})
    source = {"name": "tiny-gpt2", "source": str(folder / "model"), "dtype": "float64"}
    settings = {"layer": LAYER, "second_moment": False, "value": {"steps": 3}}
    config = {
        "name": "tiny",
        "model": source,
        "benchmark": store.uri,
        "editors": {"many": {"editor": "rome", **settings, **row}},
        "scoring": {"generation": {"max_tokens": 24}},
        "lease_records": 2,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_record_that_is_leased_alone_is_scored_in_its_group(tmp_path: Path) -> None:
    """As after a failure: the model of a record does not depend on how leases were split."""
    config = configs.load(run_file(tmp_path, sequence=2))
    store = Store(tmp_path / "records")
    grid = grid_of(store, config.records, config.lease(gpus=False))
    task = EvaluationTask(Evaluation(config, store, grid, tuple(TEMPLATES)))
    group = "benchmark=records/model=tiny-gpt2/editor=many"
    leases = list(grid.leases(group))
    assert [lease.rows for lease in leases] == [2, 1, 2]
    whole = [row for lease in leases for row in task.run(lease).to_pylist()]
    # Backwards, so that no group is still known from the record before.
    singles = [single for lease in leases for single in lease.singles()]
    parts = {single: task.run(single).to_pylist() for single in reversed(singles)}
    task.verify()
    assert [row["case_id"] for row in whole] == [record.case_id for record in RECORDS]
    for row, single in zip(whole, singles, strict=True):
        (one,) = parts[single]
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in row.items() if "seconds" not in k
        }
    assert whole[0]["edit_loss"] != whole[1]["edit_loss"]


def test_a_group_must_fit_into_its_lease_and_into_its_editor(tmp_path: Path) -> None:
    path = run_file(tmp_path, sequence=4)
    with pytest.raises(ConfigError, match=r"multiple of 4, .* editors\.many, got 2"):
        configs.load(path)
    config = configs.load(path, ["lease_records=8", "editors.many.scored=after"])
    assert config.grouping("many") == Grouping(sequence=4, scored="after")
    both = configs.load(path, ["lease_records=8", "editors.many.edits_per_model=2"])
    assert both.grouping("many").size == 8
    with pytest.raises(ConfigError, match=r"many\.scored: .*'after' or 'end', got 'often'"):
        configs.load(path, ["lease_records=8", "editors.many.scored=often"])


def test_a_group_must_fit_into_its_shard(tmp_path: Path) -> None:
    """Else ten thousand edits of a model would be a thousand, silently."""
    config = configs.load(run_file(tmp_path), ["lease_records=4"])
    store = Store(tmp_path / "records")
    with pytest.raises(ConfigError, match=r"4 records .* shards of 3, .* --shard-rows 4 or more"):
        grid_of(store, config.records, 4, together=4)
    assert len(grid_of(store, config.records, 3, together=3)) == len(RECORDS)
    first = replace(config.records, limit=3)
    assert len(grid_of(store, first, 4, together=4)) == 3
