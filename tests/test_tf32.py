"""tf32 as tests emulate it: rounded as said, where it is said, and near float32."""

import pytest
import torch

from rome.edits.deltas import Edit, dense
from rome.evaluation import evaluate
from rome.scoring.probabilities import score_records
from rome.scoring.settings import ScoringSettings
from tests.support import computations, tiny
from tests.support.tf32 import Tf32, rounded


def test_ten_bits_are_left() -> None:
    step = 2.0**-10
    given = torch.tensor([1.0, 1 + step, 1 + step / 2, 1 + step / 2.01, -1 - step / 2, 0.0, 3e38])
    expected = torch.tensor([1.0, 1 + step, 1 + step, 1.0, -1 - step, 0.0, 3e38])
    torch.testing.assert_close(rounded(given), expected, rtol=2**-11, atol=0)
    assert rounded(given)[:6].tolist() == expected[:6].tolist()
    drawn = torch.randn(10_000)
    assert ((rounded(drawn) - drawn).abs() <= drawn.abs() * 2**-11).all()
    assert rounded(rounded(drawn)).equal(rounded(drawn))


def test_products_are_those_of_rounded_factors_and_nothing_else_is() -> None:
    torch.manual_seed(0)
    layer, x_BD = torch.nn.Linear(8, 6), torch.randn(5, 8, requires_grad=True)
    weight_OD, up_BO = rounded(layer.weight.detach()), torch.randn(5, 6)
    with Tf32():
        y_BO = layer(x_BD)
        y_BO.backward(up_BO)
        double = torch.ones(1, 1, dtype=torch.float64) @ torch.tensor([[1 + 2.0**-20]]).double()
        total = x_BD.detach() + x_BD.detach()
    assert y_BO.equal(rounded(x_BD.detach()) @ weight_OD.T + layer.bias)
    assert x_BD.grad is not None
    assert x_BD.grad.equal(rounded(up_BO) @ weight_OD)
    assert double.item() == 1 + 2.0**-20
    assert total.equal(2 * x_BD.detach())


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_a_row_is_near_that_of_float32(family: str) -> None:
    """To a few times the rounding: as near as a card's is asked to be."""
    model, settings = tiny.model(family, "float32"), ScoringSettings(generation=None)

    unedited = [Edit(record.request) for record in computations.RECORDS]

    def scores() -> list[float]:
        rows = score_records(model, computations.RECORDS, unedited, 400)
        return [nll for row in rows for nll in row["rewrite_nll_new"]]

    with Tf32():
        rounded_scores = scores()
    assert rounded_scores != scores()
    assert rounded_scores == pytest.approx(scores(), abs=0.1)

    def row() -> tuple[torch.Tensor, list[float]]:
        editor = computations.EDITORS["rome 1"](model)
        (first, *_), edits = evaluate(
            model, editor, computations.RECORDS[:1], settings, None, token_budget=400
        )
        nlls = [*first["rewrite_nll_new"], *first["neighborhood_nll_true"]]
        return dense(next(iter(edits[0].deltas.values()))), nlls

    exact_DK, exact = row()
    with Tf32():
        near_DK, near = row()
    assert near != exact
    assert torch.tensor(near) == pytest.approx(torch.tensor(exact), abs=0.1)
    assert (near_DK - exact_DK).norm() < 0.1 * exact_DK.norm()
