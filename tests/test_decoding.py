"""Decoding with shapes that stay says the same as with shapes that grow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rome.models import costs
from rome.scoring import decoding, generation
from rome.scoring.decoding import Row
from rome.scoring.settings import GenerationSettings
from tests.support import tiny
from tests.support.two_gpus import costs_like


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "mistral"])
def test_static_shapes_say_what_growing_ones_say(family: str) -> None:
    model = tiny.model(family, "float64")
    texts = ["Paris", "The mother tongue of Danielle Darrieux is", "Rome is in"]
    rows = generation.starts(model, texts, 0, case_id=7)
    settings = GenerationSettings(max_tokens=40)

    def said() -> list[list[int]]:
        return generation.generate(model, rows, [generation.UNEDITED], settings, 1000)

    growing = said()
    assert all(len(ids) == 40 for ids in growing)
    with costs_like("cuda", "cpu"):
        assert said() == growing


def test_a_text_ends_at_the_last_position_while_others_go_on() -> None:
    """A row that is complete runs on unread, where the model has no position for its tokens."""
    model = tiny.model("gpt2", "float64")
    limit = model.hf.config.max_position_embeddings
    rows = [Row([5, 6, 7], 0, 20), Row([8] * (limit - 2), 0, 3)]

    def likeliest(logits_BV: torch.Tensor, before_B1: torch.Tensor) -> torch.Tensor:
        return logits_BV.argmax(1, keepdim=True)

    def said(chosen: list[Row]) -> list[list[int]]:
        return decoding.continuations(model, chosen, [generation.UNEDITED], likeliest)

    alone = [said([row])[0] for row in rows]
    assert [len(ids) for ids in alone] == [20, 3]
    assert said(rows) == alone
    with costs_like("cuda", "cpu"):
        assert said(rows) == alone


def test_a_text_longer_than_the_models_positions_is_refused() -> None:
    model = tiny.model("llama", "float64")
    limit = model.hf.config.max_position_embeddings
    starts = generation.starts(model, ["Paris"], 0, case_id=7)

    def said(tokens: int) -> list[list[int]]:
        settings = GenerationSettings(max_tokens=tokens)
        return generation.generate(model, starts, [generation.UNEDITED], settings, 1000)

    assert len(said(limit + 1)[0]) == limit + 1
    with pytest.raises(ValueError, match=rf"{limit} positions, got {limit + 2} tokens"):
        said(limit + 2)


def test_rows_leave_when_they_are_complete_where_that_is_cheaper() -> None:
    rows = [Row([1], 0, 5), Row([1, 2], 0, 3), Row([1], 0, 1)]
    passes = list(decoding._passes(rows, 2, torch.device("cpu")))
    assert [(one.rows, one.seen) for one in passes] == [(2, 3), (2, 4), (1, 5), (1, 6)]
    with costs_like("cuda", "cpu"):
        costs.COSTS["cpu"] = replace(costs.COSTS["cpu"], columns=4)
        passes = list(decoding._passes(rows, 2, torch.device("cpu")))
    assert [(one.rows, one.seen, one.times) for one in passes] == [(2, 4, 2), (1, 8, 2)]
