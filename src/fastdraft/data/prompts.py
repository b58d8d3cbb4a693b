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
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastdraft.data.chat import Conversation, Prompt, read_conversation
from fastdraft.data.readers import jsonl_values
from fastdraft.data.sources import HubSource, JsonlSource
from fastdraft.data.transcript_lines import TranscriptLog, TranscriptPrompts, read_entries
from fastdraft.errors import DataError
from fastdraft.recipe.base import Config, Count


class _Prompts(Config):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """How manifests and tables call this source."""
    share: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Part of the budget's tokens, relative to the other sources."""
    count: Count | None = Field(default=None, ge=1)
    """At most this many prompts, after the seeded shuffle; unset takes all."""


class TextPrompts(_Prompts):
    """A source that holds prompts as text or as conversations."""

    chat: bool = True
    """Puts each text into the target's chat template as a user message, if it has a template; else bare text. Conversations always go
    through the template if there is one."""

    def values(self) -> Iterator[tuple[str, Any]]:
        """(place, text or list of messages) as they stand in the source.

        Raises:
            DataError: when the source is missing or damaged.
        """
        raise NotImplementedError

    def prompts(self) -> Iterator[Prompt | None]:
        """Every row's prompt; None for a conversation that cannot be asked again.

        Raises:
            DataError: when the source is missing or damaged, or a row holds neither text nor messages.
        """
        for where, value in self.values():
            yield value or "" if isinstance(value, str | None) else read_conversation(value, where)

    def describe(self) -> dict[str, Any]:
        """The settings and what they point at now, for fingerprints."""
        raise NotImplementedError


class JsonlPrompts(TextPrompts):
    """JSON objects, one a line; plain, .gz, .xz or .zst."""

    kind: Literal["jsonl"] = "jsonl"
    """A JSONL file."""
    path: str = Field(min_length=1)
    """A file, a folder or a pattern; `shipped:` and `python:` names too."""
    field: str = "prompt"
    """The key that holds the prompt: text, or a list of messages whose every answer the target gives anew."""

    def _source(self) -> JsonlSource:
        return JsonlSource(name=self.name, path=self.path, field=self.field)

    def look(self) -> None:
        """Reads the first row, so that a wrong path or key shows before hours of other work.

        Raises:
            DataError: when there is no file, or its first row is damaged, or no row holds a prompt.
        """
        if next(self.prompts(), None) is None:
            raise DataError(
                self.path,
                "no prompt in it",
                f"must hold rows with the key '{self.field}'",
                "add rows or correct the path",
            )

    def values(self) -> Iterator[tuple[str, Any]]:
        for file in self._source().files():
            yield from jsonl_values(file.path, self.field)

    def describe(self) -> dict[str, Any]:
        return {**self.model_dump(), **self._source().describe()}


class HubPrompts(TextPrompts):
    """A data set of the Hugging Face hub, streamed from its beginning; needs the extra `datasets`."""

    kind: Literal["hub"] = "hub"
    """A hub data set."""
    dataset: str = Field(min_length=1)
    """Hub id."""
    subset: str | None = None
    """The data set's configuration."""
    split: str = "train"
    """The data set's split."""
    revision: str | None = None
    """Commit to pin, so that a resumed run reads the same rows."""
    field: str = "prompt"
    """The column that holds the prompt: text, or a list of messages whose every answer the target gives anew."""
    count: Count | None = Field(default=100_000, ge=1)
    """Rows read from the beginning of the data set; they are held in memory."""

    def values(self) -> Iterator[tuple[str, Any]]:
        source = HubSource(
            **self.model_dump(include={"name", "dataset", "subset", "split", "revision", "field"})
        )
        return itertools.islice(source.values(), self.count)

    def describe(self) -> dict[str, Any]:
        return self.model_dump()


class MagpiePrompts(_Prompts):
    """The target writes the instruction itself, given only the chat template's beginning (Magpie, arXiv 2406.08464)."""

    kind: Literal["magpie"] = "magpie"
    """The target's own instructions."""
    max_instruction_tokens: int = Field(default=256, ge=8)
    """Longer instructions are left out."""


class CorpusPrompts(_Prompts):
    """Beginnings of prepared documents, continued without template: how base models write, and code and prose in any model."""

    kind: Literal["corpus"] = "corpus"
    """Prefixes of a prepared corpus."""
    corpus: str = Field(min_length=1)
    """One of `prepare.corpora`; only its training split is used."""
    prompt_tokens: tuple[int, int] = (16, 128)
    """Shortest and longest prefix, in tokens; drawn evenly."""

    @model_validator(mode="after")
    def _ordered(self) -> CorpusPrompts:
        if not 1 <= self.prompt_tokens[0] <= self.prompt_tokens[1]:
            raise ValueError("prompt_tokens must be [shortest, longest] with 1 <= shortest <= longest")
        return self


PromptConfig = Annotated[
    JsonlPrompts | HubPrompts | MagpiePrompts | CorpusPrompts | TranscriptPrompts, Field(discriminator="kind")
]
"""One entry of `synthesize.prompts`, told apart by `kind`."""


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
    for text in config.prompts():
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
