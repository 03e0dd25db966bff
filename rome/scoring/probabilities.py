"""Probabilities of targets after prompts, for many records and edits at once.

Legend: B rows, T tokens, N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import isfinite, nan
from statistics import fmean
from typing import Any

import torch

from rome.data.records import Record, told
from rome.data.results import EXTRA_KINDS
from rome.edits.deltas import Edit, applied
from rome.models import EditableModel, memory, prompts
from rome.models.prompts import Text
from rome.scoring import released, trees
from rome.scoring.trees import Tree


@dataclass(frozen=True)
class Query:
    """Ask for the probability of `target` after `prompt` under the edit with index `edit`."""

    edit: int
    prompt: str
    target: str
    separator: str = " "


@dataclass(frozen=True)
class Score:
    """The score of a target."""

    nll: float
    """Mean over the target's tokens of -log p, in nats."""
    accuracy: float
    """Share of the target's tokens that are the likeliest where they stand, given those before."""


@dataclass(frozen=True)
class Extras:
    """Prompts beside those of the benchmark."""

    neighborhood_plus: bool = False
    """The neighborhood prompts once more, after the edited sentence."""
    reversed_prompts: Mapping[str, str] = field(default_factory=dict)
    """Relation -> prompt with `{}` for the object, which the subject follows."""


BENCHMARK_ONLY = Extras()

# A longer row would save little, and its tokens' attention would cost more.
_ROW_TOKENS = 64


@dataclass
class _Row:
    """Texts to run, and the (query, places that say its target's tokens, these) they answer."""

    edit: int
    tree: Tree
    answers: list[tuple[int, list[int], list[int]]]


def score(
    model: EditableModel, queries: Sequence[Query], edits: Sequence[Edit], token_budget: int
) -> list[Score]:
    """One score per query (reference code: `test_batch_prediction`); see `score_texts`."""
    return score_texts(model, _texts(model, queries), edits, token_budget)


def _texts(model: EditableModel, queries: Sequence[Query]) -> list[tuple[int, Text]]:
    texts = model.encode_targets([(one.prompt, one.target, one.separator) for one in queries])
    return [(query.edit, text) for query, text in zip(queries, texts, strict=True)]


def score_texts(
    model: EditableModel,
    asked: Sequence[tuple[int, Text]],
    edits: Sequence[Edit],
    token_budget: int,
) -> list[Score]:
    """One score for each text and the index of its edit.

    Equal to scoring each alone. Texts of one edit share a row, in which what they begin with alike,
    as a prompt with either target, is run once. A batch holds at most `token_budget` tokens,
    padding included.
    """
    result = [Score(nan, nan)] * len(asked)
    rows = _rows(asked, edits)
    batches = memory.by_length([len(row.tree.ids) for row in rows], token_budget)
    found = memory.in_batches(rows, batches, lambda part: _score(model, part, edits))
    for row, scores in zip(rows, found, strict=True):
        for (query, _, _), one in zip(row.answers, scores, strict=True):
            result[query] = one
        if len(row.answers) > 1 and not all(isfinite(one.nll) for one in scores):
            # A mask keeps nothing out that is NaN: each text is scored without the others.
            for query, _, _ in row.answers:
                (result[query],) = score_texts(model, [asked[query]], edits, token_budget)
    return result


def _rows(asked: Sequence[tuple[int, Text]], edits: Sequence[Edit]) -> list[_Row]:
    # Of records that run as the model is, equal beginnings are run once.
    unedited = min((e for e, edit in enumerate(edits) if not edit.deltas), default=0)
    shared = [e if edit.deltas else unedited for e, edit in enumerate(edits)]
    needs = [(shared[edit], text.ids[:-1], q) for q, (edit, text) in enumerate(asked)]
    rows: list[_Row] = []
    for edit, ids, q in sorted(needs):
        if not rows or rows[-1].edit != edit or rows[-1].tree.size_with(ids) > _ROW_TOKENS:
            rows.append(_Row(edit, Tree(), []))
        text, said = asked[q][1], rows[-1].tree.add(ids)
        rows[-1].answers.append((q, said[text.start - 1 :], text.ids[text.start :]))
    return rows


@torch.inference_mode()
def _score(model: EditableModel, rows: Sequence[_Row], edits: Sequence[Edit]) -> list[list[Score]]:
    """One score for each answer of each row."""
    trees_B, device = [row.tree for row in rows], model.device
    ids_BT = prompts.pad([tree.ids for tree in trees_B], device).ids_BT
    positions_BT = prompts.pad([tree.depths for tree in trees_B], device).ids_BT
    with applied(model, [edits[row.edit] for row in rows]):
        mask = model.attention_mask(trees.sees(trees_B, device), positions_BT)
        hidden_BTD = model.run(ids_BT, mask, positions_BT)
    T = ids_BT.shape[1]
    asked = [
        (b * T + t, token)
        for b, row in enumerate(rows)
        for _, said, target in row.answers
        for t, token in zip(said, target, strict=True)
    ]
    # Both targets of a prompt read the same place: its logits are computed once.
    place: dict[int, int] = {}
    which = [(place.setdefault(at, len(place)), token) for at, token in asked]
    place_M, (which_N, token_N) = (
        torch.tensor(list(place)).to(device),
        torch.tensor(which).T.to(device),
    )
    log_p_MV = model.logits(hidden_BTD.flatten(0, 1)[place_M]).log_softmax(1)
    log_p_N = log_p_MV[which_N, token_N]
    likeliest_N = log_p_MV.argmax(1)[which_N] == token_N
    found_N2 = torch.stack([log_p_N, likeliest_N.to(log_p_N)], 1)
    log_p, likeliest = (iter(column) for column in found_N2.T.tolist())
    return [
        [
            Score(-fmean(islice(log_p, len(target))), fmean(islice(likeliest, len(target))))
            for _, _, target in row.answers
        ]
        for row in rows
    ]


@dataclass(frozen=True)
class Prepared:
    """The texts of some records in tokens. They need no edit, and so can be made before one."""

    asked: list[dict[str, _Asked]]
    """Column -> prompts and targets, of each record."""
    omitted: list[str | None]
    texts: list[tuple[int, Text]]
    """Index of a record and a text, in the order of `asked`."""


def prepare(model: EditableModel, records: Sequence[Record], extras: Extras) -> Prepared:
    """The texts of `score_records`. Raises RecordError for one that has no place in the model."""
    asked = [_asked(record, extras) for record in records]
    omitted = [_omit_too_long(model, columns) for columns in asked]
    queries = [
        Query(r, prompt, target, records[r].separator)
        for r, columns in enumerate(asked)
        for pairs in columns.values()
        for prompt, target in pairs
    ]
    return Prepared(asked, omitted, _texts(model, queries))


def score_records(
    model: EditableModel,
    records: Sequence[Record],
    edits: Sequence[Edit],
    token_budget: int,
    extras: Extras = BENCHMARK_ONLY,
) -> list[dict[str, Any]]:
    """The columns `*_nll_new`, `*_nll_true` and `*_accuracy` of each record under its edit (same
    index): one number per prompt; no column where the record has no such target, or where a prompt
    beside those of the benchmark is too long, which `omitted` then says."""
    return score_prepared(model, records, prepare(model, records, extras), edits, token_budget)


def score_prepared(
    model: EditableModel,
    records: Sequence[Record],
    prepared: Prepared,
    edits: Sequence[Edit],
    token_budget: int,
) -> list[dict[str, Any]]:
    """`score_records` of what `prepare` made of these records."""
    scores = iter(score_texts(model, prepared.texts, edits, token_budget))
    again = released.accuracies(model, records, prepared.asked, edits, token_budget)
    rows = []
    for r, (columns, why) in enumerate(zip(prepared.asked, prepared.omitted, strict=True)):
        row: dict[str, Any] = {"omitted": why} if why else {}
        for column, pairs in columns.items():
            found = list(islice(scores, len(pairs)))
            row[column] = [one.nll for one in found]
            if name := _ACCURACIES.get(column):
                row[name] = [again.get((r, column, i), one.accuracy) for i, one in enumerate(found)]
                if records[r].target_true is None:
                    row[f"{name}_tokens"] = [one.accuracy for one in found]
        rows.append(row)
    return rows


def _omit_too_long(model: EditableModel, columns: dict[str, _Asked]) -> str | None:
    """Take out the extra columns with a text that has no place in the model; says which and why."""
    positions, why = model.hf.config.max_position_embeddings, {}
    for column in [name for name in columns if name.startswith(EXTRA_KINDS)]:
        # No token is shorter than a byte.
        long = [pair for pair in columns[column] if len("".join(pair).encode()) + 8 > positions]
        try:
            model.encode([prompts.with_target(*pair) for pair in long])
        except ValueError as error:
            del columns[column]
            why[column.partition("_nll_")[0]] = str(error)
    # Both targets are wanted, or none.
    for kind in why:
        for target in ("new", "true"):
            columns.pop(f"{kind}_nll_{target}", None)
    return "; ".join(f"{kind}: {error}" for kind, error in why.items()) or None


_Asked = Sequence[tuple[str, str]]
_ACCURACIES = {
    "rewrite_nll_new": "rewrite_accuracy",
    "paraphrase_nll_new": "paraphrase_accuracy",
    "neighborhood_nll_true": "neighborhood_accuracy",
}


def _asked(record: Record, extras: Extras) -> dict[str, _Asked]:
    """The prompts and their targets behind each column `*_nll_*` that the record has."""
    kinds = told(record)
    if record.target_true is None:
        return {
            "rewrite_nll_new": kinds["rewrite"],
            "paraphrase_nll_new": kinds["paraphrase"],
            "neighborhood_nll_true": kinds["neighborhood"],
        }
    new, true = record.target_new, record.target_true
    asked: dict[str, _Asked] = {
        "rewrite_nll_new": kinds["rewrite"],
        "rewrite_nll_true": [(one.text, str(one.target_true)) for one in record.requests],
        "paraphrase_nll_new": kinds["paraphrase"],
        "paraphrase_nll_true": [(prompt, true) for prompt, _ in kinds["paraphrase"]],
        "neighborhood_nll_new": [(prompt, new) for prompt, _ in kinds["neighborhood"]],
        "neighborhood_nll_true": kinds["neighborhood"],
        "attribute_nll_new": [(prompt, new) for prompt in record.attribute_prompts],
        "attribute_nll_true": [(prompt, true) for prompt in record.attribute_prompts],
    }
    if extras.neighborhood_plus:
        # What is edited stands before the neighbors; of several requests all of it.
        edited = " ".join(
            prompts.with_target(one.text, one.target, one.separator) + "."
            for one in record.requests
        )
        plus = [(f"{edited} {prompt}", answer) for prompt, answer in kinds["neighborhood"]]
        asked["neighborhood_plus_nll_new"] = [(prompt, new) for prompt, _ in plus]
        asked["neighborhood_plus_nll_true"] = plus
    if template := extras.reversed_prompts.get(record.relation_id or ""):
        for name, target in (("new", new), ("true", true)):
            asked[f"reversed_nll_{name}"] = [(template.replace("{}", target), record.subject)]
    return asked
