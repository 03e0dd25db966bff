"""The useful work of a record: what no way of computing it can avoid, as far as is known here.

A pass of one token through a layer costs 2 FLOPs for each weight of the layer's matrices, a row of
logits 2 for each weight of the output embedding; a backward costs as much again, since only the
gradient of the activations is needed. Attention scores, norms, activations, sampling, C^-1 k* and
padding are left out: for texts of 100 tokens attention would add a few per cent.

- A token passes a layer once for each distinct text that ends with it: equal beginnings, of the
  rows of one record or of several, count once.
- Keys: all rows of the edit through the layers up to the edited one, and the tokens before the
  subject's last through all layers.
- Values: in each evaluation, the subject's last token and those after it (of the KL prompt only
  that token) through the layers after the edited one, and logits at the target's positions; a
  backward through the same for each evaluation that a step followed.
- Probabilities: up to the edited layer once for the unedited and all edited models, after it once
  for the unedited model and once for each edit; logits where a target's token is predicted.
- Generation: prompts as in probabilities, new tokens (each text's last one is never read) through
  all layers, and a row of logits for each new token; unedited and edited.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rome.data.records import Record
from rome.models import EditableModel
from rome.scoring.settings import GenerationSettings
from tests.support import oracle, reference


@dataclass(frozen=True)
class Work:
    flops: int
    tokens: int
    """Passes of a token: keys and values, each evaluation; prompts with their targets, unedited and
    edited. In generation new tokens alone."""

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.tokens + other.tokens)


@dataclass(frozen=True)
class Costs:
    """FLOPs of one token's pass: layers up to the edited one, layers after it, logits."""

    lower: int
    upper: int
    logits: int

    @classmethod
    def of(cls, model: EditableModel, layer: int) -> Costs:
        per_layer = [
            2 * sum(p.numel() for p in block.parameters() if p.dim() == 2) for block in model.layers
        ]
        head = model.hf.get_output_embeddings().weight.numel()
        return cls(sum(per_layer[: layer + 1]), sum(per_layer[layer + 1 :]), 2 * head)


def beginnings(rows: Iterable[Sequence[int]]) -> int:
    """How many distinct texts the rows and all their beginnings are."""
    return len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})


def edit(
    costs: Costs, requests: Sequence[reference.Contexts], steps: Sequence[int]
) -> tuple[Work, Work]:
    """Keys and values of requests that took `steps` evaluations each."""
    rows = [row for r in requests for row in (*r.rows[:-1], r.kl[: r.kl_at + 1])]
    pivots = [pivot for r in requests for pivot in (*r.at, r.kl_at)]
    prefixes = [row[:pivot] for row, pivot in zip(rows, pivots, strict=True)]
    all_tokens = beginnings(rows)
    keys = Work(all_tokens * costs.lower + beginnings(prefixes) * costs.upper, all_tokens)
    values = Work(0, 0)
    for r, evaluations in zip(requests, steps, strict=True):
        suffix = sum(len(row) - at for row, at in zip(r.rows[:-1], r.at, strict=True)) + 1
        labels = len(r.at) * len(r.target) + 1
        once = suffix * costs.upper + labels * costs.logits
        values += Work(once * (2 * evaluations - 1), suffix * evaluations)
    return keys, values


def probabilities(costs: Costs, model: EditableModel, records: Sequence[Record]) -> Work:
    per_record = [_scored(model, record) for record in records]
    everything = [pair for pairs in per_record for pair in pairs]
    unedited = _texts(everything)
    total = Work(unedited * costs.lower, 0)
    for pairs in (everything, *per_record):
        tokens = _texts(pairs)
        predicting = {tuple(before + t[:i]) for before, t in pairs for i in range(len(t))}
        total += Work(tokens * costs.upper + len(predicting) * costs.logits, tokens)
    return total


def _texts(pairs: Sequence[tuple[list[int], list[int]]]) -> int:
    return beginnings(before + target[:-1] for before, target in pairs)


def _scored(model: EditableModel, record: Record) -> list[tuple[list[int], list[int]]]:
    return [
        oracle.prompt_and_target(model.tokenizer, text, target)
        for text in reference.scored_prompts(record)
        for target in (record.target_new, str(record.target_true))
    ]


def generation(
    costs: Costs, model: EditableModel, records: Sequence[Record], settings: GenerationSettings
) -> Work:
    per_record = [[row.ids for row in model.encode(r.generation_prompts)] for r in records]
    everything = [row for rows in per_record for row in rows]
    total = Work(beginnings(everything) * costs.lower, 0)
    for rows in (everything, *per_record):
        new = [settings.max_tokens - len(row) for row in rows if len(row) < settings.max_tokens]
        read = sum(new) - len(new)
        flops = (beginnings(rows) + read) * costs.upper + read * costs.lower
        total += Work(flops + sum(new) * costs.logits, sum(new))
    return total
