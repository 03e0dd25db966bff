"""An edit's deltas applied to rows of a batch, and written into the weights and taken out again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rome.edits.deltas import (
    Delta,
    DenseDelta,
    Edit,
    LowRankDelta,
    applied,
    cheapest,
    dense,
    written,
)
from rome.models import EditableModel, prompts
from tests.support import tiny
from tests.support.tiny import REQUESTS, close

pytestmark = pytest.mark.usefixtures("one_thread")

MAIN = ("gpt2", "gptj", "llama")


def edits_of_all_kinds(model: EditableModel) -> list[Edit]:
    """Nothing; low-rank, dense, and both in one layer or in two; a bias where there is one."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(model.dtype)

    low_rank, full = LowRankDelta(random(16, 2), random(40, 2)), DenseDelta(random(16, 40))
    first, second = model.weight_name(0), model.weight_name(1)
    attention = model.module_name(1, model.family.attention[0]) + ".weight"
    width = 48 if model.family.transposed else 16  # GPT-2's holds queries, keys and values.
    mixed: dict[str, Delta] = {
        first: full,
        second: low_rank,
        attention: DenseDelta(random(width, 16)),
    }
    changes: list[dict[str, Delta]] = [
        {},
        {first: low_rank},
        {first: full},
        {second: full, first: low_rank},
        mixed,
    ]
    if model.family.transposed or model.hf.config.model_type == "gptj":
        changes.append({first.replace(".weight", ".bias"): DenseDelta(random(16, 1))})
    return [Edit(REQUESTS[0], deltas) for deltas in changes]


@pytest.mark.parametrize("family", MAIN)
def test_applied_equals_written(family: str) -> None:
    """Rows of all kinds of edits, ragged, some of one edit, against one edit at a time."""
    model = tiny.model(family)
    before = model.fingerprint()
    edits = edits_of_all_kinds(model)
    rows = [*edits, edits[2], edits[4], edits[2]]
    texts = [[5 + b, 6, 7, 8, 9, 10][: 2 + b % 5] for b in range(len(rows))]
    batch = prompts.pad(texts, "cpu")
    with applied(model, rows):
        logits_BTV = model.hf(
            input_ids=batch.ids_BT, attention_mask=batch.mask_BT, position_ids=batch.positions_BT
        ).logits
    assert model.fingerprint() == before
    unedited = model.hf(torch.tensor(texts[:1])).logits
    for b, (edit, ids) in enumerate(zip(rows, texts, strict=True)):
        with written(model, edit):
            assert (model.fingerprint() == before) == (not edit.deltas)
            expected_TV = model.hf(torch.tensor([ids])).logits[0]
        assert close(logits_BTV[b, : len(ids)], expected_TV, 1e-6)
        if edit.deltas:
            assert not close(model.hf(torch.tensor([ids])).logits[0], expected_TV, 1e-3)
    assert model.fingerprint() == before
    assert torch.equal(model.hf(torch.tensor(texts[:1])).logits, unedited)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("family", MAIN)
def test_written_restores_every_bit(family: str, dtype: str) -> None:
    model = tiny.model(family, dtype)
    edits = edits_of_all_kinds(model)
    before = model.fingerprint()
    with written(model, edits[3]):
        outer = model.fingerprint()
        with written(model, edits[4]):
            assert model.fingerprint() not in (before, outer)
        assert model.fingerprint() == outer != before
    assert model.fingerprint() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_restores_after_an_error(dtype: str) -> None:
    model = tiny.model("gpt2", dtype)
    edit = edits_of_all_kinds(model)[4]
    before = model.fingerprint()
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside(model, edit)
    assert model.fingerprint() == before
    # Its last weight cannot be written.
    half = Edit(REQUESTS[0], {**edit.deltas, "no.weight": next(iter(edit.deltas.values()))})
    with pytest.raises(AttributeError), written(model, half):
        pass
    assert model.fingerprint() == before


def fail_inside(model: EditableModel, edit: Edit) -> None:
    with written(model, edit):
        raise RuntimeError("inside")


def test_norms_are_those_of_the_change_multiplied_out() -> None:
    for edit in edits_of_all_kinds(tiny.model("gpt2")):
        for delta in edit.deltas.values():
            assert delta.norm == pytest.approx(float(dense(delta).norm()), rel=1e-9)


def test_applied_refuses_another_number_of_rows() -> None:
    model = tiny.model("gpt2")
    edits = edits_of_all_kinds(model)[2:3] * 3
    with applied(model, edits), pytest.raises(ValueError, match="3 edits, 2 rows"):
        model.hf(torch.tensor([[1, 2], [3, 4]]))


class _Made(TorchDispatchMode):
    """Counts the numbers in what is made, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out._base is None:
            self.numbers += out.numel()
        return out


@pytest.mark.parametrize(("distinct", "each"), [(1, 300), (7, 40), (100, 3), (300, 1)])
def test_factors_are_held_once_for_each_distinct_edit(distinct: int, each: int) -> None:
    model = tiny.model("gpt2")
    name, R = model.weight_name(0), 6
    edits = [
        Edit(REQUESTS[0], {name: LowRankDelta(torch.randn(16, R), torch.randn(40, R))})
        for _ in range(distinct)
    ]
    rows = [edit for edit in edits for _ in range(each)]
    with _Made() as made, applied(model, rows):
        pass
    assert made.numbers <= 2 * distinct * R * (16 + 40) + 2 * len(rows)


def test_a_rank_beyond_the_border_is_multiplied_out() -> None:
    """Of a weight 16 x 40 it lies between 11 and 12."""
    for rank, kind in ((11, LowRankDelta), (12, DenseDelta), (100, DenseDelta)):
        delta = LowRankDelta(torch.randn(16, rank).double(), torch.randn(40, rank).double())
        found = cheapest(delta)
        assert type(found) is kind
        assert close(dense(found), delta.left_DR @ delta.right_KR.T, 1e-12)
    model = tiny.model("gpt2")
    edit = Edit(REQUESTS[0], {model.weight_name(0): delta})
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with applied(model, [edit] * 2):
        found_BTV = model.hf(ids).logits
    with written(model, edit):
        assert close(found_BTV, model.hf(ids).logits, 1e-6)
