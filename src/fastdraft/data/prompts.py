"""Prompts as a recipe's sources hold them: texts and conversations of JSONL files and hub data sets.

`select_prompts` reads a source, refuses prompts of evaluation tasks and shuffles the rest by the seed.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from fastdraft.data.chat import Conversation, Prompt, read_conversation
from fastdraft.data.corpora import JSONL, describe_files, find_files, hub_values, open_hub
from fastdraft.data.readers import field_values
from fastdraft.errors import DataError
from fastdraft.recipe.synthesize import HubPrompts, JsonlPrompts, TextPrompts

HUB_ROWS = 100_000  # read of a hub data set where the recipe sets no `count`: they are held in memory


@dataclass(frozen=True)
class SelectedPrompts:
    """A source's prompts in the order asked, and how many were refused before the target saw them."""

    prompts: list[Prompt]
    # By reason: `evaluation` (also a prompt of a task), `empty`, `repeated`, `unsupported` (tools, pictures).
    refused: dict[str, int]
    digest: str  # of the prompts refused because of evaluation: what the result depends on of the tasks


def read_prompts(source: TextPrompts) -> Iterator[Prompt | None]:
    """Every row's prompt; None for a conversation that cannot be asked again."""
    rows: Iterator[tuple[str, Any]] = iter(())  # (file and line, text or list of messages)
    if isinstance(source, HubPrompts):
        name = f"data set {source.dataset}"
        read = itertools.islice(hub_values(open_hub(source), name, source.field), source.count or HUB_ROWS)
        rows = ((f"{name}: row {number}", value) for number, value in read)
    if isinstance(source, JsonlPrompts):
        files = find_files(source.path, JSONL).values()
        rows = ((where, value) for file in files for _, where, value in field_values(file, source.field))
    for where, value in rows:
        yield value or "" if isinstance(value, str | None) else read_conversation(value, where)


def describe(source: TextPrompts) -> dict[str, Any]:
    """The settings and what they point at now, for fingerprints."""
    files = describe_files(find_files(source.path, JSONL)) if isinstance(source, JsonlPrompts) else {}
    return {**source.model_dump(mode="json"), **files}


def look(source: JsonlPrompts) -> None:
    """Reads the first row, so that a wrong path or key shows before hours of other work."""
    if next(read_prompts(source), None) is None:
        found = f"{source.path}: no prompt in it; must hold rows with the key '{source.field}'"
        raise DataError(found, "add rows or correct the path")


def normalised(text: str) -> str:
    """A prompt's text for comparisons: lower case, runs of white space as one blank."""
    return " ".join(text.lower().split())


def is_whole(text: str) -> bool:
    """False for half a surrogate pair, which JSON can hold ("\\ud83d") and no tokenizer takes."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def select_prompts(source: TextPrompts, held_out: Collection[str], seed: int) -> SelectedPrompts:
    """Reads a source without evaluation prompts (`held_out`, normalised), empty and repeated ones."""
    seen, met, prompts = set[str](), set[str](), list[Prompt]()
    refused = {"evaluation": 0, "empty": 0, "repeated": 0}
    for prompt in read_prompts(source):
        talk = Conversation((prompt,)) if isinstance(prompt, str) else prompt
        if prompt is None or talk is None or not is_whole(talk.text):
            refused["unsupported"] = refused.get("unsupported", 0) + 1
            continue
        key, said = normalised(talk.text), {normalised(words) for words in talk.users}
        forbidden = said.intersection(held_out)
        met |= forbidden
        if not any(said):
            refused["empty"] += 1
        elif forbidden:
            refused["evaluation"] += 1
        elif key in seen:
            refused["repeated"] += 1
        else:
            seen.add(key)
            prompts.append(prompt)
    if not prompts:
        found = f"prompts '{source.name}': {tell_counts(refused) or 'no prompt'}; at least one must be left"
        raise DataError(found, "add prompts or correct `path` and `field`")
    random.Random(f"{seed}/{source.name}").shuffle(prompts)
    return SelectedPrompts(prompts[: source.count], refused, digest_of(met))


def tell_counts(counts: dict[str, int]) -> str:
    """`3 empty, 1 repeated`, without what is none."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)


def digest_of(texts: Iterable[str]) -> str:
    """Of a set of texts; empty for none."""
    found = sorted(set(texts))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:20] if found else ""
