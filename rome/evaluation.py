"""Edit, score, revert: records in, result rows out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
) -> tuple[list[dict[str, Any]], list[Edit]]:
    """One row per record, the columns of RESULT_SCHEMA that the science fills in; and the edits.

    `references`: the store's reference texts for RS, or None where it has none. `token_budget`:
    tokens of a forward pass at most. `reversed_prompts`: see `Extras`; these and the neighbors
    after the edited sentence are no turns of a chat, and left out if what is asked is one. Seconds
    are the record's equal share of the batch's. `tell` hears how much is done, 1 for all, after
    each stage. Raises RecordError where one of the records cannot be done.
    """
    stages = 2 + settings.strict + bool(settings.wild) + bool(settings.generation)
    ended = 0

    def stage() -> float:
        nonlocal ended
        ended += 1
        tell(ended / stages)
        return time.perf_counter()

    edited_as, asked_as = _templates(model, prompt_template)
    began = time.perf_counter()
    edits = edit_records(model, editor, [edited_as(record) for record in records])
    for edit in edits:
        norm = edit.health["norm"] if "norm" in edit.health else total_norm(edit.deltas)
        refuse_if_not_finite(norm)
    edited = stage()
    asked = [asked_as(record) for record in records]
    extras = Extras(settings.neighborhood_plus, reversed_prompts if settings.reversed else {})
    if prompt_template in ("chat", "chat_probes"):
        extras = probabilities.BENCHMARK_ONLY
    scores = probabilities.score_records(model, asked, edits, token_budget, extras)
    probes = probe_sets.score_probes(model, asked, edits, settings.strict, token_budget)
    scored = stage()
    said: list[dict[str, Any]] = [{} for _ in records]
    if settings.strict:
        said = greedy.say_records(model, asked, edits, token_budget)
        stage()
    spoken = time.perf_counter()
    told: list[dict[str, Any]] = [{} for _ in records]
    if wild := settings.wild:
        formed = [asked_as(in_form(record, wild.form)) for record in records]
        told = greedy.say_wild_records(model, formed, edits, wild.max_tokens, token_budget)
        more = probe_sets.say_wild_probes(model, formed, edits, wild.max_tokens, token_budget)
        probes = [
            [a | b for a, b in zip(*pair, strict=True)] for pair in zip(probes, more, strict=True)
        ]
        stage()
    answered = time.perf_counter()
    texts: list[list[str]] = [[] for _ in records]
    if settings.generation:
        texts = _texts(model, records, edits, settings.generation, token_budget)
        stage()
    generated = time.perf_counter()
    rows = [
        {
            "case_id": record.case_id,
            "relation_id": record.relation_id,
            "subject": record.subject,
            "prompt": record.prompt,
            "target_new": record.target_new,
            "target_true": record.target_true,
            "neighborhood_targets": record.neighborhood_targets or None,
            "further": [asdict(one) for one in record.further] or None,
            "original_id": record.original_id,
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
            "GE": text_metrics.ngram_entropy(texts[r]) if texts[r] else None,
            "RS": _reference_score(references, record, texts[r]),
            **{f"edit_{name}": value for name, value in edits[r].health.items()},
            "seconds_edit": (edited - began) / len(records),
            "seconds_probabilities": (scored - edited) / len(records),
            "seconds_greedy": (spoken - scored) / len(records),
            "seconds_wild": (answered - spoken) / len(records),
            "seconds_generation": (generated - answered) / len(records),
        }
        for r, record in enumerate(records)
    ]
    return rows, edits


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
    records: Sequence[Record],
    edits: Sequence[Edit],
    settings: GenerationSettings,
    token_budget: int,
) -> list[list[str]]:
    rows = generation.record_starts(model, records)
    ids = generation.generate(model, rows, edits, settings, token_budget)
    texts: list[list[str]] = [[] for _ in records]
    for row, text in zip(rows, generation.decode(model, ids), strict=True):
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
