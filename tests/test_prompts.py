"""From text to tokens: seams and subjects are found whatever the tokenizer does at them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers, processors

from rome.models import prompts
from tests.support import oracle, tiny

COUNTERFACT = Path(__file__).parents[2] / "shared" / "data" / "counterfact_1618.json"

PROMPTS = [
    "{} was born in",
    "The mother tongue of {} is",
    "Everyone admires {}",
    "The capital of {} is ",
    "東京タワー — {} — in 1890, naïve:",
    "Rome is not {}",
]
SUBJECTS = ["Bob", "Danielle Darrieux", "Žižek", "São Tomé", "東京タワー", "Rome", "1890", "a 💡"]
TARGETS = ["Paris", " Paris, France", "1890", "Ωmega", "東京"]


def encode(kind: str, prompt: str, subject: str, target: str) -> tuple[prompts.Encoded, str]:
    filled = prompt.replace("{}", subject)
    (row,) = prompts.encode(tiny.tokenizer(kind), [prompts.with_target(filled, target)])
    return row, filled


@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_byte_level_tokens_are_the_references(kind: str, prompt: str) -> None:
    tokenizer = tiny.tokenizer(kind)
    for subject in SUBJECTS:
        for target in TARGETS:
            row, filled = encode(kind, prompt, subject, target)
            before, after = oracle.prompt_and_target(tokenizer, filled, target.strip())
            assert row.ids == before + after
            assert prompts.target_start(row, filled) == len(before)
            last = oracle.subject_last(tokenizer, prompt, subject)
            assert prompts.subject_last(row, prompt, subject) == last


@pytest.mark.parametrize("kind", ["plain", "bos", "metaspace", "merging"])
@pytest.mark.parametrize("prompt", [*PROMPTS, "Of “{}” one says", "{}{{ is", "{}, Rome, Rome"])
def test_tokens_are_found_by_the_text_they_end(kind: str, prompt: str) -> None:
    """The subject's last token ends no earlier than the subject, and the one before it does.

    The target's tokens begin no later than the target, and the next ones do.
    """
    for subject in SUBJECTS:
        row, filled = encode(kind, prompt, subject, "Paris")
        at = prompts.subject_last(row, prompt, subject)
        end = prompt.index("{}") + len(subject)
        assert not row.special[at]
        assert row.spans[at][0] < end <= row.spans[at][1]
        # Of several tokens in one character the last is taken.
        assert all(start >= end or stop < end for start, stop in row.spans[at + 1 :])

        start, seam = prompts.target_start(row, filled), len(filled.rstrip(" "))
        assert row.spans[start][1] > seam
        assert all(stop <= seam for _, stop in row.spans[:start])
        text = prompts.with_target(filled, "Paris")
        assert text[row.spans[start][0] :].endswith("Paris")
        assert len(row.ids) > start >= at


def test_a_token_over_the_seam_belongs_to_the_target() -> None:
    tokenizer = tiny.tokenizer("merging")
    row, filled = encode("merging", "The capital of {} is", "Bob", "Paris")
    start = prompts.target_start(row, filled)
    assert tokenizer.convert_ids_to_tokens(row.ids[start:]) == ["▁is▁", "Paris"]


def test_metaspace_target_begins_with_its_space() -> None:
    tokenizer = tiny.tokenizer("metaspace")
    row, filled = encode("metaspace", "The capital of {} is ", "Bob", "Paris")
    start = prompts.target_start(row, filled)
    assert tokenizer.convert_ids_to_tokens(row.ids[start:]) == ["▁Paris"]


def test_an_empty_target_is_refused() -> None:
    row, filled = encode("plain", "{} is", "Bob", "")
    row = prompts.Encoded(row.ids[:-1], row.spans[:-1], row.special[:-1])
    with pytest.raises(ValueError, match="is the target empty"):
        prompts.target_start(row, filled)


@pytest.mark.skipif(not COUNTERFACT.exists(), reason="COUNTERFACT is not beside the repository")
def test_real_prompts_have_the_references_tokens() -> None:
    """All of 1,618 COUNTERFACT prompts with the tokenizer of SmolLM2."""
    tokenizer = tiny.smollm2().tokenizer
    facts = [row["requested_rewrite"] for row in json.loads(COUNTERFACT.read_text())]
    filled = [fact["prompt"].replace("{}", fact["subject"]) for fact in facts]
    texts = [
        prompts.with_target(text, fact["target_new"]["str"])
        for text, fact in zip(filled, facts, strict=True)
    ]
    for row, text, fact in zip(prompts.encode(tokenizer, texts), filled, facts, strict=True):
        before, after = oracle.prompt_and_target(tokenizer, text, fact["target_new"]["str"])
        assert row.ids == before + after
        assert prompts.target_start(row, text) == len(before)
        last = oracle.subject_last(tokenizer, fact["prompt"], fact["subject"])
        assert prompts.subject_last(row, fact["prompt"], fact["subject"]) == last


def test_pad_aligns_columns_and_counts_each_rows_own_tokens() -> None:
    batch = prompts.pad([[7, 8, 9], [5], [3, 4]], "cpu", [2, 0, 0])
    assert batch.ids_BT.tolist() == [[7, 8, 9, 7], [5, 5, 5, 5], [3, 3, 3, 4]]
    assert batch.mask_BT.tolist() == [[1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    real = batch.mask_BT.bool()
    assert batch.positions_BT[real].tolist() == [0, 1, 2, 0, 0, 1]
    assert batch[torch.tensor([2])].ids_BT.tolist() == [[3, 3, 3, 4]]


def test_context_templates_hold_one_pair_of_braces() -> None:
    templates = prompts.context_templates(["a {} b", "if (x) {y"])
    assert templates == ["{}", "a    b. {}", "if (x)  y. {}"]


def test_what_a_tokenizer_adds_after_a_text_is_no_part_of_it() -> None:
    plain, ending = tiny.tokenizer("bos"), tiny.tokenizer("bos")
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tiny.BOS} $A {tiny.END}", special_tokens=[(tiny.BOS, 1), (tiny.END, 0)]
    )
    texts = ["The capital of France is Paris", "", f"It said {tiny.END}"]
    assert ending(texts[0])["input_ids"][-1] == 0
    assert prompts.encode(ending, texts) == prompts.encode(plain, texts)
    # One that stands in the text is the text's.
    assert prompts.encode(ending, texts)[2].ids[-1] == 0


def normalized(form: Any, text: str) -> str:
    return unicodedata.normalize(form, text)


@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("subject", ["Huế", "한국", "が", "Ångström", "Zoë Ö"])
def test_decomposed_letters_are_found_where_a_tokenizer_composes_them(
    kind: str, subject: str
) -> None:
    """As all of Qwen's do."""
    plain, composing = tiny.tokenizer(kind), tiny.tokenizer(kind)
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    places = []
    for form, tokenizer in (("NFC", plain), ("NFC", composing), ("NFD", composing)):
        prompt, name = (normalized(form, s) for s in ("Où est {} né ?", subject))
        filled = prompt.replace("{}", name)
        (row,) = prompts.encode(tokenizer, [prompts.with_target(filled, "Rome")])
        places.append(
            (
                row.ids,
                prompts.subject_last(row, prompt, name),
                prompts.subject_tokens(row, prompt, name),
                prompts.target_start(row, filled),
            )
        )
    assert places[1] == places[0]
    assert places[2] == places[0]
