"""A model of a draft's families as a GGUF file: what llama.cpp, LM Studio and Ollama load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from fastdraft.errors import TargetError
from fastdraft.modeling.families import DRAFT_FAMILIES, text_config
from fastdraft.modeling.gguf_fields import PREFIX, tokenizer_fields
from fastdraft.modeling.gguf_files import check_pair, require_gguf
from fastdraft.modeling.gguf_names import (
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    gguf_name,
    is_turned,
    llama3_factors,
    to_neighbours,
)
from fastdraft.recipe.evaluation import GGUFWeights
from fastdraft.run_folder import atomic_path
from fastdraft.target import Target

GGUF_FILE = "model.gguf"
_ARCHITECTURE = {family: family for family in DRAFT_FAMILIES} | {"mistral": "llama"}
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
_BLOCK = 32  # weights that q8_0 scales together: of one row


def require_writable(target: Target) -> None:
    """Refuses, before anything is trained, a target for whose tokenizer no GGUF file can be written."""
    require_gguf()
    tokenizer_fields(target)


def check_config(config: PreTrainedConfig, where: str) -> None:
    """Refuses a model of a family, or with windows, that a GGUF file of ours does not serve."""
    if config.model_type not in _ARCHITECTURE:
        rule = f"must be one of {', '.join(_ARCHITECTURE)}"
        raise TargetError(f"{where}: family {config.model_type}: {rule}", "leave gguf out")
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None) if "sliding_attention" in layers else None
    if window and window < config.max_position_embeddings and config.model_type != "phi3":
        found = f"layers that see {window} tokens; llama.cpp lets this family see all of them"
        raise TargetError(f"{where}: {found}", "leave gguf out")


def export_gguf(source: Target, file: Path, weights: GGUFWeights, tokenizer: Target) -> None:
    """Writes one file, whole or not at all, with the tokenizer of `tokenizer`: of a draft its target's.

    Matrices in `weights` (f16 where a row cannot be cut into blocks), vectors in fp32. TargetError where
    llama.cpp could not run the model, or would leave this draft out beside that target.
    """
    gguf, config = require_gguf(), text_config(source.config)
    check_config(config, source.location)
    architecture = _ARCHITECTURE[config.model_type]
    fields = tokenizer_fields(tokenizer)
    if len(fields[f"{PREFIX}ggml.tokens"].value) != config.vocab_size:
        found = f"{len(fields[f'{PREFIX}ggml.tokens'].value)} tokens, {config.vocab_size} rows"
        raise TargetError(f"{source.location}: {found}: must be as many", "use the model's own tokenizer")
    check_pair(fields, fields, str(file))  # what a file holds must be a pair with itself
    model = source.model("cpu", torch.float32)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_name(Path(source.name).name)
        writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[weights]))
        _add_shape(writer, config, architecture)
        for key, field in fields.items():
            element = None if field.element is None else gguf.GGUFValueType(field.element)
            writer.add_key_value(key, field.value, gguf.GGUFValueType(field.kind), element)
        for name, weight in _rope_tensors(config).items():
            writer.add_tensor(name, weight.numpy())
        tied = config.tie_word_embeddings
        heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
        for name, weight in model.state_dict().items():
            if name == "lm_head.weight" and tied:
                continue
            place = gguf_name(architecture, name)
            turned = heads[".attn_q." if ".attn_q." in place else ".attn_k."]
            rows = to_neighbours(weight, turned) if is_turned(architecture, place) else weight
            _add_tensor(writer, place, rows, weights)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def as_stored(matrix: torch.Tensor, weights: GGUFWeights) -> torch.Tensor:
    """A matrix as it comes back out of such a file, in fp32."""
    gguf = require_gguf()
    if weights == "q8_0" and matrix.shape[-1] % _BLOCK == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        return torch.from_numpy(gguf.dequantize(gguf.quantize(matrix.numpy(), kind), kind))
    return matrix if weights == "f32" else matrix.half().float()


def _add_tensor(writer: Any, name: str, weight: torch.Tensor, weights: GGUFWeights) -> None:
    gguf, array = require_gguf(), weight.contiguous().numpy()
    if array.ndim == 1 or weights == "f32":
        writer.add_tensor(name, array)
    elif weights == "q8_0" and array.shape[-1] % _BLOCK == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, array.astype("float16"))


def _add_shape(writer: Any, config: PreTrainedConfig, architecture: str) -> None:
    """The keys from which llama.cpp builds the model."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = dict(config.rope_parameters)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    kind = rope.get("rope_type", "default")
    if architecture == "phi3":
        length = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(length)
        writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(require_gguf().RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    if kind == "dynamic":
        found = f"rope type {kind!r}; llama.cpp knows default, linear, yarn, llama3 and longrope"
        raise TargetError(f"{config.name_or_path}: {found}", "leave gguf out of export.formats")
    if kind == "longrope" and rope.get("attention_factor"):
        writer.add_rope_scaling_attn_factors(float(rope["attention_factor"]))


def _rope_tensors(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Factors of the rope's frequencies, which stand in the file as tensors."""
    rope = dict(config.rope_parameters)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if rope.get("rope_type") == "llama3":
        return {ROPE_FREQS: llama3_factors(rope, head_dim)}
    if rope.get("rope_type") == "longrope":
        factors = {ROPE_LONG: rope["long_factor"], ROPE_SHORT: rope["short_factor"]}
        return {name: torch.tensor(values, dtype=torch.float32) for name, values in factors.items()}
    return {}
