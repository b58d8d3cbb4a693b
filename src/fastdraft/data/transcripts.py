"""Logs of a target as rows: prompts with the answers that it gave, in token ids.

Decides that an answer is taken as it stands, which answers are counted and left out, and that lines whose conversations begin with the
same words belong together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastdraft.data.chat import render_prompt
from fastdraft.data.openai_format import AnswerReader, Choice
from fastdraft.data.rows import ids_hash
from fastdraft.data.transcript_lines import Entry, read_entries
from fastdraft.errors import DataError, TargetError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.recipe.data import TranscriptLog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdraft.modeling.vocabulary import Vocabulary


@dataclass(frozen=True)
class Transcript:
    """One answer of a log."""

    generation: Generation
    sampling: Sampling
    chat: bool
    """The prompt was a conversation."""
    key: str = ""
    """Of a later turn the hash of its conversation's first prompt, with whose rows it belongs; else empty."""


@dataclass(frozen=True)
class Transcripts:
    """A log's answers, and how many were refused before they were looked at."""

    rows: list[Transcript]
    refused: dict[str, int] = field(default_factory=dict)
    """`evaluation` (the prompt is one of an evaluation task), `empty`, `unrendered` (the chat template refuses the conversation, or the
    text is no unicode), `no_answer` (the logged call failed), `unsupported` (tools, pictures)."""


def read_transcripts(
    config: TranscriptLog,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    seed: int,
    is_evaluation: Callable[[str], bool] = lambda text: False,
    *,
    shuffled: bool = True,
) -> Transcripts:
    """Every answer of a log as the target's own text in token ids.

    Args:
        config: The log.
        tokenizer: The target's.
        vocabulary: Says which ids end an answer.
        seed: Of the order, and of which answers `count` leaves.
        is_evaluation: Whether a text is a prompt of an evaluation task.
        shuffled: Brings the answers into seeded order; false keeps the log's.

    Raises:
        DataError: when a line is damaged or no answer is left.
    """
    readers = {
        kind: AnswerReader(tokenizer, vocabulary.eos_token_ids, vocabulary.size, kind)
        for kind in ("none", config.logprobs)
    }
    refused = {"evaluation": 0, "empty": 0, "unrendered": 0, "no_answer": 0, "unsupported": 0}
    rows: list[Transcript] = []
    for entry in read_entries(config):
        if entry.refused:
            refused[entry.refused] += 1
            continue
        if any(map(is_evaluation, filter(None, entry.texts))):
            refused["evaluation"] += len(entry.choices)
            continue
        try:
            prompt = _prompt_ids(entry, tokenizer)
            key = ids_hash(render_prompt(tokenizer, entry.first_turn)) if entry.first_turn else ""
        except (TargetError, UnicodeEncodeError):
            refused["unrendered"] += len(entry.choices)
            continue
        if not prompt:
            refused["empty"] += len(entry.choices)
            continue
        reader = readers["none" if entry.bent else config.logprobs]
        chat = entry.messages is not None
        rows += [
            Transcript(_generation(reader, prompt, choice, entry), entry.sampling, chat, key)
            for choice in entry.choices
        ]
    if not rows:
        found = ", ".join(f"{count} {reason}" for reason, count in refused.items() if count) or "no answer"
        raise DataError(
            f"transcripts '{config.name}'",
            found,
            "at least one answer must be left",
            "add answers or correct `path`",
        )
    order = list(range(len(rows)))
    random.Random(f"{seed}/{config.name}").shuffle(order)
    chosen = order[: config.count]
    return Transcripts([rows[place] for place in (chosen if shuffled else sorted(chosen))], refused)


def _prompt_ids(entry: Entry, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if entry.messages is not None:
        "".join(message["content"] for message in entry.messages).encode()
        return render_prompt(tokenizer, entry.messages)
    if isinstance(entry.prompt, str):
        entry.prompt.encode()  # half a character alone (a lone surrogate) cannot be read
        return [int(token) for token in tokenizer(entry.prompt, verbose=False).input_ids]
    return list(entry.prompt)


def _generation(reader: AnswerReader, prompt: Sequence[int], choice: Choice, entry: Entry) -> Generation:
    """The logged prompt ids count where there are any: they are what the target read."""
    if choice.prompt_ids:
        prompt = choice.prompt_ids
    if any(not 0 <= token_id < reader.vocabulary_size for token_id in prompt):
        return Generation([], [], [], "length", fault="unknown_id")
    if not choice.prompt_ids and choice.num_prompt_tokens not in (None, len(prompt)):
        return Generation(list(prompt), [], [], "length", fault="prompt_read_otherwise")
    if choice.logprobs and any(map(math.isnan, choice.logprobs)):
        return Generation(list(prompt), [], [], "length", fault="not_finite")
    return reader.generation(prompt, choice, entry.sampling)
