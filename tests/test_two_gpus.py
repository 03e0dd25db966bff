"""A model spread over two GPUs does what it does on one device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_fine_tuning
import test_knowledge_editor
import test_memit
import test_mend
import test_rome
import test_sequences
import test_tracing
import tiny
import torch
from test_tracing import FACTS
from tiny import TEMPLATES
from torch.utils._pytree import tree_leaves
from two_gpus import spread, two_gpus

from rome import models, second_moment, tracing
from rome.deltas import dense
from rome.editors import Editor, Unedited, hypernetwork
from rome.editors.fine_tuning import FineTuning
from rome.editors.hypernetwork import HypernetworkEditor
from rome.editors.knowledge_neurons import KnowledgeNeurons, KnowledgeNeuronsSettings
from rome.editors.rome import Rome
from rome.hypernetwork_training import Trainer, TrainingSettings
from rome.models import EditableModel
from rome.second_moment import Solver
from rome.sequences import Grouping, grouped

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGET = 300
MAIN = ("gpt2", "gptj", "llama")


def _rome(model: EditableModel, settings: Any) -> Editor:
    solver = Solver(test_rome.second_moment()) if settings.second_moment else None
    return Rome(model, settings, TEMPLATES, solver, BUDGET)


def _in_sequence(model: EditableModel) -> Editor:
    return grouped(model, _rome(model, test_rome.LAST), Grouping(sequence=5))


EDITORS: dict[str, Callable[[EditableModel], Editor]] = {
    "none": lambda model: Unedited(),
    "rome 0": lambda model: _rome(model, test_rome.STOPPING),
    "rome 1": lambda model: _rome(model, test_rome.CLAMPED),
    "rome 2": lambda model: _rome(model, test_rome.LAST),
    "rome in sequence": _in_sequence,
    "memit": lambda model: test_memit.editor(model, test_memit.FREE),
    "memit together": lambda model: grouped(
        model, test_memit.editor(model, test_memit.FREE), Grouping(edits_per_model=5)
    ),
    "ft 1": lambda model: FineTuning(model, test_fine_tuning.FREE, BUDGET),
    "attnedit 2": lambda model: FineTuning(model, test_fine_tuning.ATTENTION, BUDGET),
    "kn": lambda model: KnowledgeNeurons(model, KnowledgeNeuronsSettings(steps=5), BUDGET),
    "ke": lambda model: HypernetworkEditor(model, test_knowledge_editor.network_of(model), BUDGET),
    "mend": lambda model: HypernetworkEditor(model, test_mend.trained(model), BUDGET),
}
"""Of layers on either device, and on both."""


def check(
    compute: Callable[[EditableModel], Any],
    make: Callable[[], EditableModel],
    head_alone: bool = False,
) -> None:
    """What is computed on one device is computed on two."""
    expected = tree_leaves(compute(make()))
    assert expected
    model = make()
    with two_gpus():
        spread(model, head_alone)
        assert {str(p.device) for p in model.hf.parameters()} == {"meta:0", "meta:1"}
        found = tree_leaves(compute(model))
    for one, other in zip(found, expected, strict=True):
        assert one == (pytest.approx(other, rel=1e-6) if isinstance(other, float) else other)


def edited(model: EditableModel, editor: Editor) -> Any:
    """The changes of edits, and all that is said of the edited models."""
    before = model.fingerprint()
    edits = editor.edit([record.request for record in test_sequences.RECORDS])
    changes = [dense(edit.deltas[key]) for edit in edits for key in sorted(edit.deltas)]
    rows = test_sequences.scores(model, editor, test_sequences.RECORDS)
    assert model.fingerprint() == before
    return [change.tolist() for change in changes], rows


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("family", MAIN)
def test_edits_scores_and_texts(family: str, name: str) -> None:
    check(lambda model: edited(model, EDITORS[name](model)), lambda: tiny.model(family))


@pytest.mark.parametrize("family", MAIN)
def test_the_head_alone_on_another_device(family: str) -> None:
    check(lambda model: edited(model, EDITORS["rome 1"](model)), lambda: tiny.model(family), True)


@pytest.mark.parametrize("kind", ["hidden", "mlp", "attention_severed"])
@pytest.mark.parametrize("family", MAIN)
def test_traces(family: str, kind: str) -> None:
    def compute(model: EditableModel) -> Any:
        std = tracing.embedding_std(model, [fact.subject for fact in FACTS])
        traces = [
            tracing.trace(model, fact, kind, test_tracing.SETTINGS, std, BUDGET) for fact in FACTS
        ]
        assert any(trace.known for trace in traces)
        return [std, [[t.clean, t.corrupted, t.restored] for t in traces if t.known]]

    check(compute, lambda: test_tracing.taught(family))


@pytest.mark.parametrize("family", MAIN)
def test_second_moments(family: str) -> None:
    def compute(model: EditableModel) -> Any:
        texts = [model.tokenizer(text)["input_ids"] for text in tiny.SENTENCES]
        found = second_moment.accumulate(model, range(3), texts)
        return [(moment.mean().tolist(), moment.count) for moment in found.values()]

    check(compute, lambda: tiny.model(family))


@pytest.mark.parametrize("kind", ["ke", "mend"])
def test_training(kind: str) -> None:
    settings = TrainingSettings(steps=3, rate=1e-3, batch=6, validation=5)

    def compute(model: EditableModel) -> Any:
        shape = test_mend.SETTINGS if kind == "mend" else test_knowledge_editor.SETTINGS
        network = hypernetwork.build(model, kind, 2, shape, seed=3)
        trainer = Trainer(model, network, test_knowledge_editor.EXAMPLES, settings)
        return [trainer.train().loss for _ in range(3)], trainer.validate().loss

    check(compute, lambda: tiny.model("llama"))


def test_the_two_devices_refuse_what_gpus_refuse() -> None:
    with two_gpus():
        here, there = (torch.arange(4.0, device=f"meta:{n}") for n in range(2))
        for mixed in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: here[there.long()],
            lambda: here + torch.ones(4),
        ):
            with pytest.raises(RuntimeError, match="tensors on"):
                mixed()
        assert (here + there.to(here.device))[torch.tensor([3])].tolist() == [6]


def test_a_model_that_gpus_do_not_hold_is_refused(tmp_path: Path) -> None:
    model = tiny.model("gpt2", "float32")
    model.hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must fit into the GPUs"):
        models.load(str(tmp_path), "float32", "auto")
