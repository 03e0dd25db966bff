"""From text to tokens: the seam between prompt and target, the subject's last token, batches.

Legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rome.data.records import RecordError


@dataclass(frozen=True)
class Encoded:
    """Token ids of a whole text with the character span of each; special tokens span nothing."""

    ids: list[int]
    spans: list[tuple[int, int]]
    special: list[bool]


@dataclass(frozen=True)
class Text:
    """Tokens of a prompt and its target, and the index of the target's first."""

    ids: list[int]
    start: int


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Encoded]:
    """Encode whole texts as the tokenizer does by default (with BOS where it adds one).

    Special tokens that it adds after a text, such as EOS, are left out: text goes on there.
    """
    if not texts:
        return []
    encoded = tokenizer(
        [*texts, "a"],
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        padding=False,
    )
    columns = ("input_ids", "offset_mapping", "special_tokens_mask")
    *rows, probe = zip(*(encoded[c] for c in columns), strict=True)
    before = probe[2].index(0)  # Of a text without tokens, special ones are before or after it.
    return [
        _trimmed(text, before, ids, spans, special)
        for text, (ids, spans, special) in zip(texts, rows, strict=True)
    ]


def _trimmed(
    text: str, before: int, ids: list[int], spans: list[tuple[int, int]], special: list[int]
) -> Encoded:
    length = len(ids)
    while length > before and special[length - 1]:
        length -= 1
    spans = spans[:length]
    # A tokenizer that composes characters gives a letter's span to letter and mark.
    following = len(text)
    for i in reversed(range(before, length)):
        start, stop = spans[i]
        while stop < following and not text[stop].isspace():
            stop += 1
        spans[i] = start, stop
        following = start if i and spans[i - 1][0] < start else following
    return Encoded(ids[:length], spans, [bool(s) for s in special[:length]])


def with_target(prompt: str, target: str, separator: str = " ") -> str:
    """The text in which `target` is scored: prompt and target, with one space between as the
    reference has it, or what a language without spaces has there."""
    return f"{prompt.rstrip(' ')}{separator}{target.lstrip(' ')}"


def target_start(encoded: Encoded, prompt: str) -> int:
    """Index of the first token of the target in the encoding of `with_target(prompt, target)`.

    A token that merges over the seam belongs to the target; special tokens before it do not.
    """
    end = len(prompt.rstrip(" "))
    for i, ((start, stop), special) in enumerate(zip(encoded.spans, encoded.special, strict=True)):
        if not special and (start >= end or stop > end):
            return i
    raise RecordError(f"no token of a target follows the prompt {prompt!r}; is the target empty?")


def subject_last(encoded: Encoded, prompt: str, subject: str) -> int:
    """Index of the token that holds the subject's last character.

    `prompt` has one `{}` and `encoded` starts with the tokens of the prompt filled with `subject`.
    Equals the index of the reference code (tokens of what precedes plus tokens of the subject)
    wherever the tokenizer neither adds BOS nor merges over the subject's borders.
    """
    begin = prompt.index("{}")
    last = begin + len(subject.rstrip()) - 1
    for i in reversed(range(len(encoded.ids))):
        start, stop = encoded.spans[i]
        if not encoded.special[i] and start <= last < stop:
            return i
    raise RecordError(f"the subject {subject!r} has no token in the prompt {prompt!r}")


def subject_tokens(encoded: Encoded, prompt: str, subject: str) -> range:
    """Indices of the tokens that hold the subject, as `subject_last` has its last one."""
    last = subject_last(encoded, prompt, subject)
    begin = prompt.index("{}")
    owned = zip(encoded.spans, encoded.special, strict=True)
    first = next(i for i, ((_, stop), special) in enumerate(owned) if not special and stop > begin)
    return range(first, last + 1)


@dataclass
class Batch:
    """Rows of tokens with padding on either side.

    `positions` counts each row's own tokens from 0, so that padding moves nothing.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    positions_BT: Tensor

    def __getitem__(self, rows: Tensor) -> Batch:
        return Batch(self.ids_BT[rows], self.mask_BT[rows], self.positions_BT[rows])


def pad(
    rows: Sequence[Sequence[int]],
    device: torch.device | str,
    columns: Sequence[int] | None = None,
) -> Batch:
    """Pad rows of token ids on the right, or so that the tokens `columns[b]` share one column.

    Padding is a row's own first token, masked out: a token whose embedding is NaN, which no mask
    keeps out, spoils no row that has it not.
    """
    pivots = columns if columns is not None else [0] * len(rows)
    left = max(pivots)
    right = max(len(row) - pivot for row, pivot in zip(rows, pivots, strict=True))
    ids = []
    for row, pivot in zip(rows, pivots, strict=True):
        filling = list(row[:1]) or [0]
        ids.append(filling * (left - pivot) + list(row) + filling * (right - len(row) + pivot))
    begin_B1 = torch.tensor([[left - pivot] for pivot in pivots])
    end_B1 = begin_B1 + torch.tensor([[len(row)] for row in rows])
    column_T = torch.arange(left + right)
    mask_BT = ((column_T >= begin_B1) & (column_T < end_B1)).long()
    positions_BT = (column_T - begin_B1).clamp(min=0)
    return Batch(torch.tensor(ids).to(device), mask_BT.to(device), positions_BT.to(device))


def context_templates(texts: Sequence[str]) -> list[str]:
    """`{}` and one `TEXT. {}` for each sampled text; its braces become spaces."""
    return ["{}", *(text.replace("{", " ").replace("}", " ") + ". {}" for text in texts)]
