"""What in a target's vocabulary, tokenizer and config tends to go wrong later, and what is done about it."""

from __future__ import annotations

from collections.abc import Iterator

from fastdraft.console import format_count
from fastdraft.modeling.architecture import rope_switch
from fastdraft.modeling.families import special_id, text_config
from fastdraft.modeling.tokenizer import class_trap, ids_around, rowless_tokens
from fastdraft.modeling.vocabulary import id_ranges
from fastdraft.target import Target

# Why a text that grows over the line of a longrope is nobody's exact text, and what to do.
SWITCH = (
    "This rope changes at {} tokens: longer text has other factors from its first token on, and cached keys "
    "have the old ones. A text that grows over that line differs between runtimes, and between replay and "
    "exact; on either side it is exact. Keep prompt and answer together on one side."
)


def find_traps(target: Target) -> list[str]:
    """The traps of one target, each a sentence or two, most consequential first."""
    return [*_of_tokenizer(target), *_of_vocabulary(target), *_of_beginnings(target), *_of_config(target)]


def _of_tokenizer(target: Target) -> Iterator[str]:
    if trap := class_trap(target.files, target.tokenizer):
        yield trap
    yield from target.tokenizer_notes
    rowless = [f"id {token_id} {token}" for token_id, token in rowless_tokens(target.tokenizer).items()]
    if rowless:
        more = (
            f" and {len(rowless) - 3} more have" if len(rowless) > 3 else " have" if rowless[1:] else " has"
        )
        yield f"{', '.join(rowless[:3])}{more} no row: never fed, never proposed."


def _of_vocabulary(target: Target) -> Iterator[str]:
    vocabulary = target.vocabulary
    ends, pad, missing = vocabulary.eos_token_ids, vocabulary.pad_token_id, vocabulary.missing_ids
    if missing:
        ranges = [f"{low}-{high}" if high > low else str(low) for low, high in id_ranges(missing)]
        listed = ", ".join(ranges[:3]) + (f" and {len(ranges) - 3} more ranges" if len(ranges) > 3 else "")
        yield (
            f"Padded vocabulary: {len(missing)} of {vocabulary.size} ids have no token ({listed}). The draft "
            "keeps these rows, because vLLM wants equal sizes; they are never proposed, and export tests it."
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
    tokenizer, bos = target.tokenizer, target.vocabulary.bos_token_id
    listed = special_id(target.config, "bos_token_id")
    before, behind = ids_around(tokenizer)
    if bos is None:
        unused = f" The config's bos_token_id {listed} is not used." if listed is not None else ""
        yield f"The tokenizer has no BOS: documents are separated by EOS.{unused}"
    elif before[:1] != [bos]:
        yield f"The tokenizer does not put its BOS (id {bos}) before a text: prompts are encoded without it."
    if bos is not None and listed is not None and listed != bos:
        yield f"The config says BOS is {listed}, the tokenizer says {bos}: the tokenizer's is used."
    if behind:
        names = " ".join(map(str, tokenizer.convert_ids_to_tokens(behind)))
        yield f"The tokenizer puts {names} behind every text: prompts are encoded without it."
    if not tokenizer.chat_template:
        yield "No chat template: tasks are asked bare; take corpus prompts, Magpie's cannot be made."


def _of_config(target: Target) -> Iterator[str]:
    shape, text = target.architecture, text_config(target.config)
    if shape.hidden_size % 256 or shape.intermediate_size % 256:
        yield "The target's own rows are not all multiples of 256: llama.cpp's K-quants do not fit it."
    window = getattr(text, "sliding_window", None)
    if window and window < shape.context_length:
        yield f"Sliding window of {window}: the draft attends to everything, so its cache can be rolled back."
    if switch := rope_switch(target.config):
        yield SWITCH.format(switch)
    if shape.stored and shape.read < 0.9 * shape.parameters and getattr(text, "num_experts_per_tok", None):
        yield (
            f"Mixture of experts: a token reads {format_count(shape.read)} of {format_count(shape.stored)}, "
            "but verifying several tokens reads more experts: gains are below the predicted ones."
        )
    if passed := target.check_tensors():
        more = f" and {len(passed) - 1} more" if passed[1:] else ""
        yield f"Not used of the checkpoint: {passed[0]}{more}."
    elif not target.files.is_local and target.files.header() is None:
        yield "The hub does not tell the names of the tensors: they are compared when the weights are loaded."
    if getattr(target.config, "quantization_config", None):
        yield "The target's weights are quantised: its library must be installed to run it."
