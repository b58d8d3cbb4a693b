"""Where prompts come from: files, hub data sets, the target itself (Magpie), prefixes of a prepared corpus, logs of the target.

Decides each source's recipe keys, that a prompt of an evaluation task is refused as a training prompt however it is spaced
or capitalised, that empty and repeated prompts are left out, and that the order of a file is drawn from the seed. A row
holds text or a whole conversation.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fastdraft.data.chat import Conversation, Prompt, read_conversation
from fastdraft.data.corpora import JSONL, describe_files, find_files, hub_values, open_hub
from fastdraft.data.readers import jsonl_values
from fastdraft.data.transcript_lines import read_entries
from fastdraft.errors import DataError
from fastdraft.recipe.data import HubPrompts, JsonlPrompts, TextPrompts, TranscriptLog


def values(source: TextPrompts) -> Iterator[tuple[str, Any]]:
    """(where it stands, text or list of messages) of each row of the source."""
    if isinstance(source, HubPrompts):
        name = f"data set {source.dataset}"
        for row, value in itertools.islice(
            hub_values(open_hub(source), name, source.field), source.count or 100_000
        ):
            yield f"{name} row {row}", value
    elif isinstance(source, JsonlPrompts):
        for path in find_files(source.path, JSONL).values():
            for line, value in jsonl_values(path, source.field):
                yield f"{path} line {line}", value


def prompts(source: TextPrompts) -> Iterator[Prompt | None]:
    """Every row's prompt; None for a conversation that cannot be asked again."""
    for where, value in values(source):
        yield value or "" if isinstance(value, str | None) else read_conversation(value, where)


def look(source: JsonlPrompts) -> None:
    """Reads the first row, so that a wrong path or key shows before hours of other work."""
    if next(prompts(source), None) is None:
        message = f"{source.path}: no prompt in it: must hold rows with the key '{source.field}'"
        raise DataError(message, "add rows or correct the path")


def describe(source: TextPrompts) -> dict[str, Any]:
    """The settings and what they point at now, for fingerprints."""
    files = describe_files(find_files(source.path, JSONL)) if isinstance(source, JsonlPrompts) else {}
    return {**source.model_dump(), **files}


def normalised(text: str) -> str:
    """A prompt's text for comparisons: lower case, runs of white space as one blank."""
    return " ".join(text.lower().split())


@dataclass(frozen=True)
class PromptTexts:
    """A text source's prompts in the order asked, and how many were refused before the target saw them."""

    texts: list[Prompt]
    refused: dict[str, int]
    """`evaluation` (also a prompt of an evaluation task), `empty`, `repeated`, `unsupported` (tools, pictures, late system messages)."""
    digest: str
    """Of the prompts refused because of evaluation: what the result depends on of the tasks."""


def select_texts(config: TextPrompts, evaluation: Iterable[str], seed: int) -> PromptTexts:
    """Reads a text source, refuses evaluation prompts, empty and repeated ones, and shuffles the rest.

    Args:
        config: The source.
        evaluation: Normalised texts of every evaluation prompt.
        seed: Of the shuffle.

    Raises:
        DataError: when the source is missing, damaged, or nothing is left.
    """
    held_out = set(evaluation)
    seen: set[str] = set()
    texts: list[Prompt] = []
    refused = {"evaluation": 0, "empty": 0, "repeated": 0}
    met: set[str] = set()
    for text in prompts(config):
        if text is None:
            refused["unsupported"] = refused.get("unsupported", 0) + 1
            continue
        key, said = _keys(text)
        reason = (
            "empty"
            if not any(said)
            else "evaluation"
            if not held_out.isdisjoint(said)
            else "repeated"
            if key in seen
            else None
        )
        if reason == "evaluation":
            met.update(held_out.intersection(said))
        if reason:
            refused[reason] += 1
        else:
            seen.add(key)
            texts.append(text)
    if not texts:
        found = ", ".join(f"{count} {reason}" for reason, count in refused.items() if count) or "no prompt"
        raise DataError(
            f"prompts '{config.name}'",
            found,
            "at least one prompt must be left",
            "add prompts or correct `path` and `field`",
        )
    random.Random(f"{seed}/{config.name}").shuffle(texts)
    digest = hashlib.sha256("\n".join(sorted(met)).encode()).hexdigest()[:20] if met else ""
    return PromptTexts(texts[: config.count], refused, digest)


def refused_transcripts(config: TranscriptLog, evaluation: Iterable[str]) -> str:
    """Digest of the log's prompts that are evaluation prompts too; empty without any."""
    held_out = set(evaluation)
    met = (
        {
            key
            for entry in read_entries(config)
            for text in entry.texts
            if (key := normalised(text)) in held_out
        }
        if held_out
        else set()
    )
    return hashlib.sha256("\n".join(sorted(met)).encode()).hexdigest()[:20] if met else ""


def _keys(prompt: Prompt) -> tuple[str, list[str]]:
    """What tells a prompt from others, and each thing that its user says, normalised."""
    if isinstance(prompt, Conversation):
        return normalised(prompt.text), [normalised(words) for words in prompt.users]
    key = normalised(prompt)
    return key, [key]
