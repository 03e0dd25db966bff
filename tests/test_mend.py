"""MEND: its low-rank deltas are the explicit transform of the explicit gradient."""

from __future__ import annotations

import random

import pytest
import torch

from rome.editors import gradients, hypernetwork
from rome.editors.hypernetwork import HypernetworkEditor
from rome.editors.mend import MendNetwork, MendSettings, _Statistics
from rome.editors.objective import Example
from rome.editors.training import Trainer, TrainingSettings
from rome.edits.deltas import dense
from tests.support import oracle_hypernetworks as oracle
from tests.support import tiny
from tests.support.computations import mend_network
from tests.support.tiny import REQUESTS, close

pytestmark = pytest.mark.usefixtures("one_thread")

MAIN = ["gpt2", "gptj", "llama"]
BUDGET = 30  # All the requests do not fit into one batch.


@pytest.mark.parametrize("family", MAIN)
def test_deltas_are_the_explicit_transform(family: str) -> None:
    model = tiny.model(family)
    network = mend_network(model)
    before = model.fingerprint()
    edits = HypernetworkEditor(model, network, BUDGET).edit(REQUESTS)
    for request, edit in zip(REQUESTS, edits, strict=True):
        assert edit.request == request
        expected = oracle.mend(model, network, request)
        assert set(edit.deltas) == set(expected) == set(gradients.mlp_weights(model, 2))
        for name, change_DK in expected.items():
            assert close(dense(edit.deltas[name]), change_DK), (request, name)
        norm = torch.stack([change.norm() for change in expected.values()]).norm()
        assert edit.health["norm"] == pytest.approx(float(norm.detach()), rel=1e-6)
        assert edit.health["loss"] == pytest.approx(float(oracle.loss(model, request)), rel=1e-6)
    assert model.fingerprint() == before


@pytest.mark.parametrize("family", MAIN)
@pytest.mark.parametrize("layers", [1, 3])
def test_factors_multiply_out_to_the_gradient_of_the_weight(family: str, layers: int) -> None:
    """Also from the first layer on, where the embeddings enter."""
    model = tiny.model(family)
    weights = gradients.mlp_weights(model, layers)
    texts = model.encode_targets([(r.text, r.target, r.separator) for r in REQUESTS])
    rows = gradients.side_by_side(model, 3 - layers, gradients.observe(model, 3 - layers, texts))
    found = gradients.gradients(model, weights, rows)
    for e, request in enumerate(REQUESTS):
        for name, gradient in oracle.weight_gradients(model, request, weights).items():
            factors = found[e].factors[name]
            product_DK = factors.delta_ND.T @ factors.x_NK
            assert close(product_DK.T if model.family.transposed else product_DK, gradient)


@pytest.mark.parametrize("family", MAIN)
def test_an_edit_is_what_it_is_alone_and_leaves_nothing(family: str) -> None:
    model = tiny.model(family)
    editor = HypernetworkEditor(model, mend_network(model), 10_000)
    together = editor.edit(REQUESTS)
    first, other, again = (editor.edit([REQUESTS[i]])[0] for i in (1, 3, 1))
    for name, delta in again.deltas.items():
        assert torch.equal(dense(delta), dense(first.deltas[name]))
        assert close(dense(together[1].deltas[name]), dense(delta), 1e-9)
        assert close(dense(together[3].deltas[name]), dense(other.deltas[name]), 1e-9)


def test_statistics_are_those_of_all_tokens_seen() -> None:
    """The running mean and deviation of the published code, token by token."""
    values_NS = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double() * 5 + 2
    statistics = _Statistics(3).double()
    for some in values_NS.split([1, 20, 29]):
        statistics(some)
    expected_NS = (values_NS - values_NS.mean(0)) / (values_NS.std(0) + 1e-7)
    assert torch.allclose(statistics.eval()(values_NS), expected_NS, rtol=1e-12)
    assert torch.allclose(statistics(values_NS), expected_NS, rtol=1e-12)  # Nothing more is added.


def test_an_untrained_network_is_the_identity() -> None:
    """But for the statistics: rank by rank, the normalised gradient times the rate."""
    model = tiny.model("llama")
    network = hypernetwork.build(model, "mend", 1, MendSettings(edit_rate=0.5), seed=0)
    assert isinstance(network, MendNetwork)
    for module in network.modules():
        if isinstance(module, _Statistics):  # Mean 0 and deviation 1.
            module.count.fill_(2)
            module.squares_S.fill_(1)
    (edit,) = HypernetworkEditor(model, network, BUDGET).edit(REQUESTS[:1])
    for name, gradient in oracle.weight_gradients(model, REQUESTS[0], network.weights).items():
        assert close(dense(edit.deltas[name]), 0.5 * gradient, 1e-5)  # 1e-7 beside a deviation.


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="layers must be from 1 to 3, got 4"):
        gradients.mlp_weights(tiny.model("gpt2"), 4)


def test_an_epochs_order_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole training set a draw takes longer than a step."""
    settings = TrainingSettings(steps=9, batch=4, validation=2)
    examples = [Example(request) for request in REQUESTS * 4]
    model = tiny.model("gpt2")
    trainer = Trainer(model, mend_network(model), examples, settings, BUDGET)
    drawn: list[int] = []
    sample = random.Random.sample

    def counted(self: random.Random, population: range, k: int) -> list[int]:
        drawn.append(k)
        return sample(self, population, k)

    monkeypatch.setattr(random.Random, "sample", counted)
    for step in range(1, 10):  # 36 places of 18 examples: two epochs.
        trainer.step = step
        assert len(trainer._batch()) == 4
    assert drawn == [18, 18]
