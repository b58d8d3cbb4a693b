"""What in a target's vocabulary, tokenizer and config tends to go wrong later, each in one sentence with what is done about it."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fastdraft.modeling.architecture import Architecture, has_rotary_factors, rope_switch
from fastdraft.modeling.families import special_id, text_config
from fastdraft.modeling.vocabulary import Vocabulary, id_ranges
from fastdraft.recipe.base import format_count
from fastdraft.target import Target

_QUANT_ROW = 256


def find_traps(target: Target) -> list[str]:
    """The traps of one target, most consequential first; empty when there are none."""
    vocabulary, tokenizer, config = target.vocabulary, target.tokenizer, target.config
    return [
        *_padding(vocabulary),
        *_ends(vocabulary, tokenizer),
        *_beginnings(vocabulary, tokenizer, config),
        *_text(tokenizer),
        *_config(config, target.architecture),
    ]


def _padding(vocabulary: Vocabulary) -> list[str]:
    if not vocabulary.missing_ids:
        return []
    ranges = [f"{low}-{high}" if high > low else str(low) for low, high in id_ranges(vocabulary.missing_ids)]
    listed = ", ".join(ranges[:3]) + (f" and {len(ranges) - 3} more ranges" if len(ranges) > 3 else "")
    return [
        f"Padded vocabulary: {len(vocabulary.missing_ids)} of {vocabulary.size} ids have no token ({listed}). The draft "
        "keeps these rows, because vLLM wants equal sizes; FastDraft never proposes them, and export tests that other "
        "runtimes will not either."
    ]


def _ends(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    traps, ends, pad = [], vocabulary.eos_token_ids, vocabulary.pad_token_id
    if len(ends) > 1:
        names = ", ".join(f"{token} {tokenizer.convert_ids_to_tokens(token)}" for token in ends)
        traps.append(f"Several EOS ids: {names}. A text ends at any of them.")
    if not ends:
        traps.append("No EOS id: no text ever ends by itself, and documents cannot be told apart by it.")
    if pad is None:
        traps.append("No padding token: batches are padded with EOS and masked by position.")
    elif pad in ends:
        traps.append(
            f"Padding and EOS are the same id {pad}: masks must go by position, never by id, and they do."
        )
    return traps


def _beginnings(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> list[str]:
    traps = []
    bos, listed = vocabulary.bos_token_id, special_id(config, "bos_token_id")
    first = tokenizer("a").input_ids[:1]
    if bos is None:
        unused = f" The config's bos_token_id {listed} is not used." if listed is not None else ""
        traps.append(f"The tokenizer has no BOS: documents are separated by EOS.{unused}")
    elif first != [bos]:
        traps.append(
            f"BOS exists (id {bos}) but the tokenizer does not put it before a text: prompts are encoded as the "
            "tokenizer does, without it."
        )
    if bos is not None and listed is not None and listed != bos:
        traps.append(f"The config says BOS is {listed}, the tokenizer says {bos}: the tokenizer's is used.")
    if not tokenizer.chat_template:
        traps.append(
            "No chat template: a base model. Instruction tasks are asked bare, and Magpie prompts cannot be made; use "
            "corpus prompts."
        )
    elif first == [bos] and tokenizer.bos_token in tokenizer.chat_template + _rendered(tokenizer)[:40]:
        traps.append(
            "Chat template and tokenizer both add BOS: a rendered chat must be encoded without special tokens, and is."
        )
    return traps


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
    except Exception:  # templates are programs of strangers: one that refuses this chat tells nothing here
        return ""


def _text(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"].get("byte_fallback"):
        return [
            "Byte fallback: a rare character is several byte tokens; a stream must hold back text until they make a "
            "character, and does."
        ]
    if "ByteLevel" not in json.dumps([state.get("pre_tokenizer"), state.get("normalizer")]):
        return [
            "Neither byte-level nor byte fallback: characters outside the vocabulary become the unknown token and cannot "
            "be drafted well."
        ]
    return []


def switch_warning(switch: int) -> str:
    """Why a text that grows over the line of a longrope is nobody's exact text, and what to do."""
    return (
        f"This rope changes at {switch} tokens: a longer text has other factors from its first token on, and the keys "
        "cached so far have the old ones. A text that grows over that line differs between runtimes, and between replay "
        "and exact decoding; on either side it is exact. Keep prompt and answer together on one side."
    )


def _config(config: PreTrainedConfig, shape: Architecture) -> list[str]:
    traps = []
    if shape.hidden_size % _QUANT_ROW or shape.intermediate_size % _QUANT_ROW:
        traps.append(
            f"The target's own rows are not all multiples of {_QUANT_ROW}: llama.cpp's K-quants do not fit it."
        )
    text = text_config(config)
    window = getattr(text, "sliding_window", None)
    if window and window < shape.context_length:
        traps.append(
            f"Sliding window of {window} in a context of {shape.context_length}: the draft attends to everything, "
            "so that its cache can be rolled back."
        )
    if has_rotary_factors(config):
        traps.append(
            "Rope with one factor per frequency (longrope): draft heads keep the target's width where they can; else "
            "factors are resampled."
        )
    if switch := rope_switch(config):
        traps.append(switch_warning(switch))
    if shape.stored and shape.read < 0.9 * shape.parameters and getattr(text, "num_experts_per_tok", None):
        traps.append(
            f"Mixture of experts: a token reads {format_count(shape.read)} of {format_count(shape.parameters)} parameters, "
            "but verifying several tokens reads more experts: gains are below those predicted from bytes, so measure them."
        )
    if getattr(text, "attn_logit_softcapping", None):
        traps.append(
            "Attention scores are capped: attention is computed step by step here, because torch's fused kernels leave "
            "the cap out."
        )
    if getattr(config, "quantization_config", None):
        traps.append(
            "The target's weights are quantised: its library must be installed to run it; the draft is not quantised."
        )
    if getattr(config, "auto_map", None):
        traps.append(
            "The model brings Python code of its own; transformers' own implementation is used instead."
        )
    return traps
