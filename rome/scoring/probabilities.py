"""Probabilities of targets after prompts, for many records and edits at once.

Legend: B rows, T tokens, N scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rome import prompts
from rome.deltas import Edit, applied
from rome.models import EditableModel
from rome.records import Record
from rome.results import PROMPT_KINDS


@dataclass(frozen=True)
class Query:
    """How likely is `target` after `prompt` under the edit with index `edit`?"""

    edit: int
    prompt: str
    target: str


@dataclass
class _Row:
    """A sequence to run, and the (query, first target position, target ids) it answers."""

    edit: int
    ids: list[int]
    answers: list[tuple[int, int, list[int]]]


def nll(
    model: EditableModel, queries: Sequence[Query], edits: Sequence[Edit], token_budget: int
) -> list[float]:
    """Mean over the target's tokens of -log p, in nats, one per query.

    Equal to scoring each query alone (reference code: `test_batch_prediction`). A row answers every
    query whose tokens it starts with, so a prompt is run once for both of its targets where they
    are single tokens. A batch holds at most `token_budget` tokens, padding included.
    """
    result = [0.0] * len(queries)
    for rows in _batches(_rows(model, queries), token_budget):
        _score(model, rows, edits, result)
    return result


def _rows(model: EditableModel, queries: Sequence[Query]) -> list[_Row]:
    texts = [prompts.with_target(query.prompt, query.target) for query in queries]
    needs = []
    for q, encoded in enumerate(model.encode(texts)):
        start = prompts.target_start(encoded, queries[q].prompt)
        if start == 0:
            raise ValueError(
                f"a target needs a token before it, got the prompt {queries[q].prompt!r}"
            )
        needs.append((queries[q].edit, encoded.ids[:-1], (q, start, encoded.ids[start:])))
    rows: list[_Row] = []
    # In descending order a sequence comes right after those that it is a beginning of.
    for edit, ids, answer in sorted(needs, key=lambda need: need[:2], reverse=True):
        if rows and rows[-1].edit == edit and rows[-1].ids[: len(ids)] == ids:
            rows[-1].answers.append(answer)
        else:
            rows.append(_Row(edit, ids, [answer]))
    return rows


def _batches(rows: list[_Row], token_budget: int) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if batch and (len(batch) + 1) * len(row.ids) > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def _score(
    model: EditableModel, rows: list[_Row], edits: Sequence[Edit], result: list[float]
) -> None:
    batch = prompts.pad([row.ids for row in rows], model.device)
    with applied(model, [edits[row.edit] for row in rows]):
        hidden_BTD = model.base(
            input_ids=batch.ids_BT,
            attention_mask=batch.mask_BT,
            position_ids=batch.positions_BT,
            use_cache=False,
        ).last_hidden_state
    places = [
        (query, b, start - 1 + i, token)
        for b, row in enumerate(rows)
        for query, start, target in row.answers
        for i, token in enumerate(target)
    ]
    query_N, b_N, t_N, token_N = zip(*places, strict=True)
    # Both targets of a prompt read the same position: its logits are computed once.
    where, inverse_N = torch.unique(torch.tensor([b_N, t_N]), dim=1, return_inverse=True)
    log_p_MV = model.logits(hidden_BTD[where[0], where[1]]).log_softmax(1)
    log_p_N = log_p_MV[inverse_N.to(model.device), torch.tensor(token_N, device=model.device)]
    lengths = {query: len(target) for row in rows for query, _, target in row.answers}
    for query, log_p in zip(query_N, log_p_N.tolist(), strict=True):
        result[query] -= log_p / lengths[query]


def score_records(
    model: EditableModel, records: Sequence[Record], edits: Sequence[Edit], token_budget: int
) -> list[dict[str, list[float]]]:
    """The `*_nll_new` and `*_nll_true` columns of each record under its edit (same index)."""
    queries: list[Query] = []
    places: list[tuple[int, str]] = []
    for r, record in enumerate(records):
        by_kind = (
            (record.request.text,),
            record.paraphrase_prompts,
            record.neighborhood_prompts,
            record.attribute_prompts,
        )
        for kind, texts in zip(PROMPT_KINDS, by_kind, strict=True):
            for target, text in (("new", record.target_new), ("true", record.target_true)):
                queries += [Query(r, prompt, text) for prompt in texts]
                places += [(r, f"{kind}_nll_{target}")] * len(texts)
    columns: list[dict[str, list[float]]] = [
        {f"{kind}_nll_{target}": [] for kind in PROMPT_KINDS for target in ("new", "true")}
        for _ in records
    ]
    for (r, column), value in zip(places, nll(model, queries, edits, token_budget), strict=True):
        columns[r][column].append(value)
    return columns
