"""The families of models that can be edited, and where each keeps what an editor needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """The attribute paths in a family of models that an editor needs.

    `transposed` says that weights are stored [in, out] (GPT-2's Conv1D) instead of [out, in].
    """

    base: str
    layers: str
    up_projection: str
    """The MLP's input projection; of a gated MLP the one beside the gate, or both in one."""
    down_projection: str
    attention: tuple[str, ...]
    """The projections that make queries, keys and values; one where a family has them fused."""
    attention_output: str
    gate_projection: str | None = None
    """The projection that makes a gated MLP's gate, where it is a module of its own."""
    gated: bool = False
    """The MLP's input is multiplied by a gate of it before the down-projection."""
    transposed: bool = False


_QKV = ("q_proj", "k_proj", "v_proj")
_LLAMA = Family(
    base="model",
    layers="layers",
    up_projection="mlp.up_proj",
    down_projection="mlp.down_proj",
    attention=tuple(f"self_attn.{name}" for name in _QKV),
    attention_output="self_attn.o_proj",
    gate_projection="mlp.gate_proj",
    gated=True,
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        base="transformer",
        layers="h",
        up_projection="mlp.c_fc",
        down_projection="mlp.c_proj",
        attention=("attn.c_attn",),
        attention_output="attn.c_proj",
        transposed=True,
    ),
    "gptj": Family(
        base="transformer",
        layers="h",
        up_projection="mlp.fc_in",
        down_projection="mlp.fc_out",
        attention=tuple(f"attn.{name}" for name in _QKV),
        attention_output="attn.out_proj",
    ),
    "gpt_neox": Family(
        base="gpt_neox",
        layers="layers",
        up_projection="mlp.dense_h_to_4h",
        down_projection="mlp.dense_4h_to_h",
        attention=("attention.query_key_value",),
        attention_output="attention.dense",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "olmo2": _LLAMA,
    "phi3": replace(
        _LLAMA,
        up_projection="mlp.gate_up_proj",
        gate_projection=None,
        attention=("self_attn.qkv_proj",),
    ),
}


# Logits are computed as hidden states times the head. These settings change them after that, unless
# they have the value that does nothing.
_HEAD = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


class UnsupportedModelError(ValueError):
    """The model computes something that this project does not know."""


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model, by its config.

    Raises UnsupportedModelError for mixtures of experts, unknown types, and settings that change
    logits after the head.
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
    for name, neutral in _HEAD.items():
        if (value := getattr(config, name, neutral)) not in (None, neutral):
            raise UnsupportedModelError(
                f"{name} must be {neutral}, because logits are computed as hidden states times the "
                f"head, got {value}; choose a model without it"
            )
    return FAMILIES[kind]
