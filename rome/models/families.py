"""The families of models that can be edited, and where each keeps what an editor needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """Where a family of models keeps what an editor needs, as attribute paths.

    `transposed` says that weights are stored [in, out] (GPT-2's Conv1D) instead of [out, in].
    """

    base: str
    layers: str
    up_projection: str
    """Where the MLP's input enters; of a gated MLP the one beside the gate, or both in one."""
    down_projection: str
    attention: tuple[str, ...]
    """The projections that make queries, keys and values; one where a family has them fused."""
    attention_output: str
    gated: bool = False
    """The MLP's input is multiplied by a gate of it before the down-projection."""
    transposed: bool = False


_QKV = ("q_proj", "k_proj", "v_proj")
_LLAMA = Family(
    "model",
    "layers",
    "mlp.up_proj",
    "mlp.down_proj",
    tuple(f"self_attn.{name}" for name in _QKV),
    "self_attn.o_proj",
    gated=True,
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "transformer",
        "h",
        "mlp.c_fc",
        "mlp.c_proj",
        ("attn.c_attn",),
        "attn.c_proj",
        transposed=True,
    ),
    "gptj": Family(
        "transformer",
        "h",
        "mlp.fc_in",
        "mlp.fc_out",
        tuple(f"attn.{name}" for name in _QKV),
        "attn.out_proj",
    ),
    "gpt_neox": Family(
        "gpt_neox",
        "layers",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
        ("attention.query_key_value",),
        "attention.dense",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "olmo2": _LLAMA,
    "phi3": replace(_LLAMA, up_projection="mlp.gate_up_proj", attention=("self_attn.qkv_proj",)),
}


class UnsupportedModelError(ValueError):
    """The model has no single MLP down-projection per layer that this project knows."""


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model, by its config.

    Raises UnsupportedModelError for mixtures of experts and for unknown types.
    """
    kind = config.model_type
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        raise UnsupportedModelError(
            f"model type '{kind}' is a mixture of {experts} experts: it has no single "
            "down-projection per layer to edit; choose a dense model"
        )
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"model type must be one of {', '.join(sorted(FAMILIES))}, got '{kind}'; a dense "
            "decoder with one MLP down-projection can be added to rome.models.families.FAMILIES"
        )
    return FAMILIES[kind]
