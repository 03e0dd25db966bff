"""All that a device is asked to compute, on tiny models, in one list.

`test_two_gpus.py` asks two simulated GPUs, `gpu.py` a real one. Needs no pytest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rome import second_moment, tracing
from rome.data.records import Record, Request
from rome.editors import EDITORS as REGISTRY
from rome.editors import ChainEditor, Editor, Resources, Unedited, gradients, hypernetwork
from rome.editors.alphaedit import AlphaEdit, AlphaEditSettings
from rome.editors.fine_tuning import (
    AttentionSettings,
    ConstrainedSettings,
    FineTuning,
    FineTuningSettings,
)
from rome.editors.hypernetwork import HypernetworkEditor
from rome.editors.knowledge_editor import KnowledgeEditorNetwork, KnowledgeEditorSettings
from rome.editors.knowledge_neurons import KnowledgeNeurons, KnowledgeNeuronsSettings
from rome.editors.lora import Lora, LoraSettings
from rome.editors.memit import Memit, MemitSettings, MemitWithHistory
from rome.editors.mend import MendNetwork, MendSettings
from rome.editors.objective import Example
from rome.editors.rome import Rome, RomeSettings
from rome.editors.training import Trainer, TrainingSettings
from rome.editors.ultraedit import UltraEdit, UltraEditSettings
from rome.editors.values import ValueSettings
from rome.edits.deltas import Edit, LowRankDelta, dense, written
from rome.edits.grouping import Grouping
from rome.edits.sequences import grouped
from rome.evaluation import evaluate
from rome.models import EditableModel
from rome.scoring.settings import GenerationSettings, ScoringSettings
from rome.second_moment import SecondMoment
from rome.tracing import KnownFact, TraceSettings
from tests.support import tiny
from tests.support.tiny import REQUESTS, TEMPLATES

MAIN = ("gpt2", "gptj", "llama")
FAMILIES = (*MAIN, "mistral")
BUDGET = 300  # All the requests do not fit into one batch.

# KL is on in all; one clamps, one stops some edits early, and layer 0 has no layer before it.
CLAMPED = RomeSettings(1, ValueSettings(steps=6, kl_factor=0.5, clamp=0.2, stop_below=0), "mean")
STOPPING = RomeSettings(
    0, ValueSettings(8, learning_rate=0.05, weight_decay=0.01, kl_factor=0.1), "mixed"
)
LAST = RomeSettings(2, ValueSettings(steps=4, stop_below=0), "prompt", second_moment=False)

MEMIT = MemitSettings(
    layers=(0, 2),
    second_moment_weight=0.01,
    value=ValueSettings(steps=4, learning_rate=0.1, clamp=4, stop_below=0),
)
ALPHA = AlphaEditSettings(layers=MEMIT.layers, value=MEMIT.value, threshold=0.08)
ULTRA = UltraEditSettings(up=(0,), down=(1, 2), learning_rate=1e-3)
FREE = FineTuningSettings(layer=1, steps=6, learning_rate=0.02)
CONSTRAINED = ConstrainedSettings(
    steps=5, learning_rate=0.02, weight_decay=0.1, norm_constraint=0.03, target_loss="sequence"
)
ATTENTION = AttentionSettings(layer=2, steps=4, learning_rate=0.02, norm_constraint=0.03)
MEND = MendSettings(rank=24, hidden_layers=1)  # More than one size and less than the other.
KE = KnowledgeEditorSettings(hidden=12, condition=10)
TRACING = TraceSettings(samples=3, window=2)
TRAINING = TrainingSettings(steps=3, rate=1e-3, batch=6, validation=5)
SCORING = ScoringSettings(generation=GenerationSettings(max_tokens=16))

# The last layer's MLP at the subject reaches the target only from the prompt's last token. Anywhere
# else its gradient is nothing but rounding, of which Adam makes whole steps.
ENDING = [replace(r, prompt=p) for r, p in zip(REQUESTS, ["{}", "I saw {}"] * 3, strict=False)]

RECORDS = [
    Record(
        case_id=i,
        relation_id="P1",
        prompt=request.prompt,
        subject=request.subject,
        target_new=request.target,
        target_true="Japan",
        target_new_id=None,
        target_true_id=None,
        paraphrase_prompts=(f"In 1890, {request.subject} was",),
        neighborhood_prompts=("The Tokyo Tower is in", "The capital of Italy is"),
        attribute_prompts=(),
        generation_prompts=(f"{request.subject} is",),
    )
    for i, request in enumerate(ENDING)
]
REVERSED = {"P1": "{} is where one finds"}

# Subjects of one and several tokens, at the beginning, inside, and at the end of a prompt.
FACTS = [
    KnownFact(4, "Danielle Darrieux", "Paris", "Danielle Darrieux was born in"),
    KnownFact(5, "São Tomé", "Paris", "The capital of São Tomé is"),
    KnownFact(6, "Žižek", "Paris", "Everyone admires Žižek"),
]
EXAMPLES = [
    Example(
        Request("{} is in", subject, target),
        (f"Everyone admires {subject}, which is in",),
        (("The capital of France is", "Paris"), ("The capital of Italy is", "Rome")),
    )
    for subject in ("The Tokyo Tower", "The Eiffel Tower", "Ljubljana", "São Tomé", "Rome")
    for target in ("Paris", "Rome", "Japan", "Italy", "an island")
]


def correlated_moment() -> SecondMoment:
    """Of keys of 40 numbers that depend on each other."""
    generator = torch.Generator().manual_seed(1)
    moment = SecondMoment.zeros(40)
    mixing_KK = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    moment.add(torch.randn(200, 40, generator=generator, dtype=torch.float64) @ mixing_KK)
    return moment


def moments() -> dict[int, SecondMoment]:
    """One for each layer."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for layer in range(3):
        made[layer] = SecondMoment.zeros(40)
        made[layer].add(torch.randn(200, 40, generator=generator, dtype=torch.float64) * 0.3)
    return made


def taught(family: str, dtype: str = "float64", kind: str = "plain") -> EditableModel:
    """A random model that knows the facts: its head answers their prompts with Paris."""
    model = tiny.model(family, dtype, kind)
    rows = [torch.tensor([model.tokenizer(fact.prompt)["input_ids"]]) for fact in FACTS]
    hidden_D = sum(model.base(row).last_hidden_state[0, -1] for row in rows)
    paris = model.tokenizer(" Paris", add_special_tokens=False)["input_ids"][0]
    model.hf.get_output_embeddings().weight[paris] = 6 * hidden_D / hidden_D.norm()
    return model


def rome(model: EditableModel, settings: RomeSettings) -> Rome:
    solver = correlated_moment().solver() if settings.second_moment else None
    return Rome(model, settings, TEMPLATES, solver, BUDGET)


def memit(model: EditableModel, settings: MemitSettings) -> Memit:
    solvers = {layer: moment.solver() for layer, moment in moments().items()}
    return Memit(model, settings, TEMPLATES, solvers, BUDGET)


def alphaedit(model: EditableModel) -> AlphaEdit:
    solvers = {layer: moment.solver() for layer, moment in moments().items()}
    return AlphaEdit(model, ALPHA, TEMPLATES, solvers, BUDGET)


def memit_with_history(model: EditableModel) -> MemitWithHistory:
    solvers = {layer: moment.solver() for layer, moment in moments().items()}
    return MemitWithHistory(model, replace(MEMIT, history=True), TEMPLATES, solvers, BUDGET)


def ultraedit(model: EditableModel) -> UltraEdit:
    return UltraEdit(model, ULTRA, BUDGET)


def lora(model: EditableModel) -> Lora:
    modules = tuple(path.rpartition(".")[2] for path in model.family.attention)
    return Lora(model, LoraSettings(modules, rank=2, steps=3), BUDGET)


def ke_network(model: EditableModel) -> KnowledgeEditorNetwork:
    network = hypernetwork.build(model, "ke", 2, KE, seed=1)
    assert isinstance(network, KnowledgeEditorNetwork)
    return network


def mend_network(model: EditableModel) -> MendNetwork:
    """A network that is far from the identity and has seen some gradients."""
    network = hypernetwork.build(model, "mend", 2, MEND, seed=1)
    assert isinstance(network, MendNetwork)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.1 * noise.to(parameter.device))
        texts = model.encode_targets([(r.text, r.target, r.separator) for r in REQUESTS])
        rows = gradients.side_by_side(model, 1, gradients.observe(model, 1, texts))
        network.train().normalised(gradients.gradients(model, network.weights, rows))
    return network.eval()


def _in_sequence(model: EditableModel) -> Editor:
    return grouped(model, rome(model, LAST), Grouping(sequence=5))


def _together(build: Callable[[EditableModel], Editor], model: EditableModel) -> Editor:
    return grouped(model, build(model), Grouping(edits_per_model=5))


EDITORS: dict[str, Callable[[EditableModel], Editor]] = {
    "none": lambda model: Unedited(),
    "rome 0": lambda model: rome(model, STOPPING),
    "rome 1": lambda model: rome(model, CLAMPED),
    "rome 2": lambda model: rome(model, LAST),
    "rome in sequence": _in_sequence,
    "memit": lambda model: memit(model, MEMIT),
    "memit together": partial(_together, lambda model: memit(model, MEMIT)),
    "alphaedit": alphaedit,
    "ultraedit together": partial(_together, ultraedit),
    "lora together": partial(_together, lora),
    "ft 1": lambda model: FineTuning(model, FREE, BUDGET),
    "ft+l 0": lambda model: FineTuning(model, CONSTRAINED, BUDGET),
    "attnedit 2": lambda model: FineTuning(model, ATTENTION, BUDGET),
    "kn": lambda model: KnowledgeNeurons(model, KnowledgeNeuronsSettings(steps=5), BUDGET),
    "ke": lambda model: HypernetworkEditor(model, ke_network(model), BUDGET),
    "mend": lambda model: HypernetworkEditor(model, mend_network(model), BUDGET),
}
"""The first word is the editor's name in the registry; numbers are layers."""


@dataclass(frozen=True)
class Computation:
    """A tree of tensors, numbers and texts made by a model, and the model that it is asked of."""

    compute: Callable[[EditableModel], Any]
    make: Callable[[str, str], EditableModel] = tiny.model
    """From a family and a dtype."""


def scores(model: EditableModel, editor: Editor, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Result rows without what differs from run to run."""
    rows, _ = evaluate(model, editor, records, SCORING, None, 400, REVERSED)
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def _edited(build: Callable[[EditableModel], Editor], model: EditableModel) -> Any:
    """The changes of edits, and all that is said of the edited models."""
    before, editor = model.fingerprint(), build(model)
    edits = editor.edit([record.request for record in RECORDS])
    changes = [
        _without_key_bias(name, dense(edit.deltas[name]).cpu())
        for edit in edits
        for name in sorted(edit.deltas)
    ]
    rows = scores(model, editor, RECORDS)
    for row in rows:
        row.pop("edit_norm", None)  # It is that of the changes, and of the bias that is left out.
    assert model.fingerprint() == before, "an edit was left in the weights"
    return changes, rows


def _without_key_bias(name: str, change_DK: Tensor) -> Tensor:
    """A change without that of the keys' bias, which no softmax sees: its gradient is rounding."""
    if not name.endswith("attn.c_attn.bias"):
        return change_DK
    queries, _, values = change_DK.chunk(3)
    return torch.cat([queries, values])


def _traced(kind: str, model: EditableModel) -> Any:
    std = tracing.embedding_std(model, [fact.subject for fact in FACTS])
    traces = [tracing.trace(model, fact, kind, TRACING, std, BUDGET) for fact in FACTS]
    assert any(trace.known for trace in traces)
    return std, [(t.clean, t.corrupted, t.restored) for t in traces if t.known]


def _second_moments(model: EditableModel) -> Any:
    texts = [model.tokenizer(text)["input_ids"] for text in tiny.SENTENCES]
    found = second_moment.accumulate(model, range(3), texts)
    return [(moment.mean().cpu(), moment.count) for moment in found.values()]


def _trained(kind: str, model: EditableModel) -> Any:
    network = hypernetwork.build(model, kind, 2, MEND if kind == "mend" else KE, seed=3)
    trainer = Trainer(model, network, EXAMPLES, TRAINING, 10_000)
    return [trainer.train().loss for _ in range(3)], trainer.validate().loss


CHAINS: dict[str, Callable[[EditableModel], ChainEditor]] = {
    "memit": memit_with_history,
    "alphaedit": alphaedit,
    "ultraedit": ultraedit,
}


def _chained(build: Callable[[EditableModel], ChainEditor], model: EditableModel) -> Any:
    """The changes of two batches, and what is carried on."""
    editor = build(model)
    first, state = editor.edit_batch(ENDING[:2], editor.begin())
    with written(model, first):
        second, last = editor.edit_batch(ENDING[2:], state)
    changes = [[dense(e.deltas[name]).cpu() for name in sorted(e.deltas)] for e in (first, second)]
    return changes, [last[name].cpu().double() for name in sorted(last)]


COMPUTATIONS: dict[str, Computation] = {
    **{f"chain {name}": Computation(partial(_chained, build)) for name, build in CHAINS.items()},
    **{f"edit {name}": Computation(partial(_edited, build)) for name, build in EDITORS.items()},
    **{f"trace {kind}": Computation(partial(_traced, kind), taught) for kind in tracing.KINDS},
    "second moments": Computation(_second_moments),
    **{f"train {kind}": Computation(partial(_trained, kind)) for kind in ("ke", "mend")},
}


def distance(found: Any, expected: Any) -> float:
    """The largest relative difference between the leaves of two trees.

    Of a tensor by its norm. Infinite where a text, a count or the shape of the tree differs, or a
    number is not finite.
    """
    mine, theirs = tree_leaves(found), tree_leaves(expected)
    if len(mine) != len(theirs):
        return math.inf
    return max((_apart(a, b) for a, b in zip(mine, theirs, strict=True)), default=math.inf)


_SMALL = 1e-3
"""Numbers below it are compared by their difference alone: they are near nothing."""


def _apart(a: Any, b: Any) -> float:
    if isinstance(b, Tensor):
        apart, size = float((a - b).norm()), float(b.norm())
    elif isinstance(b, float):
        apart, size = abs(a - b), abs(b)
    else:
        return 0.0 if a == b else math.inf
    return apart / max(size, _SMALL) if math.isfinite(apart) else math.inf


def random_edits(model: EditableModel, layers: Sequence[int] = (0, 1)) -> list[Edit]:
    """One edit of nothing, and edits of rank one and two of one or two layers."""
    generator = torch.Generator().manual_seed(2)

    def delta(rank: int) -> LowRankDelta:
        left, right = (torch.randn(n, rank, generator=generator) for n in (16, 40))
        return LowRankDelta(left.to(model.dtype), right.to(model.dtype))

    names = [model.weight_name(layer) for layer in layers]
    return [
        Edit(REQUESTS[0]),
        Edit(REQUESTS[1], {names[0]: delta(1)}),
        Edit(REQUESTS[2], {names[1]: delta(2)}),
        Edit(REQUESTS[3], {name: delta(1) for name in names}),
    ]


_FEW_STEPS: dict[str, dict[str, Any]] = {
    "rome": {"layer": 1, "second_moment": False},
    "ft": {"layer": 1, "steps": 2},
    "memit": {"layers": (0, 1)},
}


def few_steps(model: EditableModel, editor: str) -> list[Edit]:
    """Edits of all the requests by an editor of the registry, quickly."""
    return few_steps_editor(model, editor).edit(REQUESTS)


def few_steps_editor(model: EditableModel, editor: str) -> Any:
    """An editor of the registry that is quick."""
    kind = REGISTRY[editor]
    solver = SecondMoment(torch.eye(40, dtype=torch.float64) / 100, 40).solver()
    resources = Resources(model, TEMPLATES, lambda layer: solver, 400)
    return kind.build(resources, kind.settings(**_FEW_STEPS[editor]))
