"""Shapes of models: what a target looks like, what a draft inherits from it, what each costs per token.

`read_architecture` gives a config's shape; `draft_hf_config` makes the config of a draft from one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from fastdraft.modeling.families import DRAFT_FAMILIES, MULTIMODAL, draft_family, llama_values, text_config

_NOT_INHERITED = [
    "layer_types",
    "max_window_layers",
    "head_dim",
    "quantization_config",
    "auto_map",
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
]
_ROTARY_FACTORS = ("short_factor", "long_factor")
_WIDEST_LLAMA_HEAD = 128
WEIGHT_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}  # by the name of an export's precision


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder of one of `TEXT_FAMILIES`: all that decides its size and cost."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    tied: bool
    context_length: int
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    stored: int = 0  # parameters as counted on the modules, where the family has no formula here
    read: int = 0  # of these, the ones read for one token: of routed experts only those that it is sent to
    head_size: int = 0  # rows of a trimmed head; 0: it has the whole vocabulary

    @property
    def layer_parameters(self) -> int:
        """Attention, gated feed-forward and two norms of one layer."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * queries + 2 * keys)
        biases = self.qkv_bias * (queries + 2 * keys) + self.output_bias * self.hidden_size
        biases += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.family == "qwen3" else 0)
        return attention + 3 * self.hidden_size * self.intermediate_size + biases + norms

    @property
    def embedding_parameters(self) -> int:
        """The input embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """The output head, also where it is the embedding."""
        return (self.head_size or self.vocab_size) * self.hidden_size

    @property
    def body_parameters(self) -> int:
        """All layers and the last norm; of counted ones what a token reads."""
        if self.stored:
            return self.read - self.head_parameters
        return self.num_layers * self.layer_parameters + self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters; a tied matrix counts once."""
        head = 0 if self.tied else self.head_parameters
        return self.stored or self.body_parameters + self.embedding_parameters + head

    @property
    def read_parameters(self) -> int:
        """Read for one token: the body and the head; of an untied input embedding only one row is read."""
        return self.body_parameters + self.head_parameters

    @property
    def flops_per_token(self) -> int:
        """Of one token's forward pass, attention over the context left out."""
        return 2 * self.read_parameters

    def bytes_per_token(self, bits: float) -> float:
        """Bytes of weights read for one token when each takes `bits` bits."""
        return self.read_parameters * bits / 8

    def exported_bytes_per_token(self, weights: str) -> float:
        """The same of an export, scales left out; int4 ones keep embeddings and head in int8."""
        bits = WEIGHT_BITS[weights]
        return (self.body_parameters * bits + self.head_parameters * max(bits, 8)) / 8

    @property
    def draft_base(self) -> Architecture:
        """What a draft of this target starts from: vocabulary, context and heads, in the draft's family."""
        family = draft_family(self.family)
        if family == self.family:
            return self
        plain = replace(self, qkv_bias=False, output_bias=False, mlp_bias=False, stored=0, read=0)
        return replace(plain, family=family, head_dim=min(self.head_dim, _WIDEST_LLAMA_HEAD))

    def as_dict(self) -> dict[str, Any]:
        """The fields, for manifests and fingerprints; counts only where they were made."""
        sparse = ("stored", "read", "head_size")
        return {key: value for key, value in asdict(self).items() if value or key not in sparse}


def read_architecture(hf_config: PreTrainedConfig) -> Architecture:
    """The shape of the text part that a Hugging Face config describes."""
    config: Any = text_config(hf_config)
    family, counted = str(config.model_type), count(hf_config)
    attention_bias = bool(getattr(config, "attention_bias", False)) and family in ("llama", "qwen3")
    shape = Architecture(
        family=family,
        vocab_size=int(config.vocab_size),
        hidden_size=int(config.hidden_size),
        num_layers=int(config.num_hidden_layers),
        num_heads=int(config.num_attention_heads),
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
        intermediate_size=int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
        tied=counted.tied,  # what the parts of a config say may contradict each other: the modules know
        context_length=int(config.max_position_embeddings),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        mlp_bias=family == "llama" and bool(getattr(config, "mlp_bias", False)),
    )
    # Only a draft's families have a formula.
    return shape if family in DRAFT_FAMILIES else replace(shape, stored=counted.stored, read=counted.read)


@dataclass(frozen=True)
class Counted:
    """Parameters of a model's text part."""

    stored: int  # all; a tied matrix counts once
    read: int  # those read for one token
    tied: bool  # whether embedding and head are one matrix


def auto_class(hf_config: PreTrainedConfig) -> Any:
    """The class of transformers that loads a model with this config and writes text."""
    return AutoModelForImageTextToText if hf_config.model_type in MULTIMODAL else AutoModelForCausalLM


def count(hf_config: PreTrainedConfig) -> Counted:
    """Counts the modules that a config describes, on the meta device: no memory, no weights."""
    with torch.device("meta"):
        return count_model(auto_class(hf_config).from_config(copy.deepcopy(hf_config)))


def count_model(model: PreTrainedModel) -> Counted:
    """Counts the text part of a model that was built, on any device."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    decoder = model.get_decoder()
    parts = {id(p): p.numel() for module in (decoder, head) for p in module.parameters()}
    tied = head.weight is embedding
    # Of an untied input embedding and of a table of positions one row is read, which is not counted.
    tables = {id(m.weight) for m in decoder.modules() if isinstance(m, torch.nn.Embedding)}
    idle = sum(parts[table] for table in tables if not (tied and table == id(embedding)))
    config: Any = text_config(model.config)
    experts = int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0)
    if experts:  # a token reads those that it is sent to; several tokens in one pass read more than this
        routed = sum(p.numel() for name, p in decoder.named_parameters() if ".experts." in name)
        idle += routed * (experts - int(config.num_experts_per_tok)) // experts
    stored = sum(parts.values())
    return Counted(stored, stored - idle, tied)


def has_rotary_factors(hf_config: PreTrainedConfig) -> bool:
    """Whether the rope has a factor per frequency (longrope), which ties it to the head's width."""
    rope = getattr(text_config(hf_config), "rope_parameters", None) or {}
    return any(rope.get(name) for name in _ROTARY_FACTORS)


def rope_switch(hf_config: PreTrainedConfig) -> int | None:
    """Tokens up to which a text has a longrope's short factors; beyond, all of it has the long ones."""
    text: Any = text_config(hf_config)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    name = "original_max_position_embeddings"
    first = int(rope.get(name) or getattr(text, name, None) or 0)
    return first if 0 < first < int(text.max_position_embeddings) else None


def draft_hf_config(target_config: PreTrainedConfig, architecture: Architecture) -> PreTrainedConfig:
    """A config of the draft's family with its width, depth and heads; the rest is the target's text part's.

    That is vocabulary size, context length, rope and special ids, and in the target's own family norm and
    activation.
    """
    text = text_config(target_config)
    own = architecture.family == text.model_type
    if own:
        values = {k: v for k, v in copy.deepcopy(text.to_dict()).items() if k not in _NOT_INHERITED}
        # A window saves a small model nothing, and its cache cannot be rolled back.
        values["sliding_window"] = None
        if "use_sliding_window" in values:
            values["use_sliding_window"] = False
    else:
        values = llama_values(text)
    values |= {
        "hidden_size": architecture.hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        "num_key_value_heads": architecture.num_kv_heads,
        "intermediate_size": architecture.intermediate_size,
        "tie_word_embeddings": architecture.tied,
        "dtype": "float32",
    }
    if architecture.family in ("llama", "mistral", "qwen3"):
        values["head_dim"] = architecture.head_dim
    rope = values.get("rope_parameters") or {}
    frequencies = int(architecture.head_dim * float(rope.get("partial_rotary_factor") or 1.0)) // 2
    for name in _ROTARY_FACTORS:
        if rope.get(name):
            rope[name] = resample(rope[name], frequencies)
    return type(text)(**values) if own else LlamaConfig(**values)


def resample(values: Sequence[float], count: int) -> list[float]:
    """`count` values on the same straight-line curve: frequency i of n stands at i/n of the spectrum."""
    places = np.arange(count) * len(values) / count
    return list(map(float, np.interp(places, np.arange(len(values)), values)))
