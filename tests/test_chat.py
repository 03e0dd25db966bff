"""Prompts in a tokenizer's chat template: where the subject is, what is edited, what is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rome import models
from rome.data.records import Record, Request
from rome.edits.deltas import Edit
from rome.evaluation import evaluate
from rome.models import EditableModel, chat, prompts
from rome.scoring import released
from rome.scoring.generation import UNEDITED
from rome.scoring.probabilities import Query, score
from rome.scoring.settings import PromptTemplate, ScoringSettings, WildSettings
from tests.support import tiny
from tests.support.computations import RECORDS
from tests.support.tiny import REQUESTS

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content | trim }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def chatting(kind: str, template: str = TEMPLATE) -> EditableModel:
    model = tiny.model("llama", tokenizer_kind=kind)
    model.tokenizer.chat_template = template
    return model


@pytest.mark.parametrize("kind", ["plain", "bos", "metaspace"])
def test_the_subject_is_found_within_the_template(kind: str) -> None:
    model = chatting(kind)
    turn = chat.template(model.tokenizer)
    for request in REQUESTS:
        template = turn(request.prompt)
        (encoded,) = model.encode([template.replace("{}", request.subject)])
        ids = encoded.ids
        last = prompts.subject_last(encoded, template, request.subject)
        end = template.index("{}") + len(request.subject)
        start, stop = encoded.spans[last]
        assert start < end <= stop
        assert ids.count(model.tokenizer.bos_token_id) == 1
        assert ids.count(model.tokenizer.eos_token_id) == 1


class Keeping:
    """An editor that changes nothing and keeps what it is to edit."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def edit(self, requests: Any) -> list[Edit]:
        self.asked += requests
        return [Edit(request) for request in requests]


def edited_and_scored(
    model: EditableModel, record: Record, template: PromptTemplate
) -> tuple[Request, dict[str, Any]]:
    editor = Keeping()
    settings = ScoringSettings(generation=None, wild=WildSettings(form="qa", max_tokens=4))
    (row,), _ = evaluate(model, editor, [record], settings, None, 400, prompt_template=template)
    return editor.asked[0], row


@pytest.mark.parametrize("template", ["raw", "chat", "chat_edits", "chat_probes"])
def test_edits_and_what_is_asked_are_in_the_template_where_the_run_says(
    template: PromptTemplate,
) -> None:
    model = chatting("bos")
    record = replace(RECORDS[0], relation_id=None)
    request, row = edited_and_scored(model, record, template)
    edits, asks = template in ("chat", "chat_edits"), template in ("chat", "chat_probes")
    turn = f"[user]\n{record.prompt}<|endoftext|>\n[assistant]\n"
    assert request.prompt == (turn if edits else record.prompt)
    assert request.separator == ("" if edits else " ")
    text, separator = record.request.text, " "
    if asks:
        text, separator = f"[user]\n{text}<|endoftext|>\n[assistant]\n", ""
    query = Query(0, text, record.target_new, separator)
    (expected,) = score(model, [query], [UNEDITED], 400)
    assert row["rewrite_nll_new"] == pytest.approx([expected.nll], rel=1e-9)
    assert row["prompt_template"] == template
    assert row["prompt"] == record.prompt
    # These are no turns of a chat.
    assert ("neighborhood_plus_nll_new" in row) is not asks


@pytest.mark.parametrize("template", ["raw", "chat"])
def test_the_released_shares_are_of_what_is_asked(
    template: PromptTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have a space before the target, which a turn of a chat has not."""
    seen: list[Record] = []
    shares = released.accuracies

    def seeing(model: EditableModel, records: Any, *rest: Any) -> Any:
        seen.extend(records)
        return shares(model, records, *rest)

    monkeypatch.setattr(released, "accuracies", seeing)
    edited_and_scored(chatting("bos"), RECORDS[0], template)
    assert [record.separator for record in seen] == [" " if template == "raw" else ""]


def test_a_template_that_spoils_prompts_and_a_tokenizer_without_one_are_refused() -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        chat.template(tiny.tokenizer("plain"))
    turn = chat.template(chatting("plain", "{} {{ messages[0].content }}").tokenizer)
    with pytest.raises(ValueError, match="must hold a prompt as it is"):
        turn("{} is in")


@pytest.mark.model
def test_a_real_template() -> None:
    model = models.load(tiny.SMOLLM2, "float32")
    turn = chat.template(model.tokenizer)
    prompt = turn("The mother tongue of {} is")
    assert prompt.endswith("<|im_start|>assistant\n")
    (encoded,) = model.encode([prompt.replace("{}", "Danielle Darrieux")])
    last = prompts.subject_last(encoded, prompt, "Danielle Darrieux")
    assert str(model.tokenizer.decode(encoded.ids[: last + 1])).endswith("Danielle Darrieux")
    assert torch.isfinite(model.hf(torch.tensor([encoded.ids])).logits).all()
