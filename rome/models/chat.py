"""Prompts as a chat model is asked: the tokenizer's own template around each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rome.data.records import RecordError

# Some templates say today's date, which would change numbers from day to day; this is the one that
# Llama 3's say where they know none.
_DATE = "26 Jul 2024"


def template(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """What makes of a prompt a user's turn, after which the assistant's begins: text, in which the
    tokenizer finds its special tokens again. A BOS that it adds itself is left out.

    Raises ValueError where the tokenizer has no template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"prompt_template must be raw: {type(tokenizer).__name__} of this model has no chat "
            "template"
        )
    bos = str(tokenizer.bos_token) if _adds_bos(tokenizer) else ""

    def turn(prompt: str) -> str:
        message = [{"role": "user", "content": prompt}]
        said: Any = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, date_string=_DATE
        )
        text = str(said).removeprefix(bos)
        if text.count("{}") != prompt.count("{}"):
            raise RecordError(
                f"the chat template must hold a prompt as it is, with its '{{}}', got {text!r}"
            )
        return text

    return turn


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    first = tokenizer("a")["input_ids"][0]
    return bool(first == tokenizer.bos_token_id)
