"""What in a target's vocabulary, tokenizer and config tends to go wrong later, each in one sentence with what is done about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdraft.console import format_count
from fastdraft.modeling.architecture import has_rotary_factors, rope_switch
from fastdraft.modeling.families import special_id, text_config
from fastdraft.modeling.vocabulary import id_ranges
from fastdraft.target import Target

_QUANT_ROW = 256


def find_traps(target: Target) -> list[str]:
    """The traps of one target, most consequential first; empty when there are none."""
    return [
        *_of_vocabulary(target),
        *_of_beginnings(target),
        *_of_text(target.tokenizer),
        *_of_config(target),
    ]


def _of_vocabulary(target: Target) -> Iterator[str]:
    vocabulary = target.vocabulary
    ends, pad = vocabulary.eos_token_ids, vocabulary.pad_token_id
    if vocabulary.missing_ids:
        ranges = [
            f"{low}-{high}" if high > low else str(low) for low, high in id_ranges(vocabulary.missing_ids)
        ]
        listed = ", ".join(ranges[:3]) + (f" and {len(ranges) - 3} more ranges" if len(ranges) > 3 else "")
        yield (
            f"Padded vocabulary: {len(vocabulary.missing_ids)} of {vocabulary.size} ids have no token ({listed}). The "
            "draft keeps these rows, because vLLM wants equal sizes; FastDraft never proposes them, and export tests "
            "that other runtimes will not either."
        )
    if len(ends) > 1:
        names = ", ".join(f"{token} {target.tokenizer.convert_ids_to_tokens(token)}" for token in ends)
        yield f"Several EOS ids: {names}. A text ends at any of them."
    if not ends:
        yield "No EOS id: no text ever ends by itself, and documents cannot be told apart by it."
    if pad is None:
        yield "No padding token: batches are padded with EOS and masked by position."
    elif pad in ends:
        yield f"Padding and EOS are the same id {pad}: masks must go by position, never by id, and they do."


def _of_beginnings(target: Target) -> Iterator[str]:
    tokenizer, bos, listed = (
        target.tokenizer,
        target.vocabulary.bos_token_id,
        special_id(target.config, "bos_token_id"),
    )
    first = tokenizer("a").input_ids[:1]
    if bos is None:
        unused = f" The config's bos_token_id {listed} is not used." if listed is not None else ""
        yield f"The tokenizer has no BOS: documents are separated by EOS.{unused}"
    elif first != [bos]:
        yield f"BOS exists (id {bos}) but the tokenizer does not put it before a text: prompts are encoded without it."
    if bos is not None and listed is not None and listed != bos:
        yield f"The config says BOS is {listed}, the tokenizer says {bos}: the tokenizer's is used."
    if not tokenizer.chat_template:
        yield (
            "No chat template: a base model. Instruction tasks are asked bare, and Magpie prompts cannot be made; use "
            "corpus prompts."
        )
    elif first == [bos] and tokenizer.bos_token in tokenizer.chat_template + _rendered(tokenizer)[:40]:
        yield "Chat template and tokenizer both add BOS: a rendered chat must be encoded without special tokens, and is."


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
    except Exception:  # templates are programs of strangers: one that refuses this chat tells nothing here
        return ""


def _of_text(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"].get("byte_fallback"):
        yield (
            "Byte fallback: a rare character is several byte tokens; a stream must hold back text until they make a "
            "character, and does."
        )
    elif "ByteLevel" not in json.dumps([state.get("pre_tokenizer"), state.get("normalizer")]):
        yield (
            "Neither byte-level nor byte fallback: characters outside the vocabulary become the unknown token and cannot "
            "be drafted well."
        )


def switch_warning(switch: int) -> str:
    """Why a text that grows over the line of a longrope is nobody's exact text, and what to do."""
    return (
        f"This rope changes at {switch} tokens: a longer text has other factors from its first token on, and the keys "
        "cached so far have the old ones. A text that grows over that line differs between runtimes, and between replay "
        "and exact decoding; on either side it is exact. Keep prompt and answer together on one side."
    )


def _of_config(target: Target) -> Iterator[str]:
    config, shape, text = target.config, target.architecture, text_config(target.config)
    if shape.hidden_size % _QUANT_ROW or shape.intermediate_size % _QUANT_ROW:
        yield f"The target's own rows are not all multiples of {_QUANT_ROW}: llama.cpp's K-quants do not fit it."
    window = getattr(text, "sliding_window", None)
    if window and window < shape.context_length:
        yield (
            f"Sliding window of {window} in a context of {shape.context_length}: the draft attends to everything, so that "
            "its cache can be rolled back."
        )
    if has_rotary_factors(config):
        yield (
            "Rope with one factor per frequency (longrope): draft heads keep the target's width where they can; else "
            "factors are resampled."
        )
    if switch := rope_switch(config):
        yield switch_warning(switch)
    if shape.stored and shape.read < 0.9 * shape.parameters and getattr(text, "num_experts_per_tok", None):
        yield (
            f"Mixture of experts: a token reads {format_count(shape.read)} of {format_count(shape.parameters)} parameters, "
            "but verifying several tokens reads more experts: gains are below those predicted from bytes, so measure them."
        )
    if getattr(text, "attn_logit_softcapping", None):
        yield "Attention scores are capped: torch's fused kernels leave the cap out, so attention is computed in steps here."
    if getattr(config, "quantization_config", None):
        yield "The target's weights are quantised: its library must be installed to run it; the draft is not quantised."
    if getattr(config, "auto_map", None):
        yield "The model brings Python code of its own; transformers' own implementation is used instead."
