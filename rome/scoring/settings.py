"""Settings of scoring; without torch, so that a config is looked at before it."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from rome.data.wording import FORMS
from rome.settings import configurable


@configurable(top_k=1, max_tokens=2)
class GenerationSettings:
    """Settings of sampled texts (reference code: `generate_fast`)."""

    top_k: int = 5
    max_tokens: int = 100
    """Length of a text in tokens, prompt included; no stop at EOS."""
    seed: int = 0


PromptTemplate = Literal["raw", "chat", "chat_edits", "chat_probes"]
"""Which prompts stand in the tokenizer's chat template: none, all, those of the edits, or those of
what is asked."""


@configurable(max_tokens=(1, 10_000))
class WildSettings:
    """Settings of WILD."""

    form: str = "plain"
    """One of `rome.data.wording.FORMS`."""
    max_tokens: int = 50
    """Tokens that are said at most."""

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")


@configurable()
class ScoringSettings:
    """Settings of scoring."""

    generation: GenerationSettings | None = field(default_factory=GenerationSettings)
    """Null writes no texts, and so has no GE and RS."""
    strict: bool = True
    """Also decode greedy answers: ES_strict, PS_strict, NS_strict."""
    neighborhood_plus: bool = True
    """The neighborhood prompts once more, each after the edited sentence: NS_plus."""
    wild: WildSettings | None = None
    """Also decode as WILD does: ES_wild, PS_wild, NS_wild. Null does not."""
    reversed: bool = True
    """The reversed fact, where the relation has a prompt in configs/facts/reversed.yaml: RVS."""
