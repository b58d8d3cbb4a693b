"""Which families of models may be targets, where their text part lies, and a draft's family for each."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastdraft.errors import TargetError

# Gated decoders with RMS norm: shapes, first weights and learning rates are made for these.
DRAFT_FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")

# A draft has the target's own family only where that shrinks to any width and depth without a loss and all
# runtimes run the small one with attention to its whole context. Else it is a Llama: they ask for the same
# vocabulary only.
_GEMMA = "{} ties norms and embedding scale to its width, and its windows are fixed by layer number"
_EXPERTS = "a mixture of experts pays by its width, and a draft is narrow: a dense one reads as little"
_AXES = "{} counts positions on three axes for pictures, and a draft reads text"
_NOT_MADE = "for which FastDraft's shapes are not made"
_ALWAYS_LLAMA = {
    "gemma": "Gemma ties norms and embedding scale to its width, and its head is always its embedding",
    "gemma2": _GEMMA.format("Gemma 2"),
    "gemma3_text": _GEMMA.format("Gemma 3"),
    "gpt2": "GPT-2 learns a vector for each position: places beyond the training rows stay untrained",
    "gpt_neox": f"GPT-NeoX has no gated feed-forward and no shared key-value heads, {_NOT_MADE}",
    "mixtral": _EXPERTS,
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "granite": "Granite carries multipliers that were tuned for its own width",
    "cohere": f"Cohere scales its logits and runs attention beside feed-forward, {_NOT_MADE}",
    "cohere2": f"Cohere 2 scales its logits and has layers without positions, {_NOT_MADE}",
    "qwen2_vl_text": _AXES.format("Qwen2-VL"),
    "qwen2_5_vl_text": _AXES.format("Qwen2.5-VL"),
}
TEXT_FAMILIES = (*DRAFT_FAMILIES, *_ALWAYS_LLAMA)
# Configs that hold a text model; its family must be one of `TEXT_FAMILIES`.
MULTIMODAL = ("gemma3", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl")
TARGET_FAMILIES = (*TEXT_FAMILIES, *MULTIMODAL)  # each is tested through the whole chain
_PLAIN_ROPES = ("default", "linear", "dynamic", "yarn", "llama3")

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "intermediate_size")  # None: from the others


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json as transformers takes it, where it was written in an older way."""
    values = dict(values)
    if isinstance(values.get("text_config"), dict):
        values["text_config"] = plain_values(values["text_config"])
    for name in _SPECIAL_IDS:  # -1 says "none" in the first Llamas
        ids = values.get(name)
        if isinstance(ids, list):
            values[name] = [i for i in ids if not isinstance(i, int) or i >= 0] or None
        elif isinstance(ids, int) and ids < 0:
            values[name] = None
    pad, rows = values.get("pad_token_id"), values.get("vocab_size")
    if isinstance(pad, int) and isinstance(rows, int) and pad >= rows:
        values["pad_token_id"] = None  # a token that was added after the rows were made
    if not values.get("quantization_config", True):
        del values["quantization_config"]  # null and {} say "none"
    rope = values.get("rope_scaling")
    if isinstance(rope, dict) and rope.get("type") == "su":  # longrope's name in the first Phi-3
        values["rope_scaling"] = {**rope, "type": "longrope"}
    return values


def check_config(config: PreTrainedConfig, where: str) -> None:
    """Refuses a text part of another family, sizes that are none, and a rope that transformers has not."""
    text = text_config(config)
    if text.model_type not in TEXT_FAMILIES:
        found = f"text of model family '{text.model_type}'; must be one of {', '.join(TEXT_FAMILIES)}"
        raise TargetError(f"{where}: {found}", "choose another model")
    for name in (*_SIZES, *_OPTIONAL_SIZES):
        value = getattr(text, name, None)
        if (value is not None or name in _SIZES) and (type(value) is not int or value < 1):
            rule = "must be a whole number of at least 1"
            raise TargetError(f"{where}: config.json: {name} {value!r:.40}; {rule}", "fetch the model again")
    rope: Any = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if (kind := part.get("rope_type", "default")) not in ("default", *ROPE_INIT_FUNCTIONS):
            rule = f"must be one of default, {', '.join(ROPE_INIT_FUNCTIONS)}"
            raise TargetError(f"{where}: config.json: rope type '{kind}'; {rule}", "choose another model")
        for name in ("rope_theta", "factor"):
            value = 1 if part.get(name) is None else part[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                found = f"config.json: {name} of the rope {value!r:.40}; must be a number above 0"
                raise TargetError(f"{where}: {found}", "fetch the model again")


def text_config(hf_config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the part that reads and writes text; the config itself where there is no other part."""
    return hf_config.get_text_config(decoder=True)


def special_id(config: PreTrainedConfig, name: str) -> Any:
    """A special id, or a list of them, of a config or else of its text part; None when neither names one."""
    found = getattr(config, name, None)
    return found if found is not None else getattr(text_config(config), name, None)


def draft_family(family: str) -> str:
    """The family of a draft for a target's text part of this family."""
    return family if family in DRAFT_FAMILIES else "llama"


def why_draft_family(family: str) -> str:
    """Why a draft for this family is a Llama, as a clause; empty where it has the target's own family."""
    return _ALWAYS_LLAMA.get(family, "")


def llama_values(text: PreTrainedConfig) -> dict[str, Any]:
    """What a Llama draft takes from a target of another family."""
    epsilon = getattr(text, "rms_norm_eps", None) or getattr(text, "layer_norm_eps", None) or 1e-5
    return {
        "vocab_size": int(text.vocab_size),
        "max_position_embeddings": int(text.max_position_embeddings),
        "rms_norm_eps": float(epsilon),
        "rope_parameters": plain_rope(text),
        **{name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def plain_rope(text: PreTrainedConfig) -> dict[str, Any]:
    """The rope of the layers that see the whole context, without what a Llama lacks."""
    found: Any = copy.deepcopy(getattr(text, "rope_parameters", None) or {})
    found = found.get("full_attention") or found
    for name in ("mrope_section", "mrope_interleaved", "partial_rotary_factor"):
        found.pop(name, None)
    rope = {"rope_type": "default", "rope_theta": float(found.get("rope_theta") or 10_000.0)}
    plain = found.get("rope_type", "default") in _PLAIN_ROPES and "sliding_attention" not in found
    return {**rope, **found, "rope_theta": rope["rope_theta"]} if plain else rope
