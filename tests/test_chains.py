"""Chains: batches of edits that follow each other, over leases, workers and lost drivers."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from polars.testing import assert_frame_equal
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.grid import Grid, Lease
from cluster.here import drive_here
from cluster.progress import Progress
from cluster.queue import LeaseTable
from cluster.store import Store
from jobs.cli import STOPPED
from jobs.compare import compare, read
from jobs.evaluate import evaluate
from jobs.export import export
from jobs.inputs.record_stores import grid_of, prepare
from jobs.output import chains as chain_pages
from jobs.reduce import app as reduce_app
from jobs.reduce import reduce
from jobs.runs import config as configs
from jobs.runs import growth
from jobs.runs.chains import Chain, chains_of, groups_of, with_chains
from jobs.runs.config import RunConfig
from jobs.runs.parts import collect, hive_values, of_results
from jobs.status import status
from jobs.tasks.chains import HELD_OUT
from jobs.tasks.evaluation import Evaluation, EvaluationTask, group_of
from rome.analysis import chains
from rome.analysis.metrics import METRICS
from rome.analysis.summary import with_metrics
from rome.data.records import Record, Request, from_table
from rome.editors import Editor, Unedited
from rome.editors.ultraedit import UltraEdit, UltraEditSettings
from rome.edits import sequences
from rome.edits.deltas import DenseDelta, Edit, dense
from rome.edits.files import EditOrigin, dumps_chain, loads_chain
from rome.edits.grouping import Grouping
from rome.edits.sequences import ChainState
from rome.models import EditableModel
from rome.options import ConfigError
from rome.scoring import drift
from tests.support import tiny
from tests.support.commands import invoke
from tests.support.computations import scores
from tests.support.oracle import edited
from tests.support.tiny import TEMPLATES

LAYER = 1
RECORDS = 6
CHAIN = {"editor": "rome", "layer": LAYER, "second_moment": False, "value": {"steps": 3}}


def run_config(folder: Path, *overrides: str, **row: Any) -> RunConfig:
    """A chain of ROME, one edit after another, on six everyday facts in shards of four."""
    model = tiny.model("gpt2")
    if not (folder / "model").exists():
        tiny.save(model, folder / "model")
        prepare("everyday", str(folder / "records"), limit=RECORDS, shard_rows=4)
    path = folder / "run.yaml"
    chain = CHAIN | ({"sequence": 6, "checkpoints": [2, 6]} | row)
    config = {
        "name": "chains",
        "model": {"name": "tiny", "source": str(folder / "model"), "dtype": "float64"},
        "benchmark": str(folder / "records"),
        "editors": {"none": {}, "chain": chain},
        "scoring": {"generation": None, "strict": False},
        "templates": {"texts": TEMPLATES},
        "lease_records": 2,
        "workers": {"workers": 0},
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return configs.load(path, overrides)


def rows_of(folder: Path) -> pl.DataFrame:
    found = collect(Store(folder), lambda rows: with_metrics(rows).collect())
    return found.sort("order", "edits", "case_id")


def records_of(folder: Path) -> list[Record]:
    store = Store(folder / "records")
    names = store.list("shard-", ".parquet")
    return [record for name in names for record in from_table(store.read_table(name))]


def by_hand(
    model: EditableModel, editor: Editor, records: Sequence[Record], edits: int
) -> list[dict[str, Any]]:
    """The first so many records edited, each written before the next one; then all are scored."""
    with ExitStack() as stack:
        for record in records[:edits]:
            (edit,) = editor.edit([record.request])
            (delta,) = edit.deltas.values()
            stack.enter_context(edited(model, LAYER, dense(delta)))
        return scores(model, Unedited(), records[:edits])


def test_a_chain_equals_weights_written_by_hand(tmp_path: Path) -> None:
    config = run_config(tmp_path, orders=2)
    assert evaluate(config, str(tmp_path / "run")) == 0
    states = Store(tmp_path / "run").list("chains/", ".safetensors")
    assert [name.rpartition("/")[2].split("-")[1] for name in states] == ["0000002", "0000006"] * 2
    rows = rows_of(tmp_path / "run")
    none, chain = rows.filter(editor="none"), rows.filter(pl.col("editor") != "none")
    assert chain["editor"].to_list() == (["chain@2"] * 2 + ["chain@6"] * 6) * 2
    assert none["edits"].to_list() == [None] * 6
    assert chain["order"].to_list() == [0] * 8 + [1] * 8
    assert chain["edits"].to_list() == [2] * 2 + [6] * 6 + [2] * 2 + [6] * 6
    records = records_of(tmp_path)
    task = task_of(config, tmp_path)
    editor = task.editors_alone["chain"]
    ids = [record.case_id for record in records]
    (_, second) = chains_of(config, "chain", "x", ids)
    assert sorted(second.case_ids) == ids != list(second.case_ids)
    for order, case_ids in enumerate((ids, second.case_ids)):
        ordered = [records[ids.index(case_id)] for case_id in case_ids]
        for edits in (2, 6):
            expected = by_hand(task.model, editor, ordered, edits)
            found = {
                row["case_id"]: row
                for row in chain.filter(order=order, edits=edits).iter_rows(named=True)
            }
            assert found.keys() == set(case_ids[:edits])
            for place, row in enumerate(expected):
                one = found[row["case_id"]]
                assert one["age"] == edits - place - 1
                for name in ("rewrite_nll_new", "paraphrase_nll_true", "neighborhood_nll_true"):
                    assert one[name] == pytest.approx(row[name], rel=1e-9), name


class TaskOf(EvaluationTask):
    """A task whose editors can be asked for edits outside their chains."""

    @property
    def editors_alone(self) -> dict[str, Editor]:
        return {name: self._editor(name) for name in self.evaluation.config.editors}


def evaluation_of(config: RunConfig, folder: Path) -> tuple[Evaluation, list[str]]:
    store = Store(folder / "records")
    grid = grid_of(store, config.records, 2)
    ids = [case_id for shard in grid.shards for case_id in shard]
    chains = chains_of(config, "chain", group_of(config, "everyday", "chain"), ids)
    groups = [*groups_of(chains), group_of(config, "everyday", "none")]
    evaluation = Evaluation(
        config,
        store,
        with_chains(grid, chains),
        tuple(TEMPLATES),
        run=Store(folder / "run"),
        chains={group: chain for chain in chains for group in groups_of([chain])},
    )
    return evaluation, groups


def test_an_order_is_the_same_in_every_python(tmp_path: Path) -> None:
    """A chain is gone on with by its order, whichever Python the next driver has."""
    config = run_config(tmp_path, orders=3)
    orders = [chain.case_ids for chain in chains_of(config, "chain", "x", [0, 1, 2, 3, 4, 5])]
    assert orders == [(0, 1, 2, 3, 4, 5), (2, 3, 5, 0, 4, 1), (2, 3, 1, 4, 5, 0)]


def task_of(config: RunConfig, folder: Path) -> TaskOf:
    return TaskOf(evaluation_of(config, folder)[0])


def test_a_lease_ends_at_each_checkpoint_and_a_checkpoint_waits_for_its_batch() -> None:
    def leases(**settings: Any) -> list[tuple[int, int]]:
        grouping = Grouping(**settings)
        chain = Chain("memit", 0, tuple(range(grouping.size)), grouping, "editor=memit")
        grid = with_chains(Grid((chain.case_ids,), 8), [chain])
        for edits in grouping.checkpoints:
            after = grid.own[chain.scores(edits)].after
            assert after == (chain.batches, edits // grouping.edits_per_model - 1)
            assert len(grid.own[chain.scores(edits)]) == edits
        return [(lease.start, lease.stop) for lease in grid.leases(chain.batches)]

    marks = (100, 500, 1000, 2000)
    twenty = leases(edits_per_model=100, sequence=20, checkpoints=marks)
    assert twenty == [(i, i + 1) for i in range(20)]
    one_by_one = leases(sequence=2000, checkpoints=marks)
    assert one_by_one == [(i, i + 100) for i in range(0, 2000, 100)]
    assert leases(edits_per_model=10, sequence=9, checkpoints=(30, 90)) == [(0, 3), (3, 6), (6, 9)]
    assert leases(edits_per_model=500, sequence=2, checkpoints=(1000,)) == [(0, 1), (1, 2)]


def test_a_chain_goes_on_after_any_lease_and_from_any_state_that_is_left(tmp_path: Path) -> None:
    """Every lease by another task, and every second state lost: the rows are those of one piece."""
    config = run_config(tmp_path, checkpoints=[2, 4, 6])
    assert evaluate(config, str(tmp_path / "run")) == 0
    whole = rows_of(tmp_path / "run").drop(pl.selectors.starts_with("seconds"), "worker")
    evaluation, groups = evaluation_of(config, tmp_path)
    run = Store(tmp_path / "pieces")
    held_out = (tmp_path / "run" / HELD_OUT).read_bytes()
    run.write_bytes(HELD_OUT, held_out)
    evaluation = replace(evaluation, run=run)
    results = run.sub("results")
    done = 0
    while not (table := LeaseTable(results, groups, evaluation.grid)).finished:
        lease = table.lease("a worker that is new each time")
        assert lease is not None
        results.write_table(lease.part, EvaluationTask(evaluation).run(lease))
        states = run.list("chains/", ".safetensors")
        if edits := hive_values(lease.group).get("edits"):
            # The state of a checkpoint, lost or not, is there again as it was.
            (name,) = [name for name in states if f"/edits-{int(edits):07d}-" in name]
            assert hashlib.sha256(run.read_bytes(name)).hexdigest()[:16] in name
        done += 1
        if states and done % 2:
            run.delete(states[-1])
        elif states:
            run.write_bytes(states[-1], run.read_bytes(states[-1])[:-8])
    pieces = rows_of(tmp_path / "pieces").drop(pl.selectors.starts_with("seconds"), "worker")
    assert pieces.equals(whole)


def test_states_between_checkpoints_are_removed_and_batches_say_what_they_did(
    tmp_path: Path,
) -> None:
    config = run_config(tmp_path, checkpoints=[6])
    grouping = config.grouping("chain")
    assert grouping.size == 6
    evaluation, _ = evaluation_of(config, tmp_path)
    (chain,) = {id(chain): chain for chain in evaluation.chains.values()}.values()
    single = Grid((tuple(range(6)),), 1, in_order=True)
    evaluation = replace(
        evaluation,
        grid=replace(evaluation.grid, own={**evaluation.grid.own, chain.batches: single}),
    )
    task = EvaluationTask(evaluation)
    run = Store(tmp_path / "run")
    run.write_bytes(HELD_OUT, _texts(task.model))
    for lease in evaluation.grid.leases(chain.batches):
        table = task.run(lease)
        run.sub("results").write_table(lease.part, table)
        assert len(run.list("chains/", ".safetensors")) <= 2
    (last,) = table.to_pylist()
    assert (last["edits"], last["case_id"], last["records"]) == (6, 5, [chain.case_ids[5]])
    assert last["weights"] == [task.model.weight_name(LAYER)]
    (norm,), (change,) = last["weight_norms"], last["change_norms"]
    with task.chains.at(chain, 6):
        weight = task.model.hf.get_parameter(task.model.weight_name(LAYER))
        assert norm == pytest.approx(float(weight.norm()))
    assert change > 0
    assert 0 < last["agreement"] <= 1
    assert last["perplexity"] != pytest.approx(last["perplexity_unedited"], rel=1e-9)
    task.verify()


def _texts(model: EditableModel) -> bytes:
    ids = [row.ids for row in model.encode(["The mother tongue of Bob", "Rome is a city in Italy"])]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"ids": ids}), buffer)
    return buffer.getvalue()


class Fails:
    """An editor that cannot edit one subject."""

    def __init__(self, editor: Editor, subject: str) -> None:
        self.editor, self.subject = editor, subject

    def edit(self, requests: Sequence[Request]) -> list[Edit]:
        edits = self.editor.edit(requests)
        nan = torch.tensor(float("nan"))
        return [
            replace(
                edit,
                deltas={
                    name: DenseDelta(dense(delta) * nan) for name, delta in edit.deltas.items()
                },
            )
            if edit.request.subject == self.subject
            else edit
            for edit in edits
        ]


def test_an_edit_that_cannot_be_made_ends_its_chain_where_it_stands(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    evaluation, groups = evaluation_of(config, tmp_path)
    subject = records_of(tmp_path)[3].subject

    class Work:
        def task(self) -> EvaluationTask:
            task = EvaluationTask(evaluation)
            chain = task.chains._editors["chain"]
            chain._editor = Fails(chain._editor, subject)
            return task

        dead_row = staticmethod(evaluation.dead_row)

    run = Store(tmp_path / "run")
    run.write_bytes(HELD_OUT, _texts(tiny.model("gpt2")))
    results = run.sub("results")

    def drive(retry: bool = False, work: Any = None) -> LeaseTable:
        table = LeaseTable(results, groups, evaluation.grid, retry_dead=retry)
        with Progress(table.total, len(table.done)) as progress:
            drive_here(
                table,
                evaluation.grid,
                results,
                work or Work(),
                None,
                threading.Event(),
                progress,
            )
        return LeaseTable(results, groups, evaluation.grid)

    table = drive()
    chain = rows_of(tmp_path / "run").filter(pl.col("edits") > 0)
    assert chain.filter(edits=2)["status"].to_list() == ["ok", "ok"]
    late = chain.filter(edits=6)
    assert late["status"].to_list() == ["error"] * 6
    says = r"the chain of chain in order 0 ended in batch 3, case \d+: .*not finite.*--retry-dead"
    assert late["error"].str.contains(says).all()
    assert late["attempts"].to_list() == [1] * 6
    assert len(table.dead) == 3 + 6
    batches = [
        row for name in results.list("batches/") for row in results.read_table(name).to_pylist()
    ]
    ended = [row for row in batches if row["status"] == "error"]
    assert [row["attempts"] for row in ended] == [1] * 3
    assert len({row["error"] for row in ended}) == 1
    assert ended[0]["records"] == [records_of(tmp_path)[3].case_id]
    # Tried again with what the editor lacked, the chain goes on where it ended.
    table = drive(retry=True, work=evaluation)
    assert not table.dead
    assert rows_of(tmp_path / "run").filter(pl.col("edits") > 0)["status"].to_list() == ["ok"] * 8


def test_a_run_that_stops_before_its_first_checkpoint_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(tmp_path, checkpoints=[3, 6])
    run = EvaluationTask.run

    def stopped_after_this(task: EvaluationTask, lease: Lease) -> pa.Table:
        os.kill(os.getpid(), signal.SIGINT)
        return run(task, lease)

    out = Store(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(EvaluationTask, "run", stopped_after_this)
        assert evaluate(config, out.uri) == STOPPED
    said = capsys.readouterr().err
    assert "stopped: 3 of 21 rows are done; the same line resumes: " in said
    assert "error" not in said
    assert out.list("results/batches/", ".parquet")
    assert not of_results(out)
    assert evaluate(config, out.uri) == 0


def test_a_checkpoint_is_a_row_of_every_table(tmp_path: Path) -> None:
    config = run_config(tmp_path, orders=2)
    out = str(tmp_path / "run")
    assert evaluate(config, out) == 0
    table = reduce([out])
    assert table["editor"].to_list() == ["none", "chain@2", "chain@6"]
    assert table["n"].to_list() == table["records"].to_list() == [6, 4, 12]
    assert table["duplicates"].to_list() == [0, 0, 0]
    rows = rows_of(tmp_path / "run")
    last = rows.filter(editor="chain@6")
    assert table["EM"][2] == pytest.approx(100 * mean_of(last))
    found = status(Store(out))
    assert (found.total, found.left, found.duplicates) == (22, 0, 0)
    assert found.done == {"none": 6, "chain@2": 4, "chain@6": 12}
    # A record's number is that over both orders.
    compared = read([out]).filter(label="chain@6").sort("case_id")
    expected = last.group_by("case_id").agg(pl.col("EM").mean()).sort("case_id")
    assert compared["EM"].to_list() == pytest.approx(expected["EM"].to_list())
    pairs, _, _ = compare([out], ["EM"])
    assert set(pairs.select("a", "b").rows()) == {
        ("chain@2", "unedited"),
        ("chain@6", "unedited"),
    }
    orders = chains.by_order(scan([out]))
    assert orders.select("editor", "order").rows() == [
        ("chain@2", 0),
        ("chain@2", 1),
        ("chain@6", 0),
        ("chain@6", 1),
    ]
    over = chains.over_orders(orders)
    assert over["orders"].to_list() == [2, 2]
    both = [mean_of(last.filter(order=order)) for order in (0, 1)]
    assert over["EM_std"][1] == pytest.approx(100 * float(np.std(both, ddof=1)))
    ages = chains.by_age(scan([out])).filter(edits=6)
    assert ages["part"].to_list() == [0, 1, 3, 5, 6, 8]
    assert ages["age"].to_list() == [0, 1, 2, 3, 4, 5]
    assert ages["n"].to_list() == [2] * 6
    saved = pl.read_parquet(tmp_path / "run" / "chains.parquet")
    assert saved["chain"].to_list() == ["chain", "chain"]
    assert saved["norm_change"][1] > saved["norm_change"][0] > 0
    assert (saved["agreement"].to_numpy() <= 1).all()
    assert b"edits since a fact" in (tmp_path / "run" / "figures" / "chains.svg").read_bytes()
    printed = invoke(reduce_app, out).output
    assert "Chains" in printed
    assert f"{saved['perplexity'][1]:.2f} of {saved['perplexity_unedited'][1]:.2f}" in printed


def test_a_chain_of_zsre_has_the_scores_of_zsre() -> None:
    names = ["efficacy", "paraphrase", "specificity"]
    keys = {"benchmark": "zsre", "model": "m", "editor": "memit@2", "edits": 2}
    none = dict.fromkeys(("S", *METRICS))
    orders = [keys | none | dict.fromkeys(names, 40.0 + order) for order in (0, 2)]
    found = chains.over_orders(pl.DataFrame(orders, infer_schema_length=None)).with_columns(
        chain=pl.lit("memit"),
        **dict.fromkeys(("perplexity", "perplexity_unedited", "agreement"), 1.0),
        norm=1.0,
        norm_change=0.1,
    )
    table = chain_pages.table(found)
    assert [column.header for column in table.columns][2:5] == names
    assert [*table.columns[2].cells] == ["41.0 ±1.4"]
    ages = pl.DataFrame(
        {
            "chain": ["memit"],
            "edits": [2],
            "age": [0.0],
            "ES": [None],
            **{name: [41.0] for name in names},
        }
    )
    drawn = chain_pages.figure(found, ages, "zsRE")
    titles = [axes.get_title() for axes in drawn.axes if axes.get_visible()]
    assert titles == [*names, "perplexity", "agreement", *(f"{name} by age" for name in names)]


def test_a_checkpoint_is_a_model_that_transformers_loads(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    out = str(tmp_path / "run")
    assert evaluate(config, out) == 0
    export(out, "chain@6", tmp_path / "edited")
    edited_hf = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "edited")
    model = EditableModel(edited_hf, tokenizer, "edited")
    found = scores(model, Unedited(), records_of(tmp_path))
    rows = rows_of(tmp_path / "run").filter(editor="chain@6")
    for one, row in zip(found, rows.iter_rows(named=True), strict=True):
        assert one["rewrite_nll_new"] == pytest.approx(row["rewrite_nll_new"], rel=1e-9)
    with pytest.raises(ValueError, match=r"no checkpoint 'chain@4', but chain@2, chain@6"):
        export(out, "chain@4", tmp_path / "other")
    with pytest.raises(ValueError, match=r"has not made 6 edits of .*order=1"):
        export(out, "chain@6", tmp_path / "other", order=1)
    # A state that somebody damaged is computed again.
    run = Store(out)
    state = run.list("chains/", ".safetensors")[-1]
    whole = run.read_bytes(state)
    run.write_bytes(state, whole[:-8])
    with pytest.raises(ValueError, match=f"{state} is gone or damaged. Move results/") as why:
        export(out, "chain@6", tmp_path / "other")
    run.delete(str(why.value).split("Move ")[1].split(" there")[0])
    assert evaluate(config, out) == 0
    assert run.read_bytes(state) == whole


def mean_of(rows: pl.DataFrame) -> float:
    return float(np.mean(rows["EM"].to_numpy()))


def scan(folders: list[str]) -> pl.LazyFrame:
    return pl.concat(
        [collect(Store(folder), lambda rows: rows.collect()) for folder in folders]
    ).lazy()


def test_what_cannot_be_a_chain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes 6 records .* the run has 5: .* multiple of 6"):
        evaluate(run_config(tmp_path, "records.limit=5"), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "results").exists()
    with pytest.raises(ConfigError, match="leave `edits` out"):
        run_config(tmp_path, "edits=somewhere")


def test_a_run_takes_more_records_and_keeps_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With chains, which become more; the numbers are those of a run that began with all."""
    short = {"sequence": 2, "checkpoints": [2]}
    folder = tmp_path / "run"
    assert evaluate(run_config(tmp_path, "records.limit=4", **short), str(folder)) == 0
    parts = {path: path.stat().st_mtime_ns for path in folder.glob("results/**/*.parquet")}
    capsys.readouterr()
    grown = run_config(tmp_path, **short)
    assert evaluate(grown, str(folder)) == 0
    assert "the run takes 6 records, and had 4" in capsys.readouterr().err
    assert parts == {path: path.stat().st_mtime_ns for path in parts}
    assert evaluate(replace(grown, name="all"), str(tmp_path / "all")) == 0
    left = ("run", "worker", "attempts")
    rows, others = (
        rows_of(tmp_path / name).drop(left, cs.starts_with("seconds_")) for name in ("run", "all")
    )
    assert len(rows) == 12
    assert_frame_equal(rows, others)
    table = reduce([str(folder)])
    assert table["n"].to_list() == table["records"].to_list() == [6, 6]
    assert (status(Store(folder)).total, status(Store(folder)).left) == (12, 0)
    # Nothing else may change.
    for key, message in (
        ("records.limit=4", "config.records.limit: None there, 4 now"),
        ("editors.chain.layer=0", "config.editors.chain.layer: 1 there, 0 now"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(run_config(tmp_path, key, **short), str(folder))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sequence": 3, "checkpoints": [3], "orders": 2}, "made in 2 orders cannot take more"),
        ({"sequence": 2, "checkpoints": []}, "whole groups of 2, .* the last of its 3 has 1"),
    ],
)
def test_a_run_whose_rows_would_be_others_takes_no_more_records(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    config = run_config(tmp_path, **row)
    had, has = (Grid(((0, 1, 2, 3)[:rows], (4, 5)[: rows - 3]), 2) for rows in (3, 6))
    with pytest.raises(ConfigError, match=message):
        growth.refuse(config, had, has)


def test_the_drift_of_a_model_that_is_edited(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    texts = [row.ids for row in model.encode(["The mother tongue of Bob is", "Rome", "Italy is a"])]
    texts = [ids for ids in texts if len(ids) > 1]
    before = drift.read(model, texts, 300)
    again = drift.drift(before, drift.read(model, texts, 1))
    assert again["agreement"] == 1
    assert again["perplexity"] == pytest.approx(again["perplexity_unedited"], rel=1e-12)
    # By hand, text by text.
    total, count, said = 0.0, 0, []
    for ids in texts:
        with torch.no_grad():
            log_p_TV = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(log_p_TV[t, ids[t + 1]]) for t in range(len(ids) - 1))
        count += len(ids) - 1
        said += log_p_TV[:-1].argmax(-1).tolist()
    assert before.nll == pytest.approx(total / count, rel=1e-12)
    assert list(before.likeliest) == said
    with pytest.raises(ValueError, match=r"at least two tokens, got \[7\]"):
        drift.read(model, [[7]], 300)


def test_a_state_is_a_file(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    name = model.weight_name(LAYER)
    change_DK = torch.randn(model.sizes(name), dtype=torch.float64)
    state = ChainState(7, {name: DenseDelta(change_DK)}, {"layer.1.keys": torch.arange(3.0)})
    fingerprint = model.fingerprint()
    origin = EditOrigin(editor="memit", model="tiny", model_fingerprint=fingerprint)
    assert len({dumps_chain(state, origin) for _ in range(9)}) == 1
    found, who = loads_chain(dumps_chain(state, origin), model, fingerprint, "here")
    assert (found.edits, who) == (7, origin)
    assert torch.equal(dense(found.total[name]), change_DK)
    assert found.carried["layer.1.keys"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="has the weights another"):
        loads_chain(dumps_chain(state, origin), model, "another", "here")


def test_a_chain_goes_on_from_a_file_to_the_same_bits() -> None:
    """Products of tensors of another layout round otherwise."""
    model = tiny.model("gpt2")
    settings = UltraEditSettings(down=(LAYER,), learning_rate=0.001)
    grouping = Grouping(edits_per_model=2, sequence=2)
    chain = sequences.Chain(model, UltraEdit(model, settings, 4000), grouping)
    fingerprint = model.fingerprint()
    origin = EditOrigin(editor="ultraedit", model="tiny", model_fingerprint=fingerprint)
    _, state = chain.go_on(chain.begin(), tiny.REQUESTS[:2])
    kept, _ = loads_chain(dumps_chain(state, origin), model, fingerprint, "here")
    here, there = (chain.go_on(one, tiny.REQUESTS[2:4])[1] for one in (state, kept))
    assert dumps_chain(here, origin) == dumps_chain(there, origin)
