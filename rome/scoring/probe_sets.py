"""Probe sets under edits: probabilities of their answers, and what the model says.

Condition questions are asked of the unedited model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from rome.data.records import Record
from rome.edits.deltas import Edit
from rome.models import EditableModel
from rome.scoring import greedy, probabilities
from rome.scoring.generation import UNEDITED
from rome.scoring.greedy import Question
from rome.scoring.probabilities import Query


def score_probes(
    model: EditableModel,
    records: Sequence[Record],
    edits: Sequence[Edit],
    strict: bool,
    token_budget: int,
) -> list[list[dict[str, Any]]]:
    """Of each probe of each record under its edit (same index): `nll` and `accuracy`, one number
    per answer, as `Score` has them; and with `strict` also `greedy`, the text up to its natural
    stop."""
    questions, edits = _questions(records, edits)
    queries = [
        Query(one.edit, one.prompt, target, one.separator)
        for one in questions
        for target in one.targets
    ]
    scores = iter(probabilities.score(model, queries, edits, token_budget))
    said = greedy.say(model, questions, edits, token_budget) if strict else []
    rows = []
    for i, question in enumerate(questions):
        found = list(islice(scores, len(question.targets)))
        row: dict[str, Any] = {
            "nll": [one.nll for one in found],
            "accuracy": [one.accuracy for one in found],
        }
        rows.append(row | ({"greedy": said[i]} if strict else {}))
    return _by_record(records, rows)


def say_wild_probes(
    model: EditableModel,
    records: Sequence[Record],
    edits: Sequence[Edit],
    max_tokens: int,
    token_budget: int,
) -> list[list[dict[str, Any]]]:
    """Of each probe of each record under its edit (same index): `wild`, all that is said."""
    questions, edits = _questions(records, edits)
    said = greedy.say_all(model, questions, edits, max_tokens, token_budget)
    return _by_record(records, [{"wild": text} for text in said])


def _questions(
    records: Sequence[Record], edits: Sequence[Edit]
) -> tuple[list[Question], list[Edit]]:
    questions = [
        Question(
            len(edits) if probe.role == "condition" else r,
            probe.prompt,
            probe.answers,
            record.separator,
        )
        for r, record in enumerate(records)
        for probe in record.probes
    ]
    return questions, [*edits, UNEDITED]


def _by_record(
    records: Sequence[Record], rows: Sequence[dict[str, Any]]
) -> list[list[dict[str, Any]]]:
    left = iter(rows)
    return [list(islice(left, len(record.probes))) for record in records]
