"""KE: its low-rank deltas are the elementwise product of the gradient; trained networks' files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rome.editors import EDITORS, Resources, gradients, hypernetwork
from rome.editors.hypernetwork import HypernetworkEditor, HypernetworkSettings, NetworkOrigin
from rome.editors.knowledge_editor import KnowledgeEditorNetwork
from rome.editors.training import Trainer, TrainingSettings
from rome.edits.deltas import dense
from tests.support import oracle_hypernetworks as oracle
from tests.support import tiny
from tests.support.computations import EXAMPLES, KE, ke_network
from tests.support.tiny import REQUESTS, close

pytestmark = pytest.mark.usefixtures("one_thread")

MAIN = ["gpt2", "gptj", "llama"]
BUDGET = 30  # All the requests do not fit into one batch.


@pytest.mark.parametrize("family", MAIN)
def test_deltas_are_the_bent_gradient(family: str) -> None:
    model = tiny.model(family)
    network = ke_network(model)
    before = model.fingerprint()
    edits = HypernetworkEditor(model, network, BUDGET).edit(REQUESTS)
    for request, edit in zip(REQUESTS, edits, strict=True):
        expected = oracle.knowledge_editor(model, network, request)
        assert set(edit.deltas) == set(expected) == set(gradients.mlp_weights(model, 2))
        for name, change in expected.items():
            found_DK = dense(edit.deltas[name])
            assert close(found_DK.T if model.family.transposed else found_DK, change), name
    assert model.fingerprint() == before


@pytest.mark.parametrize("family", MAIN)
def test_an_edit_is_what_it_is_alone_and_leaves_nothing(family: str) -> None:
    model = tiny.model(family)
    editor = HypernetworkEditor(model, ke_network(model), 10_000)
    together = editor.edit(REQUESTS)
    first, other, again = (editor.edit([REQUESTS[i]])[0] for i in (1, 3, 1))
    for name, delta in again.deltas.items():
        assert torch.equal(dense(delta), dense(first.deltas[name]))
        assert close(dense(together[1].deltas[name]), dense(delta), 1e-9)
        assert close(dense(together[3].deltas[name]), dense(other.deltas[name]), 1e-9)


@pytest.mark.parametrize(("kind", "rates"), [("mend", (1e-3, 0.05)), ("ke", (0.02, 0.0))])
def test_training_lowers_the_loss_and_resumes_to_the_bit(
    kind: str, rates: tuple[float, float]
) -> None:
    """More edits succeed, on examples that were not trained on; the weights stay as they are."""
    model = tiny.model("llama", "float32")
    before = model.fingerprint()
    shape = KE if kind == "ke" else None
    settings = shape or hypernetwork.NETWORKS[kind][0](rank=16)
    training = TrainingSettings(
        steps=40, rate=rates[0], rate_of_rates=rates[1], batch=6, validation=5
    )

    def trainer() -> Trainer:
        network = hypernetwork.build(model, kind, 2, settings, seed=3)
        return Trainer(model, network, EXAMPLES, training, BUDGET)

    whole = trainer()
    unedited = whole.validate(edited=False)
    losses = [whole.train().loss for _ in range(20)]
    saved = whole.serialised()
    losses += [whole.train().loss for _ in range(20)]
    validated = whole.validate()
    assert unedited.local_loss == 0
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert validated.loss < unedited.loss
    assert validated.edit_loss < 0.7 * unedited.edit_loss
    assert model.fingerprint() == before

    resumed = trainer()
    resumed.restore(saved)
    assert [resumed.train().loss for _ in range(20)] == losses[20:]
    assert resumed.validate() == validated


def test_too_few_examples_are_refused() -> None:
    model = tiny.model("gpt2")
    settings = TrainingSettings(steps=1, validation=20)
    with pytest.raises(ValueError, match="20 of validation and a batch of 10, got 25"):
        Trainer(model, ke_network(model), EXAMPLES, settings, BUDGET)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A network as a training leaves it."""
    model = tiny.model("gpt2")
    rounded = model.fingerprint(torch.bfloat16)
    origin = NetworkOrigin("test", "ke", 2, {"hidden": 12, "condition": 10}, "", rounded, 7)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(hypernetwork.serialised(ke_network(model), origin))
    return path


def test_the_registered_editor_loads_what_was_trained(file: Path) -> None:
    model = tiny.model("gpt2")
    resources = Resources(model, ["{}"], lambda layer: pytest.fail("no C is needed"), BUDGET)
    editor = EDITORS["ke"].build(resources, HypernetworkSettings(weights=str(file)))
    (found,) = editor.edit(REQUESTS[:1])
    (expected,) = HypernetworkEditor(model, ke_network(model), BUDGET).edit(REQUESTS[:1])
    for name, delta in expected.deltas.items():
        assert torch.equal(dense(found.deltas[name]), dense(delta))


def test_a_network_serves_the_same_weights_in_bfloat16(file: Path) -> None:
    model = tiny.model("gpt2")
    model.hf.to(torch.bfloat16)
    assert isinstance(hypernetwork.load(file, model, "ke"), KnowledgeEditorNetwork)


def test_a_network_of_another_kind_or_model_is_refused(file: Path) -> None:
    model = tiny.model("gpt2")
    with pytest.raises(ValueError, match="must be a trained mend, but is a ke"):
        hypernetwork.load(file, model, "mend")
    model.hf.get_parameter("transformer.h.0.mlp.c_fc.weight")[0, 0] += 1
    with pytest.raises(ValueError, match="trained for gpt2 with these weights"):
        hypernetwork.load(file, model, "ke")
