"""The contexts of requests, and what the unedited model does in them.

Legend: E edits, C contexts, R = C + 1 rows of an edit (the last one is the KL prompt), B = E R,
T tokens, P prefix columns, S suffix columns (the subject's last token is column 0), N tokens of a
target, D hidden size, K key size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from rome.data.records import RecordError, Request
from rome.models import EditableModel, caches, costs, prompts
from rome.models.hooks import hooked
from rome.models.prompts import Encoded

Position = Literal["subject_first", "subject_middle", "subject_last", "subject_after", "last"]

# The prompt whose next-token distribution must not drift (Equation 4, second term).
KL_PROMPT = "{} is a"


@dataclass(frozen=True)
class Contexts:
    """The token rows of one request: every template with the target, then the KL prompt."""

    rows: list[list[int]]
    """Without the target's last token, which is predicted but never read."""
    pivots: list[int]
    """Index of the edited token, by default the subject's last, in each row."""
    labels: list[tuple[list[int], int]]
    """The target's tokens, and how far after the pivot the first of them is predicted."""

    @property
    def width(self) -> int:
        """Tokens from the subject's last on, in the longest row."""
        return max(len(row) - p for row, p in zip(self.rows, self.pivots, strict=True))


def contexts(
    model: EditableModel,
    request: Request,
    templates: Sequence[str],
    position: Position = "subject_last",
) -> Contexts:
    """Encode a request in every context template; the pivot is the token of a position.

    Raises RecordError where a template or prompt does not hold exactly one `{}`, or where one token
    holds the subject's end and the target's beginning.
    """
    filled = [_fill(template, request.prompt) for template in templates]
    texts = [_fill(context, request.subject) for context in filled]
    full = [prompts.with_target(text, request.target, request.separator) for text in texts]
    encoded = model.encode([*full, _fill(KL_PROMPT, request.subject)])
    made = Contexts([], [], [])
    for context, text, row in zip(filled, texts, encoded, strict=False):
        start = prompts.target_start(row, text)
        pivot = _pivot(row, context, request.subject, position, start)
        if start <= pivot:
            raise RecordError(
                f"the target {request.target!r} must begin after the subject's last token, "
                f"but this tokenizer merges them in {text!r}; choose another prompt"
            )
        made.rows.append(row.ids[:-1])
        made.pivots.append(pivot)
        made.labels.append((row.ids[start:], start - 1 - pivot))
    made.rows.append(encoded[-1].ids)
    end = len(encoded[-1].ids)
    made.pivots.append(_pivot(encoded[-1], KL_PROMPT, request.subject, position, end))
    return made


def _pivot(encoded: Encoded, prompt: str, subject: str, position: Position, end: int) -> int:
    """Index of the token of a position in a prompt whose tokens stop before `end`."""
    at = prompts.subject_tokens(encoded, prompt, subject)
    match position:
        case "subject_first":
            return at[0]
        case "subject_middle":
            return at[(len(at) - 1) // 2]
        case "subject_last":
            return at[-1]
        case "subject_after":  # Like the reference, the subject's last where nothing follows.
            return at[-1] + 1 if at[-1] + 1 < end else at[-1]
        case "last":
            return end - 1


def _fill(template: str, text: str) -> str:
    if template.count("{}") != 1:
        raise RecordError(f"a template or prompt must contain exactly one '{{}}', got {template!r}")
    return template.replace("{}", text)


def batches(
    chosen: Sequence[Contexts], token_budget: int, device: torch.device
) -> Iterator[list[int]]:
    """Indices of requests by width, so many that `token_budget` allows their optimisation.

    A wider request opens a batch of its own where padding the others would cost more than a pass.
    """
    batch: list[int] = []
    cost = costs.of(device)
    for i in sorted(range(len(chosen)), key=lambda i: chosen[i].width):
        width, rows = chosen[i].width, len(chosen[i].rows)
        padding = len(batch) * rows * (width - chosen[batch[0]].width) if batch else 0
        full = (len(batch) + 1) * rows * width > token_budget // cost.backward
        if batch and (full or padding > cost.pass_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass
class SubjectStates:
    """Activations of the unedited model at the subject's last token, per edit and row.

    Everything has E as its first dimension, so that edits can leave by indexing (from the CPU:
    what enters the layers stays where they are).
    """

    key_ERK: Tensor
    output_ERD: Tensor
    ids_ERS: Tensor
    positions_ERS: Tensor
    mask_ERT: Tensor
    entering_ERSD: Tensor | None
    prefix: list[tuple[Tensor, Tensor]]
    """Keys and values [E, R, heads, P, head size] of the edited layer and those after it."""
    # On the CPU, where they are made into places on the device.
    label_ids_ECN: Tensor
    label_columns_ECN: Tensor
    label_weights_ECN: Tensor
    """1 / (C * target tokens), and 0 for padding: weights of a mean of means."""

    def __getitem__(self, kept: Tensor) -> SubjectStates:
        def take(value: Any) -> Any:
            if isinstance(value, list):
                return [(k[kept], v[kept]) for k, v in value]
            return None if value is None else value[kept]

        return SubjectStates(**{f.name: take(getattr(self, f.name)) for f in fields(self)})


@torch.no_grad()
def observe(model: EditableModel, layer: int, chosen: Sequence[Contexts]) -> SubjectStates:
    """One forward pass of the unedited model over every row of every request."""
    pivots = [pivot for request in chosen for pivot in request.pivots]
    batch = prompts.pad([row for request in chosen for row in request.rows], model.device, pivots)
    P = max(pivots)
    seen: dict[str, Tensor] = {}

    def on_layer(hidden_BTD: Tensor) -> None:
        seen["entering_BSD"] = hidden_BTD[:, P:]

    def on_down(module: Any, args: tuple[Tensor, ...], output_BTD: Tensor) -> None:
        seen["key_BK"] = args[0][:, P].to(model.device)
        seen["output_BD"] = output_BTD[:, P].to(model.device)

    cache = caches.recording()
    with hooked(
        model.down_projection(layer).register_forward_hook(on_down),
        model.on_entering(layer, on_layer),
    ):
        model.run(batch.ids_BT, batch.mask_BT, batch.positions_BT, cache)

    def per_edit(x: Tensor) -> Tensor:
        return x.unflatten(0, (len(chosen), -1)).contiguous()

    label_ids_BN, label_columns_BN, label_weights_BN = _labels(model, chosen)
    return SubjectStates(
        key_ERK=per_edit(seen["key_BK"]),
        output_ERD=per_edit(seen["output_BD"]),
        ids_ERS=per_edit(batch.ids_BT[:, P:]),
        positions_ERS=per_edit(batch.positions_BT[:, P:]),
        mask_ERT=per_edit(batch.mask_BT),
        entering_ERSD=per_edit(seen["entering_BSD"]) if layer > 0 else None,
        prefix=[
            (per_edit(keys[..., :P, :]), per_edit(values[..., :P, :]))
            for keys, values in caches.recorded(cache)[layer:]
        ],
        label_ids_ECN=per_edit(label_ids_BN),
        label_columns_ECN=per_edit(label_columns_BN),
        label_weights_ECN=per_edit(label_weights_BN),
    )


def _labels(model: EditableModel, chosen: Sequence[Contexts]) -> tuple[Tensor, Tensor, Tensor]:
    labels = [label for request in chosen for label in request.labels]
    C = len(labels) // len(chosen)
    N = max(len(ids) for ids, _ in labels)

    def padded(rows: Iterable[Sequence[float]], dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[0] * (N - len(row))] for row in rows], dtype=dtype)

    return (
        padded((ids for ids, _ in labels), torch.long),
        padded((range(column, column + len(ids)) for ids, column in labels), torch.long),
        padded(
            ([1 / (C * len(ids))] * len(ids) for ids, _ in labels),
            torch.promote_types(model.dtype, torch.float32),
        ),
    )
