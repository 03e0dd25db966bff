"""The host's work for a device, counted without one: `make perf ARGS=--count`.

A model on a simulated device (`two_gpus.py`) says where its tensors are, so that each operator
shows what it would launch, carry over, or wait for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rome.editors.rome import Rome
from rome.edits.deltas import Edit
from rome.scoring import generation, greedy, probabilities
from tests.programs import bench
from tests.programs.bench import Bench
from tests.support.two_gpus import INDEXED, Placed, place, two_gpus, watched

aten = torch.ops.aten

# What a device cannot answer without being waited for: its result decides a shape or is a number.
_WAITED_FOR = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}

_ONE_BATCH = 10**7


@dataclass
class Counts:
    """What the host does."""

    operators: int = 0
    """Dispatched, on the CPU and on the device, views included."""
    transfers: int = 0
    """Tensors made on the CPU that the device is given."""
    synchronisations: int = 0
    """Waits for the device: its numbers are copied to the CPU, or decide a shape."""

    def watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.operators += 1
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if isinstance(x, Placed)]
        if func is aten._to_copy.default:
            target = kwargs.get("device")
            if target is not None:
                self._copied(bool(on_device), torch.device(target).type != "cpu")
        elif func is aten.copy_.default:
            self._copied(isinstance(args[1], Placed), isinstance(args[0], Placed))
        elif func in INDEXED and on_device:
            indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
            self.transfers += sum(not isinstance(x, Placed) for x in indices)
            self.synchronisations += any(
                isinstance(x, Placed) and x.dtype in (torch.bool, torch.uint8) for x in indices
            )
        elif on_device and func.overloadpacket.__name__ in _WAITED_FOR:
            self.synchronisations += 1

    def _copied(self, from_device: bool, to_device: bool) -> None:
        self.transfers += to_device and not from_device
        self.synchronisations += from_device and not to_device

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        return (
            f"operators {self.operators:,}, transfers {self.transfers:,}, "
            f"synchronisations {self.synchronisations:,}"
        )


def counted(work: Callable[[], Any]) -> Counts:
    """What the host does for `work`, within `two_gpus`."""
    counts = Counts()
    with watched(counts.watch):
        work()
    return counts


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as one operator, as CUDA runs it; the CPU has one, too."""
    assert not enable_gqa
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed, attn_mask = attn_mask, torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask.masked_fill_(~allowed, float("-inf"))
    answer: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return answer


def count(made: Bench) -> dict[str, Counts]:
    """By stage; each is one batch of all records.

    An evaluation of v*'s loss and a decoded token are what one more of them adds.
    """
    model, records = made.engine, made.records
    unedited = [Edit(record.request) for record in records]

    def edit(steps: int) -> list[Edit]:
        value = replace(made.settings.value, steps=steps, stop_below=0)
        settings = replace(made.settings, value=value)
        editor = Rome(model, settings, made.templates, made.solver, _ONE_BATCH)
        return editor.edit([record.request for record in records])

    def write(tokens: int) -> None:
        settings = replace(made.generation, max_tokens=tokens)
        starts = generation.record_starts(model, records)
        generation.generate(model, starts, edits, settings, _ONE_BATCH)

    attention = mock.patch.object(
        torch.nn.functional, "scaled_dot_product_attention", fused_attention
    )
    with two_gpus("cuda"), attention:
        place(model)
        edits = edit(1)
        longest = max(
            len(row.ids) for record in records for row in model.encode(record.generation_prompts)
        )
        return {
            "an evaluation of v*'s loss": counted(lambda: edit(4)) - counted(lambda: edit(3)),
            "a decoded token": (
                counted(lambda: write(longest + 3)) - counted(lambda: write(longest + 2))
            ),
            "a batch of scores": counted(
                lambda: probabilities.score_records(model, records, edits, _ONE_BATCH)
            ),
            "a batch of scores, unedited": counted(
                lambda: probabilities.score_records(model, records, unedited, _ONE_BATCH)
            ),
            "a batch of greedy answers": counted(
                lambda: greedy.say_records(model, records, edits, _ONE_BATCH)
            ),
        }


def build(shape: str, records: int) -> Bench:
    """The bench of a shape (a name of NARROW, or the JSON of a config), random and small."""
    values = bench.NARROW.get(shape)
    return bench.build(
        source="",
        random=shape if values is None else json.dumps(values),
        records_file=None,
        records=records,
        oracle_records=0,
        layer=None if values is None else bench.published_layer(shape),
        dtype="float32",
        device="cpu",
    )


def lines(counts: dict[str, Counts]) -> Sequence[str]:
    return [f"count {stage}: {found}" for stage, found in counts.items()]
