"""Edit, score, revert: records in, result rows out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from rome.data.records import Record
from rome.data.wording import in_form, worded
from rome.editors import Editor
from rome.edits.deltas import Edit, refuse_if_not_finite, total_norm
from rome.edits.several import RecordEditor, edit_records
from rome.models import EditableModel, chat
from rome.scoring import generation, greedy, probabilities, probe_sets, text_metrics
from rome.scoring.probabilities import Extras
from rome.scoring.settings import GenerationSettings, PromptTemplate, ScoringSettings

STAGES = ("edit", "probabilities", "greedy", "wild", "generation")
"""A row has the seconds of each, 0 for one that was not asked for."""


def evaluate(
    model: EditableModel,
    editor: Editor | RecordEditor,
    records: Sequence[Record],
    settings: ScoringSettings,
    references: text_metrics.ReferenceTexts | None,
    token_budget: int,
    reversed_prompts: Mapping[str, str] = MappingProxyType({}),
    prompt_template: PromptTemplate = "raw",
    tell: Callable[[float], object] = lambda share: None,
    entropies: text_metrics.Entropies = text_metrics.entropies,
) -> tuple[list[dict[str, Any]], list[Edit]]:
    """One row per record, the columns of RESULT_SCHEMA that the science fills in; and the edits.

    `references`: the store's reference texts for RS, or None where it has none. `token_budget`:
    tokens of a forward pass at most. `reversed_prompts`: see `Extras`; these and the neighbors
    after the edited sentence are no turns of a chat, and left out if what is asked is one. Seconds
    are the record's equal share of the batch's. `tell` hears how much is done, 1 for all, after
    each stage. `entropies` counts GE. Raises RecordError where one of the records cannot be done.

    The host works while the device does: a thread prepares what is asked during the edit, and GE
    may be counted elsewhere (`rome.scoring.apart`) while probabilities and answers are computed.
    """
    edited_as, asked_as = _templates(model, prompt_template)
    asked = [asked_as(record) for record in records]
    extras = Extras(settings.neighborhood_plus, reversed_prompts if settings.reversed else {})
    if prompt_template in ("chat", "chat_probes"):
        extras = probabilities.BENCHMARK_ONLY
    stages = _Stages(2 + settings.strict + bool(settings.wild) + bool(settings.generation), tell)
    with ThreadPoolExecutor(1) as beside:
        starts = beside.submit(generation.record_starts, model, records)
        prepared = beside.submit(probabilities.prepare, model, asked, extras)
        edits = edit_records(model, editor, [edited_as(record) for record in records])
        for edit in edits:
            norm = edit.health["norm"] if "norm" in edit.health else total_norm(edit.deltas)
            refuse_if_not_finite(norm)
        stages.end("edit")
        if prepared.done():
            prepared.result()  # What cannot be asked is told before texts are made.
        texts: list[list[str]] = [[] for _ in records]
        counted = text_metrics.entropies([])
        if settings.generation:
            texts = _texts(model, starts.result(), edits, settings.generation, token_budget)
            stages.end("generation")
            counted = entropies([some for some in texts if some])
            stages.begin()
        scores = probabilities.score_prepared(model, asked, prepared.result(), edits, token_budget)
    probes = probe_sets.score_probes(model, asked, edits, settings.strict, token_budget)
    stages.end("probabilities")
    said: list[dict[str, Any]] = [{} for _ in records]
    if settings.strict:
        said = greedy.say_records(model, asked, edits, token_budget)
        stages.end("greedy")
    told: list[dict[str, Any]] = [{} for _ in records]
    if wild := settings.wild:
        formed = [asked_as(in_form(record, wild.form)) for record in records]
        told = greedy.say_wild_records(model, formed, edits, wild.max_tokens, token_budget)
        more = probe_sets.say_wild_probes(model, formed, edits, wild.max_tokens, token_budget)
        probes = [
            [a | b for a, b in zip(*pair, strict=True)] for pair in zip(probes, more, strict=True)
        ]
        stages.end("wild")
    entropy = iter(counted.result())
    rows = [
        {
            **_facts(record),
            "prompt_template": prompt_template,
            "separator": asked[r].separator,
            **scores[r],
            **said[r],
            **told[r],
            "wild_form": settings.wild and settings.wild.form,
            "probes": [
                asdict(probe) | row for probe, row in zip(record.probes, probes[r], strict=True)
            ]
            or None,
            "texts": texts[r],
            "GE": next(entropy) if texts[r] else None,
            "RS": _reference_score(references, record, texts[r]),
            **{f"edit_{name}": value for name, value in edits[r].health.items()},
            **{f"seconds_{name}": s / len(records) for name, s in stages.seconds.items()},
        }
        for r, record in enumerate(records)
    ]
    return rows, edits


class _Stages:
    """Times the stages of a batch, and tells when each ends."""

    def __init__(self, count: int, tell: Callable[[float], object]) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._count, self._tell, self._ended = count, tell, 0
        self.begin()

    def begin(self) -> None:
        """Start the clock again: the time since the last stage counts for none."""
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        self._ended += 1
        self._tell(self._ended / self._count)
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def _facts(record: Record) -> dict[str, Any]:
    """The columns that copy the record itself."""
    return {
        "case_id": record.case_id,
        "relation_id": record.relation_id,
        "subject": record.subject,
        "prompt": record.prompt,
        "target_new": record.target_new,
        "target_true": record.target_true,
        "neighborhood_targets": record.neighborhood_targets or None,
        "further": [asdict(one) for one in record.further] or None,
        "original_id": record.original_id,
    }


Reworded = Callable[[Record], Record]


def _templates(model: EditableModel, name: PromptTemplate) -> tuple[Reworded, Reworded]:
    """What becomes of a record for its edit, and for what is asked."""
    if name == "raw":
        return _as_it_is, _as_it_is
    turn = chat.template(model.tokenizer)

    def in_chat(record: Record) -> Record:
        return worded(record, turn, separator="")

    return (
        _as_it_is if name == "chat_probes" else in_chat,
        _as_it_is if name == "chat_edits" else in_chat,
    )


def _as_it_is(record: Record) -> Record:
    return record


def _texts(
    model: EditableModel,
    starts: Sequence[generation.Start],
    edits: Sequence[Edit],
    settings: GenerationSettings,
    token_budget: int,
) -> list[list[str]]:
    ids = generation.generate(model, starts, edits, settings, token_budget)
    texts: list[list[str]] = [[] for _ in edits]
    for row, text in zip(starts, generation.decode(model, ids), strict=True):
        texts[row.edit].append(text_metrics.clean(text))
    return texts


def _reference_score(
    references: text_metrics.ReferenceTexts | None, record: Record, texts: Sequence[str]
) -> float | None:
    if (
        references is None
        or not texts
        or record.relation_id is None
        or record.target_new_id is None
    ):
        return None
    return references.score(texts, record.relation_id, record.target_new_id)
