"""The one decoding loop: what follows many prompts under many edits, in one batch with one cache.

On CUDA the host cannot launch a step as fast as the device does it. There a step is captured as a
graph and replayed, for which its shapes stay as they are over many columns of the cache.

Legend: B rows, T tokens of the cache's room, S tokens that are said, V vocabulary.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from rome.data.records import RecordError
from rome.edits.deltas import Edit, applied
from rome.models import EditableModel, caches, costs, memory, prompts

# A capture takes as long as some steps.
_WORTH_A_GRAPH = 8

_log = logging.getLogger(__name__)

Choose = Callable[[Tensor, Tensor], Tensor]
"""The next tokens [B, 1] of the first B rows, given their logits [B, V] and, as [B, 1], how many
tokens come before them."""


@dataclass(frozen=True)
class Row:
    """A prompt's tokens, the edit it runs under, and how many tokens are to follow."""

    ids: list[int]
    edit: int
    steps: int


@torch.inference_mode()
def continuations(
    model: EditableModel, rows: Sequence[Row], edits: Sequence[Edit], choose: Choose
) -> list[list[int]]:
    """The `steps` tokens that follow each row; the rows with the most steps come first.

    Rows that are complete leave the batch, or run on unread where that is cheaper. Raises
    RecordError for a text that is longer than the model's positions.
    """
    if not rows or rows[0].steps < 1:
        return [[] for _ in rows]
    limit = model.hf.config.max_position_embeddings
    longest = max(len(row.ids) + row.steps for row in rows if row.steps)
    if longest > limit + 1:  # The last token that is said needs no position.
        raise RecordError(
            f"a text must fit into {model.name}'s {limit} positions, got {longest} tokens; "
            "ask for shorter texts"
        )
    # Streams and graphs belong to the current device.
    with torch.cuda.device_of(model.hf.get_input_embeddings().weight):
        texts = _Texts(model, rows, edits, choose)
        for n, passes in groupby(texts.passes, lambda one: one.rows):
            with applied(model, [edits[row.edit] for row in rows[:n]]):
                for one in passes:
                    texts.run(one)
        said = texts.said_BS.tolist()
    return [ids[: row.steps] for ids, row in zip(said, rows, strict=True)]


@dataclass(frozen=True)
class _Passes:
    """So many passes of one shape: the first `rows` rows, which see the first `seen` columns."""

    rows: int
    seen: int
    times: int


def _passes(rows: Sequence[Row], prompt: int, device: torch.device) -> Iterator[_Passes]:
    grain = costs.of(device).columns
    done, steps = 1, [row.steps for row in rows]
    while done < steps[0]:
        column = prompt + done - 1
        seen = (column // grain + 1) * grain
        times = min(seen - column, steps[0] - done)
        yield _Passes(sum(s > done for s in steps), seen, times)
        done += times


class _Texts:
    """A batch of texts, and the step that adds a token to each: all that it changes, and reads to
    do so, stays where it is on the device."""

    def __init__(
        self, model: EditableModel, rows: Sequence[Row], edits: Sequence[Edit], choose: Choose
    ) -> None:
        self.model, self.choose = model, choose
        device = model.device
        lengths = [len(row.ids) for row in rows]
        # Prompts end in one column, so that each step fills one column of one cache.
        batch = prompts.pad([row.ids for row in rows], device, lengths)
        prompt = max(lengths)
        self.passes = list(_passes(rows, prompt, device))
        T = self.passes[-1].seen if self.passes else prompt
        self.column_T = torch.arange(T, device=device)
        begin_B1 = torch.tensor([[prompt - length] for length in lengths]).to(device)
        self.real_BT = self.column_T >= begin_B1
        self.key_positions_BT = (self.column_T - begin_B1).clamp(min=0)
        self.column_1 = torch.full((1,), prompt, device=device)
        self.step_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.position_B1 = batch.positions_BT[:, -1:].clone()
        self.said_BS = batch.ids_BT.new_zeros(len(rows), rows[0].steps)
        self.pool: Any = torch.cuda.graph_pool_handle() if _can_be_captured(model) else None
        self.graphs: list[torch.cuda.CUDAGraph] = []
        """Kept until the device is done with them."""
        logits_BV, self.room = _prefill(model, rows, edits, T)
        self.next_B1 = choose(logits_BV, self.position_B1 + 1)
        self._keep(self.next_B1)

    def _keep(self, next_B1: Tensor) -> None:
        n, limit = len(next_B1), self.model.hf.config.max_position_embeddings
        self.next_B1[:n] = next_B1
        self.said_BS[:n].index_copy_(1, self.step_1, next_B1)
        # What runs on unread may have no position left.
        self.position_B1.add_(1).clamp_(max=limit - 1)
        self.step_1.add_(1)

    def run(self, passes: _Passes) -> None:
        """Add `passes.times` tokens to each of the rows."""

        def step() -> None:
            self._step(passes.rows, passes.seen)

        self.room.at(self.column_1, passes.rows, passes.seen)
        left, advance = passes.times, step
        if self.pool is not None and left >= _WORTH_A_GRAPH:
            if not self.graphs:
                step()  # Libraries begin to work outside of a capture.
                left -= 1
            if graph := _captured(step, self.pool):
                self.graphs.append(graph)
                advance = graph.replay
            else:
                _UNCAPTURED.add(self.model)
                self.pool = None
        for _ in range(left):
            advance()

    def _step(self, n: int, seen: int) -> None:
        model, position_B1 = self.model, self.position_B1[:n]
        sees_BT = self.real_BT[:n, :seen] & (self.column_T[:seen] <= self.column_1)
        mask = model.attention_mask(sees_BT[:, None], position_B1, self.key_positions_BT[:n, :seen])
        hidden_B1D = model.run(self.next_B1[:n], mask, position_B1, self.room)
        self._keep(self.choose(model.logits(hidden_B1D[:, 0]), position_B1 + 1))
        self.column_1.add_(1)


def _prefill(
    model: EditableModel, rows: Sequence[Row], edits: Sequence[Edit], length: int
) -> tuple[Tensor, caches.Room]:
    """Logits [B, V] after each prompt, and the cache; equal prompts under one edit run once."""
    place: dict[tuple[int, tuple[int, ...]], int] = {}
    place_B = [place.setdefault((row.edit, tuple(row.ids)), len(place)) for row in rows]
    distinct = list(place)
    prompt_ids = [ids for _, ids in distinct]
    batch = prompts.pad(prompt_ids, model.device, [len(ids) for ids in prompt_ids])
    cache = caches.recording()
    with applied(model, [edits[edit] for edit, _ in distinct]):
        hidden_BTD = model.run(batch.ids_BT, batch.mask_BT, batch.positions_BT, cache)
    which_B = torch.tensor(place_B).to(model.device)
    room = caches.Room(caches.recorded(cache), which_B, length)
    return model.logits(hidden_BTD[:, -1])[which_B], room


def _captured(step: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph | None:
    """The step as a graph, which has not run yet; None where it cannot be captured."""
    graph, stream = torch.cuda.CUDAGraph(), _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    collects = gc.isenabled()
    gc.disable()  # What it would free belongs to other streams.
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
    except Exception as error:
        if memory.out_of_memory(error):
            raise
        _log.warning(
            "a step of decoding cannot be captured as a CUDA graph, so texts take longer: %s", error
        )
        return None
    finally:
        if collects:
            gc.enable()
        torch.cuda.current_stream().wait_stream(stream)
    return graph


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """For captures: libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


# Models whose step failed to be captured once; they are not asked again.
_UNCAPTURED: WeakSet[EditableModel] = WeakSet()


def _can_be_captured(model: EditableModel) -> bool:
    """All of it on one GPU, and nothing in it that reads numbers on the host."""
    config = model.hf.config
    spread = len(set(getattr(model.hf, "hf_device_map", {}).values())) > 1
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    reads = "dynamic" in str(rope)
    return model.device.type == "cuda" and not (spread or reads or model in _UNCAPTURED)
