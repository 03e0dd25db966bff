"""Edit, score, revert: records in, result rows out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import field
from math import isfinite
from types import MappingProxyType
from typing import Any

from rome.data.records import Record, RecordError
from rome.editors import Editor
from rome.edits.deltas import Edit, total_norm
from rome.models import EditableModel
from rome.scoring import generation, greedy, probabilities, text_metrics
from rome.scoring.generation import GenerationSettings
from rome.scoring.probabilities import Extras
from rome.settings import configurable


@configurable()
class ScoringSettings:
    """Settings of scoring."""

    generation: GenerationSettings | None = field(default_factory=GenerationSettings)
    """Null writes no texts, and so has no GE and RS."""
    strict: bool = True
    """Also decode greedy answers: ES_strict, PS_strict, NS_strict."""
    neighborhood_plus: bool = True
    """The neighborhood prompts once more, each after the edited sentence: NS_plus."""
    reversed: bool = True
    """The reversed fact, where the relation has a prompt in configs/facts/reversed.yaml: RVS."""


def evaluate(
    model: EditableModel,
    editor: Editor,
    records: Sequence[Record],
    settings: ScoringSettings,
    references: text_metrics.ReferenceTexts | None,
    token_budget: int,
    reversed_prompts: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[dict[str, Any]], list[Edit]]:
    """One row per record, the columns of RESULT_SCHEMA that the science fills in; and the edits.

    `references`: the store's reference texts for RS, or None where it has none. `token_budget`:
    tokens of a forward pass at most. `reversed_prompts`: see `Extras`. Seconds are the record's
    equal share of the batch's. Raises RecordError where one of the records cannot be done.
    """
    began = time.perf_counter()
    edits = editor.edit([record.request for record in records])
    for edit in edits:
        norm = edit.health["norm"] if "norm" in edit.health else total_norm(edit.deltas)
        if not isfinite(norm):
            raise RecordError("the edit is not finite: it holds NaN or infinities")
    edited = time.perf_counter()
    extras = Extras(settings.neighborhood_plus, reversed_prompts if settings.reversed else {})
    scores = probabilities.score_records(model, records, edits, token_budget, extras)
    scored = time.perf_counter()
    said: list[dict[str, list[str]]] = [{} for _ in records]
    if settings.strict:
        said = greedy.say_records(model, records, edits, token_budget)
    spoken = time.perf_counter()
    texts: list[list[str]] = [[] for _ in records]
    if settings.generation:
        texts = _texts(model, records, edits, settings.generation, token_budget)
    generated = time.perf_counter()
    rows = [
        {
            "case_id": record.case_id,
            "relation_id": record.relation_id,
            "subject": record.subject,
            "prompt": record.prompt,
            "target_new": record.target_new,
            "target_true": record.target_true,
            "neighborhood_target": record.neighborhood_target,
            "separator": record.separator,
            **scores[r],
            **said[r],
            "texts": texts[r],
            "GE": text_metrics.ngram_entropy(texts[r]) if texts[r] else None,
            "RS": _reference_score(references, record, texts[r]),
            **{f"edit_{name}": value for name, value in edits[r].health.items()},
            "seconds_edit": (edited - began) / len(records),
            "seconds_probabilities": (scored - edited) / len(records),
            "seconds_greedy": (spoken - scored) / len(records),
            "seconds_generation": (generated - spoken) / len(records),
        }
        for r, record in enumerate(records)
    ]
    return rows, edits


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
