"""What in a target's vocabulary, tokenizer and config tends to go wrong later, told before anything is trained.

Decides what is worth a user's attention; each trap is one sentence with what FastDraft does about it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastdraft.modeling.architecture import Architecture, has_rotary_factors, rope_switch
from fastdraft.modeling.families import special_id, text_config
from fastdraft.modeling.vocabulary import Vocabulary, id_ranges
from fastdraft.recipe.base import format_count

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_QUANT_ROW = 256


def find_traps(
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    architecture: Architecture,
) -> list[str]:
    """The traps of one target, most consequential first; empty when there are none."""
    return [
        *_padding(vocabulary),
        *_ends(vocabulary, tokenizer),
        *_beginnings(vocabulary, tokenizer, config),
        *_text(tokenizer),
        *_config(config, architecture),
    ]


def _padding(vocabulary: Vocabulary) -> list[str]:
    if not vocabulary.missing_ids:
        return []
    ranges = [f"{low}-{high}" if high > low else str(low) for low, high in id_ranges(vocabulary.missing_ids)]
    listed = ", ".join(ranges[:3]) + (f" and {len(ranges) - 3} more ranges" if len(ranges) > 3 else "")
    return [
        f"Padded vocabulary: {len(vocabulary.missing_ids)} of {vocabulary.size} ids have no token ({listed}). The draft keeps these rows, "
        "because vLLM wants equal sizes; FastDraft never proposes them, and export tests that other runtimes will not either."
    ]


def _ends(vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    traps = []
    names = {
        token_id: f"{token_id} {tokenizer.convert_ids_to_tokens(token_id)}"
        for token_id in vocabulary.eos_token_ids
    }
    if len(names) > 1:
        traps.append(f"Several EOS ids: {', '.join(names.values())}. A text ends at any of them.")
    if not names:
        traps.append("No EOS id: no text ever ends by itself, and documents cannot be told apart by it.")
    if vocabulary.pad_token_id is None:
        traps.append("No padding token: batches are padded with EOS and masked by position.")
    elif vocabulary.pad_token_id in vocabulary.eos_token_ids:
        traps.append(
            f"Padding and EOS are the same id {vocabulary.pad_token_id}: masks must go by position, never by id, and they do."
        )
    return traps


def _beginnings(
    vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> list[str]:
    traps = []
    bos, listed = vocabulary.bos_token_id, special_id(config, "bos_token_id")
    first = tokenizer("a").input_ids[:1]
    if bos is None:
        traps.append(
            "The tokenizer has no BOS: documents are separated by EOS."
            + (f" The config's bos_token_id {listed} is not used." if listed is not None else "")
        )
    elif first != [bos]:
        traps.append(
            f"BOS exists (id {bos}) but the tokenizer does not put it before a text: prompts are encoded as the tokenizer does, without it."
        )
    if bos is not None and listed is not None and listed != bos:
        traps.append(f"The config says BOS is {listed}, the tokenizer says {bos}: the tokenizer's is used.")
    if not tokenizer.chat_template:
        traps.append(
            "No chat template: a base model. Instruction tasks are asked bare, and Magpie prompts cannot be made; use corpus prompts."
        )
    elif (
        bos is not None
        and first == [bos]
        and tokenizer.bos_token in tokenizer.chat_template + _rendered(tokenizer)[:40]
    ):
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
    model, rules = state["model"], json.dumps([state.get("pre_tokenizer"), state.get("normalizer")])
    if model.get("byte_fallback"):
        return [
            "Byte fallback: a rare character is several byte tokens; a stream must hold back text until they make a character, and does."
        ]
    if "ByteLevel" not in rules:
        return [
            "Neither byte-level nor byte fallback: characters outside the vocabulary become the unknown token and cannot be drafted well."
        ]
    return []


def switch_warning(switch: int) -> str:
    """Why a text that grows over the line of a longrope is nobody's exact text, and what to do."""
    return (
        f"This rope changes at {switch} tokens: a longer text has other factors from its first token on, and the keys cached so far "
        "have the old ones. A text that grows over that line differs between runtimes, and between replay and exact decoding; "
        "on either side it is exact. Keep prompt and answer together on one side."
    )


def _config(config: PreTrainedConfig, architecture: Architecture) -> list[str]:
    traps = []
    if architecture.hidden_size % _QUANT_ROW or architecture.intermediate_size % _QUANT_ROW:
        traps.append(
            f"The target's own rows are not all multiples of {_QUANT_ROW}: llama.cpp's K-quants do not fit it."
        )
    text = text_config(config)
    window = getattr(text, "sliding_window", None)
    if window and window < architecture.context_length:
        traps.append(
            f"Sliding window of {window} in a context of {architecture.context_length}: the draft attends to everything, "
            "so that its cache can be rolled back."
        )
    if has_rotary_factors(config):
        traps.append(
            "Rope with one factor per frequency (longrope): draft heads keep the target's width where they can; else factors are resampled."
        )
    switch = rope_switch(config)
    if switch:
        traps.append(switch_warning(switch))
    if (
        architecture.stored
        and architecture.read < 0.9 * architecture.parameters
        and getattr(text, "num_experts_per_tok", None)
    ):
        traps.append(
            f"Mixture of experts: a token reads {format_count(architecture.read)} of {format_count(architecture.parameters)} parameters, "
            "but verifying several tokens reads more experts: gains are below those predicted from bytes, so measure them."
        )
    if getattr(text, "attn_logit_softcapping", None):
        traps.append(
            "Attention scores are capped: attention is computed step by step here, because torch's fused kernels leave the cap out."
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
