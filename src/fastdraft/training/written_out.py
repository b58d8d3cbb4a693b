"""The decoder of a draft with its layers written out (functional/layers.py), for training on a CPU.

Decides which decoders can be written out: those of Llama's build (norm, attention, norm, gated feed-forward, each added to the
stream) whose every module is of a known kind and whose config asks for nothing else: no dropout, no windows, SiLU. All others keep
their own modules. Decides too that the weights in the type of the matrix products are made once a step, not once a micro-batch.

It reads the module's own parameters, which stay where they are: saving, optimisers and checkpoints see no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdraft.functional.attention import Rotation
from fastdraft.functional.layers import AttentionHalf, AttentionShape, FeedForwardHalf, Products, RMSNorm

_FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Phi3RMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class Hidden(NamedTuple):
    """What a decoder gives."""

    last_hidden_state: Tensor
    """[B, T, D]."""


@dataclass
class Stacked:
    """Linear layers that read the same input, as one matrix in the type of the products; renewed when a weight has changed."""

    layers: Sequence[nn.Linear]
    _weight: Tensor | None = field(default=None, init=False)
    _bias: Tensor | None = field(default=None, init=False)
    _seen: tuple[object, ...] = field(default=(), init=False)

    @property
    def parameters(self) -> list[Tensor]:
        """Weights, then biases."""
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        return [*(layer.weight for layer in self.layers), *biases]

    @torch.no_grad()
    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The stacked weight [O, D] and bias [O]."""
        parameters = self.parameters
        seen = (dtype, *((parameter.data_ptr(), parameter._version) for parameter in parameters))
        if self._weight is None or seen != self._seen:
            count = len(self.layers)
            self._weight = _joined(parameters[:count], dtype, self._weight)
            self._bias = _joined(parameters[count:], dtype, self._bias) if len(parameters) > count else None
            self._seen = seen
        return self._weight, self._bias


def _joined(parts: Sequence[Tensor], dtype: torch.dtype, before: Tensor | None) -> Tensor:
    """One tensor of all rows, in the memory of `before` where that fits; the part itself where nothing is to be done."""
    if len(parts) == 1 and parts[0].dtype == dtype:
        return parts[0].detach()
    rows, rest = sum(part.shape[0] for part in parts), parts[0].shape[1:]
    fits = before is not None and before.dtype == dtype and before.shape == (rows, *rest)
    joined = (
        before
        if before is not None and fits
        else torch.empty(rows, *rest, dtype=dtype, device=parts[0].device)
    )
    start = 0
    for part in parts:
        joined[start : start + part.shape[0]].copy_(part)
        start += part.shape[0]
    return joined


@dataclass
class _Layer:
    attention: AttentionShape
    gains: tuple[Tensor, Tensor]
    eps: float
    head_gains: tuple[Tensor, ...]
    into: tuple[Stacked, Stacked]
    out: tuple[Stacked, Stacked]

    def __call__(self, x: Tensor, dtype: torch.dtype, rotation: Rotation, documents: Tensor | None) -> Tensor:
        first, second = (
            Products(*into.read(dtype), *out.read(dtype))
            for into, out in zip(self.into, self.out, strict=True)
        )
        parameters = (self.gains[0], *self.into[0].parameters, *self.out[0].parameters, *self.head_gains)
        x = AttentionHalf.apply(x, self.attention, first, rotation, documents, *parameters)  # type: ignore[no-untyped-call]
        parameters = (self.gains[1], *self.into[1].parameters, *self.out[1].parameters)
        done: Tensor = FeedForwardHalf.apply(x, self.eps, second, *parameters)  # type: ignore[no-untyped-call]
        return done


class WrittenOut:
    """Stands in for `decoder` in a training step: same inputs, same hidden states, same gradients."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder: Any = decoder
        layers: Any = decoder.layers
        self._layers = [_read_layer(layer, self.decoder.config) for layer in layers]

    def __call__(self, input_ids: Tensor, use_cache: bool = False, position_ids: Tensor | None = None) -> Any:
        """`Hidden` of `input_ids` [B, T].

        `position_ids` [B, T] begin anew at 0 where a row's next text begins, which then sees nothing before it; there is no cache.
        """
        if hasattr(self.decoder.norm.weight, "placements"):  # weights that several processes hold in parts
            return self.decoder(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)
        device = input_ids.device.type
        x = self.decoder.embed_tokens(input_ids)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            rotation = self._rotation(x, position_ids)
            documents = None if position_ids is None else (position_ids == 0).cumsum(-1)
            for layer in self._layers:
                x = layer(x, dtype, rotation, documents)
            norm = self.decoder.norm
            return Hidden(RMSNorm.apply(x, norm.weight, norm.variance_epsilon))  # type: ignore[no-untyped-call]

    def _rotation(self, x: Tensor, position_ids: Tensor | None) -> Rotation:
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        cos, sin = self.decoder.rotary_emb(x, position_ids=position_ids)
        half = cos.shape[-1] // 2  # the second half repeats the first
        return Rotation(cos[:, None, :, :half].contiguous(), sin[:, None, :, :half].contiguous())


def write_out(decoder: nn.Module) -> WrittenOut | None:
    """The decoder written out, or None where its build is not known to be the one that functional/layers.py computes."""
    config: Any = getattr(decoder, "config", None)
    if getattr(config, "model_type", None) not in _FAMILIES or not _is_plain(config):
        return None
    read: Any = decoder
    try:
        modules = [
            read.norm,
            *(
                norm
                for layer in read.layers
                for norm in (layer.input_layernorm, layer.post_attention_layernorm)
            ),
        ]
        if any(type(module).__name__ not in _NORMS for module in modules):
            return None
        return WrittenOut(decoder)
    except (AttributeError, TypeError, ValueError):
        return None  # other modules than those named here: wrapped, quantised, replaced


def _is_plain(config: Any) -> bool:
    dropouts = [getattr(config, name, 0.0) for name in ("attention_dropout", "resid_pdrop", "embd_pdrop")]
    windows = getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    )
    return not any(dropouts) and not windows and config.hidden_act == "silu"


def _read_layer(layer: Any, config: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    queries = (
        [attention.qkv_proj]
        if hasattr(attention, "qkv_proj")
        else [attention.q_proj, attention.k_proj, attention.v_proj]
    )
    inner = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
    linear = (queries, [attention.o_proj], inner, [mlp.down_proj])
    for module in (*queries, attention.o_proj, *inner, mlp.down_proj):
        if type(module) is not nn.Linear:
            raise TypeError(type(module).__name__)
    for group in linear:
        if len({layer.bias is None for layer in group}) > 1:
            raise ValueError("some of the stacked layers have a bias")
    norms = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    eps = layer.input_layernorm.variance_epsilon
    shape = AttentionShape(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=attention.head_dim,
        eps=eps,
        scale=attention.scaling,
        norm_heads=bool(norms),
    )
    return _Layer(
        attention=shape,
        gains=(layer.input_layernorm.weight, layer.post_attention_layernorm.weight),
        eps=layer.post_attention_layernorm.variance_epsilon,
        head_gains=tuple(norm.weight for norm in norms),
        into=(Stacked(queries), Stacked(inner)),
        out=(Stacked([attention.o_proj]), Stacked([mlp.down_proj])),
    )
