"""Where the weights of a Hugging Face model stand in a GGUF file, and what is done to them on the way."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Architecture in a GGUF file -> family. Mistral's files say llama.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OF_ARCHITECTURE = {"phi3": {"ffn_up": "mlp.gate_up_proj"}, "gemma2": _AROUND, "gemma3": _AROUND}
# Factors of the rope's frequencies: Llama 3's, which divide; Phi-3's for long and for short texts.
ROPE_FREQS, ROPE_LONG, ROPE_SHORT = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


def hugging_face_name(architecture: str, name: str) -> str | None:
    """The name of a file's tensor in transformers; None for one that has no place there."""
    match = _NAME.fullmatch(name)
    if not match:
        return None
    layer = _LAYER | _OF_ARCHITECTURE.get(architecture, {})
    place = (layer if match[1] else _WHOLE).get(match[2])
    return place and (f"model.layers.{match[1]}.{place}.{match[3]}" if match[1] else f"{place}.{match[3]}")


def gguf_name(architecture: str, name: str) -> str:
    """The other way: the name in a file of a model's weight."""
    layer = {place: key for key, place in (_LAYER | _OF_ARCHITECTURE.get(architecture, {})).items()}
    whole = {place: key for key, place in _WHOLE.items()}
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"blk.{match[1]}.{layer[match[2]]}.{kind}"
    return f"{whole[module]}.{kind}"


def is_turned(architecture: str, name: str) -> bool:
    """Whether the rows of a tensor are in llama.cpp's order of rotary pairs: neighbours, not halves."""
    return architecture == "llama" and (".attn_q." in name or ".attn_k." in name)


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads * width, ...] from neighbouring rotary pairs to transformers' two halves."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def to_neighbours(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_halves`."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def has_shifted_norms(architecture: str) -> bool:
    """Whether a file holds 1 + weight where transformers holds the weight of a norm."""
    return architecture.startswith("gemma")


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """What Llama 3's rope divides each frequency by: from 1 for short waves to `factor` [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    waves = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    low, high, factor = (float(rope[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = (float(rope["original_max_position_embeddings"]) / waves - low) / (high - low)
    return 1 / torch.lerp(torch.tensor(1 / factor), torch.tensor(1.0), smooth.clamp(0, 1))


def llama3_rope(factors: Tensor, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The settings that give these factors; None where none do. Only the factors stand in a file."""
    factor = float(factors.max())
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of all published models
    for length in (8192, *(2**power for power in range(5, 21))):
        rope["original_max_position_embeddings"] = length
        if torch.allclose(llama3_factors(rope, head_dim), factors, rtol=1e-4):
            return rope
    return None
