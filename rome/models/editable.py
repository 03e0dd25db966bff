"""An editable model: a dense decoder, its tokenizer, and where its facts live.

Legend: B rows, T tokens, D hidden size, K key size (input of the down-projection), V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rome.data.records import RecordError
from rome.models import attention, kernels
from rome.models.families import UnsupportedModelError, family_of
from rome.models.prompts import Encoded, Text, encode, target_start, with_target


class EditableModel:
    """A causal language model whose layers' MLP down-projections can be read and edited.

    Weights never require gradients; editors differentiate with respect to what they add.
    """

    def __init__(self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.family = family_of(hf.config)
        if not tokenizer.is_fast:
            raise UnsupportedModelError(
                f"{name}: the tokenizer must be a fast one (subjects are found by character "
                f"offsets), got {type(tokenizer).__name__}; convert it with transformers"
            )
        self.hf = hf.eval().requires_grad_(False)
        self.base.register_forward_hook(self._to_home)
        self.base.register_forward_pre_hook(self._without_cudnn)
        self.base.register_forward_hook(self._with_cudnn_as_before, always_call=True)
        attention.install(hf)
        kernels.fuse(hf)
        if hf.device.type == "cuda":
            kernels.give_room(hf)
        self.tokenizer = tokenizer
        self.name = name
        # The first call sets padding and truncation, which no thread may while another one encodes.
        self.encode(["a"])

    @property
    def device(self) -> torch.device:
        """The device of token ids, last hidden states, logits and edits.

        A layer may lie on another, and what it is given goes there.
        """
        return self.hf.get_input_embeddings().weight.device

    def _to_home(self, base: nn.Module, args: Any, output: Any) -> None:
        output.last_hidden_state = output.last_hidden_state.to(self.device)

    def _without_cudnn(self, base: nn.Module, args: Any) -> None:
        # cuDNN's attention builds a plan for each new shape, and here nearly every pass has one:
        # on an H200 that was 35 to 46 % of the host's time. Passes do not nest.
        self._cudnn_before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)

    def _with_cudnn_as_before(self, base: nn.Module, args: Any, output: Any) -> None:
        torch.backends.cuda.enable_cudnn_sdp(self._cudnn_before)

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @cached_property
    def base(self) -> nn.Module:
        """The decoder without its language-model head."""
        return self.hf.get_submodule(self.family.base)

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.base.get_submodule(self.family.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def module_name(self, layer: int, path: str) -> str:
        """Name in the model of the module at `path` in `layer`, counted from 0.

        Raises ValueError for a layer that is not there.
        """
        if not 0 <= layer < len(self.layers):
            raise ValueError(
                f"{self.name}: layer must be from 0 to {len(self.layers) - 1}, got {layer}"
            )
        return f"{self.family.base}.{self.family.layers}.{layer}.{path}"

    def down_projection(self, layer: int) -> nn.Module:
        """The module K -> D that stores the associations of `layer`, counted from 0."""
        return self.hf.get_submodule(self.module_name(layer, self.family.down_projection))

    def weight_name(self, layer: int) -> str:
        """Name of the down-projection's weight in the model's state dict."""
        return f"{self.module_name(layer, self.family.down_projection)}.weight"

    def sizes(self, weight: str) -> tuple[int, int]:
        """Output and input size (D, K) of a weight by name, whatever its layout; of a bias (D, 1).

        Raises AttributeError where there is no such weight.
        """
        shape = self.hf.get_parameter(weight).shape
        if len(shape) == 1:
            return shape[0], 1
        first, second = shape
        return (second, first) if self.family.transposed else (first, second)

    def weight(self, name: str) -> Tensor:
        """A weight as it is now, [D, K] whatever its layout, detached; a bias as [D, 1].

        Raises AttributeError where there is no such weight.
        """
        weight = self.hf.get_parameter(name).detach()
        if self.family.transposed and weight.dim() > 1:
            weight = weight.T
        return weight.reshape(self.sizes(name))

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Final hidden states (after the last norm) to logits [B, V], in float32 or wider."""
        logits = kernels.logits(self.hf, hidden_BD).to(self.device)
        return logits if logits.dtype == torch.float64 else logits.float()

    @cached_property
    def start_ids(self) -> list[int]:
        """The one-token text from which free text is sampled: `<|endoftext|>`, else BOS or EOS."""
        tokenizer = self.tokenizer
        found = tokenizer.get_vocab().get("<|endoftext|>")
        for token_id in (found, tokenizer.bos_token_id, tokenizer.eos_token_id):
            if token_id is not None:
                return [token_id]
        raise ValueError(f"{self.name}: the tokenizer has neither <|endoftext|>, BOS nor EOS")

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text: those of the tokenizer's map, added tokens that are marked
        special, and all that end an answer by the generation config."""
        ends = getattr(self.hf.generation_config, "eos_token_id", None)
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(
            [
                *self.tokenizer.all_special_ids,
                *(token_id for token_id, token in added if token.special),
                *(ends if isinstance(ends, list) else [] if ends is None else [ends]),
            ]
        )

    def without_special(self, ids: Sequence[int]) -> list[int]:
        return [token_id for token_id in ids if token_id not in self.special_ids]

    def fingerprint(self, rounded: torch.dtype | None = None) -> str:
        """Hash of all weights: equal if and only if (but for chance) every bit is equal.

        `rounded`: of the weights as this dtype has them: bfloat16 gives a model in float32 and
        the same one in bfloat16 one hash.
        """
        digest = hashlib.sha256()
        for name, parameter in self.hf.named_parameters():
            weight = parameter if rounded is None else parameter.to(rounded)
            line = f"{name} {weight.dtype} {tuple(weight.shape)} {checksum(weight)}\n"
            digest.update(line.encode())
        return digest.hexdigest()

    @cached_property
    def origin(self) -> str:
        """The fingerprint of the weights as they were loaded, rounded to bfloat16: what is trained
        for a model says that it belongs to it by this. Hashed once."""
        return self.fingerprint(torch.bfloat16)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Tokens of whole texts. Raises RecordError for one beyond the model's positions."""
        encoded = encode(self.tokenizer, texts)
        limit = self.hf.config.max_position_embeddings
        for text, row in zip(texts, encoded, strict=True):
            if len(row.ids) > limit:
                raise RecordError(
                    f"a text must fit into {self.name}'s {limit} positions, got {len(row.ids)} "
                    f"tokens: '{text[:60]}...'; shorten it or leave its record out"
                )
        return encoded

    def encode_targets(self, asked: Sequence[tuple[str, str, str]]) -> list[Text]:
        """The tokens in which each (prompt, target, separator) is scored.

        Raises RecordError as `encode` does, and where no token comes before the target.
        """
        encoded = self.encode([with_target(*one) for one in asked])
        texts = []
        for (prompt, _, _), row in zip(asked, encoded, strict=True):
            start = target_start(row, prompt)
            if start == 0:
                raise RecordError(f"a target needs a token before it, got the prompt {prompt!r}")
            texts.append(Text(row.ids, start))
        return texts

    def attention_mask(
        self, sees_BQT: Tensor, positions_BQ: Tensor, key_positions_BT: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """The mask for `run` in which token `i` sees `j` if the bool `sees_BQT[b, i, j]` is true.

        A model's sliding window is counted in positions: of the tokens that see, and of those that
        are seen, if they are others.
        """
        config = self.hf.config

        def additive(allowed_BQT: Tensor) -> Tensor:
            mask_BQT = torch.zeros(allowed_BQT.shape, dtype=self.dtype, device=allowed_BQT.device)
            return mask_BQT.masked_fill_(~allowed_BQT, torch.finfo(self.dtype).min)[:, None]

        if (window := getattr(config, "sliding_window", None)) is None:
            return additive(sees_BQT)
        if key_positions_BT is None:
            key_positions_BT = positions_BQ
        near_BQT = positions_BQ[:, :, None] - key_positions_BT[:, None] < window
        windowed = additive(sees_BQT & near_BQT)
        if not hasattr(config, "layer_types"):  # The window is that of all layers.
            return windowed
        return {"full_attention": additive(sees_BQT), "sliding_attention": windowed}

    def run(
        self,
        ids_BT: Tensor,
        mask: Tensor | dict[str, Tensor],
        positions_BT: Tensor | None = None,
        cache: Cache | None = None,
        base: nn.Module | None = None,
    ) -> Tensor:
        """One pass: the last hidden states [B, T, D].

        `mask`: of tokens, those in `cache` included, or as `attention_mask` makes it. `cache`: see
        `rome.models.caches`. `base`: a part of the decoder instead of all of it.
        """
        hidden_BTD: Tensor = (base or self.base)(
            input_ids=ids_BT,
            attention_mask=mask,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden_BTD

    def on_entering(self, layer: int, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Show `see` the hidden states [B, T, D] that enter a layer in each pass."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(args[0] if args else kwargs["hidden_states"])

        return self.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)

    def on_leaving(self, layer: int, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Show `see` the hidden states [B, T, D] that leave a layer in each pass."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            see(output[0] if isinstance(output, tuple) else output)

        return self.layers[layer].register_forward_hook(hook)

    def only_layers(self, start: int, injected_BTD: Tensor | None = None) -> nn.Module:
        """The decoder with layers before `start` skipped and `injected_BTD` entering `start`.

        Token ids must still be given (their values do not matter): they carry the shape. With
        `start` 0 the embeddings enter as always and nothing may be injected.
        """
        if (start == 0) != (injected_BTD is None):
            raise ValueError(f"hidden states enter layer {start} only from a layer before it")
        head = [_Entry(injected_BTD, layer) for layer in self.layers[:start]]
        return self._with_layers(nn.ModuleList([*head, *self.layers[start:]]))

    def up_to(self, layer: int) -> nn.Module:
        """The decoder without the layers after `layer`; what it answers is of use to nobody but
        hooks, since the final norm follows a layer that it was not made for."""
        return self._with_layers(self.layers[: layer + 1])

    def _with_layers(self, layers: nn.ModuleList) -> nn.Module:
        base = copy.copy(self.base)
        # Where accelerate moves a module's inputs, its `forward` is one bound to the original.
        base.__dict__.pop("forward", None)
        base._modules = dict(base._modules)
        base._modules[self.family.layers] = layers
        return base


class _Entry(nn.Module):
    """Stands for a skipped layer and answers with the hidden states that enter the next one."""

    def __init__(self, hidden_BTD: Tensor | None, replaced: nn.Module) -> None:
        super().__init__()
        self.hidden_BTD = hidden_BTD
        # Some families choose the attention mask by this attribute of the layer.
        self.attention_type = getattr(replaced, "attention_type", "full_attention")
        self.returns_tuple = type(replaced).__name__ in _TUPLE_BLOCKS

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.hidden_BTD, None) if self.returns_tuple else self.hidden_BTD


# Blocks that answer (hidden states, attention weights) instead of hidden states alone.
_TUPLE_BLOCKS = {"GPTJBlock"}


def checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of a tensor's bits which sees every change of a bit or of an order."""
    # At most 32 bits a number: the low bits of wider ones would be alike, and changes would cancel.
    bits = {1: torch.uint8, 2: torch.int16}
    flat = tensor.detach().contiguous().view(-1).view(bits.get(tensor.element_size(), torch.int32))
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    # A processor keeps a chunk and its weights in its cache; a GPU would rather start few kernels.
    size = 1 << 17 if flat.device.type == "cpu" else 1 << 22
    # Odd weights are invertible modulo 2^64, so no single change can cancel. That of an element at
    # `start + i` is `(start + i) * _ODD | 1`, which is `start * _ODD` more than that at `i`: both
    # are even or odd together, since chunks start at even places.
    weights = torch.arange(min(size, flat.numel()), device=flat.device) * _ODD | 1
    for start in range(0, flat.numel(), size):
        chunk = flat[start : start + size].to(torch.int64)
        total += chunk.sum() * ((start * _ODD + 2**63) % 2**64 - 2**63)
        total += chunk.mul_(weights[: len(chunk)]).sum()
    return int(total)


_ODD = 0x5851F42D4C957F2D
