"""Settings against the model: refused by the driver, before a worker boots."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.runs.config import RunConfig
from rome.models import EditableModel, chat
from rome.options import ConfigError


def refuse_what_does_not_fit(config: RunConfig, outline: EditableModel) -> None:
    """Raises ConfigError with each key that no record of this model could survive."""
    checks = (_template, _numbers, _layers)
    if wrong := [text for check in checks for text in check(config, outline)]:
        raise ConfigError("\n".join(wrong))


def _template(config: RunConfig, outline: EditableModel) -> Iterator[str]:
    if config.prompt_template != "raw":
        try:
            chat.template(outline.tokenizer)
        except ValueError as error:
            yield str(error)


def _numbers(config: RunConfig, outline: EditableModel) -> Iterator[str]:
    positions = outline.hf.config.max_position_embeddings
    vocabulary = outline.hf.config.vocab_size
    limits = [
        (f"templates.lengths: {tokens} tokens", tokens, positions, "positions")
        for tokens, _ in config.templates.lengths
    ]
    if generation := config.scoring.generation:
        limits += [
            ("scoring.generation.max_tokens", generation.max_tokens, positions, "positions"),
            ("scoring.generation.top_k", generation.top_k, vocabulary, "tokens"),
        ]
    if wild := config.scoring.wild:
        limits.append(("scoring.wild.max_tokens", wild.max_tokens, positions, "positions"))
    for key, value, most, what in limits:
        if value > most:
            yield f"{key} must be at most the {most:,} {what} of {outline.name}, got {value:,}"


def _layers(config: RunConfig, outline: EditableModel) -> Iterator[str]:
    for name in config.editors:
        _, settings = config.editor(name)
        one = getattr(settings, "layer", None)
        for layer in getattr(settings, "layers", ()) or ([] if one is None else [one]):
            try:
                outline.down_projection(layer)
            except ValueError as error:
                yield f"editors.{name}: {error}"
