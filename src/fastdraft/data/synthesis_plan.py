"""What the target is asked, in which order: units of prompts, asked and committed together.

`Planner` makes a `SourcePlan` of each source; `Account` adds up the committed units and says whose is next.
Unit n of a source follows from recipe, seed and data alone, so that a killed run goes on as it would have.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from fastdraft.data import logs, prompts
from fastdraft.data.chat import ChatTemplate, Conversation
from fastdraft.data.filters import RowCounts
from fastdraft.data.logs import Transcript, read_transcripts, refused_digest
from fastdraft.data.prompts import normalised, select_prompts
from fastdraft.data.shards import PackedCorpus, open_corpus
from fastdraft.functional.generation import Sampling
from fastdraft.modeling.tokenizer import ids_around, rowless_tokens
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.recipe.synthesize import (
    CorpusPrompts,
    MagpiePrompts,
    PromptConfig,
    SynthesizeConfig,
    TextPrompts,
    TranscriptPrompts,
)
from fastdraft.run_folder import StageFolder, digest

# Prompts are sorted by length within this many units: those of a unit have similar lengths.
WINDOW = 8
DRY_UNITS = 4  # in a row of which no row was kept: the source is given up
MAX_INSTRUCTION_TOKENS = 256  # longer instructions of Magpie are left out


@dataclass(frozen=True)
class Unit:
    """Prompts that are asked together, at one temperature."""

    source: str
    temperature: float
    # Token ids. For Magpie all are the template's beginning; of conversations those of their first turns.
    prompts: tuple[list[int], ...] = ()
    instruction_tokens: int = 0  # for Magpie the most tokens of an instruction that the target writes itself
    conversations: tuple[Conversation, ...] = ()  # whose turns are asked one after the other
    transcripts: tuple[Transcript, ...] = ()  # answers of a log, all drawn alike: nothing is asked


@dataclass(frozen=True)
class SourcePlan:
    """One source's units, by number."""

    name: str
    share: float
    units: float  # how many there are; infinite for Magpie
    unit: Callable[[int], Unit]
    refused: dict[str, int] = field(default_factory=dict)  # prompts that are not asked, by reason
    note: str = ""  # what the user should know of it


class Account:
    """What the committed units add up to, entered in the order of their commits."""

    def __init__(self, plans: Sequence[SourcePlan]) -> None:
        self.plans, self.total = plans, RowCounts()
        self.by_source = {plan.name: RowCounts() for plan in plans}
        self.by_temperature: dict[float, RowCounts] = {}
        self.units_of = dict.fromkeys(self.by_source, 0)
        self._dry = dict.fromkeys(self.by_source, 0)

    @property
    def units(self) -> int:
        return sum(self.units_of.values())

    def add(self, source: str, temperature: float, counts: RowCounts) -> None:
        """Enters a committed unit."""
        at = self.by_temperature.setdefault(temperature, RowCounts())
        for account in (self.total, self.by_source[source], at):
            account.add(counts)
        self.units_of[source] += 1
        self._dry[source] = 0 if counts.written else self._dry[source] + 1

    def is_dry(self, source: str) -> bool:
        """Whether the source gives nothing any more."""
        return self._dry[source] >= DRY_UNITS

    def next_plan(self) -> SourcePlan | None:
        """The source furthest behind its share that still has a unit; None when all are used up."""
        left = [p for p in self.plans if not self.is_dry(p.name) and self.units_of[p.name] < p.units]
        return min(left, key=lambda plan: self.by_source[plan.name].tokens / plan.share, default=None)

    def ahead(self, tokens: int) -> Iterator[tuple[SourcePlan, int]]:
        """The units up to `tokens` as they will probably come, each source going on as it began."""
        coming, total = Account(self.plans), replace(self.total)
        coming.by_source = {name: replace(counts) for name, counts in self.by_source.items()}
        coming.units_of, coming._dry = dict(self.units_of), dict(self._dry)
        usual = self.total.tokens / max(self.units, 1) or 1.0
        while total.tokens < tokens and (plan := coming.next_plan()):
            number = coming.units_of[plan.name]
            yield plan, number
            given = coming.by_source[plan.name].tokens / number if number else usual
            counts = RowCounts(written=1, tokens=max(1, round(given)))
            coming.add(plan.name, 0.0, counts)
            total.add(counts if self.units else RowCounts())  # nothing is known before the first unit


def describe_sources(sources: Iterable[PromptConfig], held_out: Collection[str], seed: int) -> dict[str, Any]:
    """Each source by name for a fingerprint: settings, files, and the evaluation prompts refused in it."""

    def describe(source: PromptConfig) -> dict[str, Any]:
        if isinstance(source, TextPrompts):
            refused = select_prompts(source, held_out, seed).digest
            return {**prompts.describe(source), "refused_for_evaluation": refused}
        if isinstance(source, TranscriptPrompts):
            return {**logs.describe(source), "refused_for_evaluation": refused_digest(source, held_out)}
        return source.model_dump(mode="json")

    return {source.name: describe(source) for source in sources}


@dataclass(frozen=True)
class Planner:
    """Everything that turns the sources of a recipe into plans."""

    config: SynthesizeConfig
    chat: ChatTemplate
    vocabulary: Vocabulary
    held_out: Collection[str]  # normalised texts of every evaluation prompt
    seed: int
    prepared: Callable[[], StageFolder]  # the finished prepare stage; called for prefixes of a corpus only

    def plans(self) -> list[SourcePlan]:
        """Each source's units, in the order of the recipe."""
        return [self._plan(source, number) for number, source in enumerate(self.config.prompts)]

    def _plan(self, source: PromptConfig, number: int) -> SourcePlan:
        # Sources begin at different temperatures, so that few units hold all of them.
        start = number % len(self.config.temperatures)
        temperatures = self.config.temperatures[start:] + self.config.temperatures[:start]
        if isinstance(source, TranscriptPrompts):
            return self._log(source)
        if isinstance(source, MagpiePrompts):
            return self._magpie(source, temperatures)
        if isinstance(source, CorpusPrompts):
            prepared, before = self.prepared(), ids_around(self.chat.tokenizer)[0]
            rows, separator = (
                open_corpus(prepared, source.corpus, "train"),
                prepared.manifest()["separator_id"],
            )
            prefixes = CorpusPrefixes(rows, separator, source.prompt_tokens, before, self.seed)
            size = min(len(prefixes), source.count or len(prefixes))
            return self._prompts(source, temperatures, size, prefixes)
        chosen = select_prompts(source, self.held_out, self.seed)
        talks = [p if isinstance(p, Conversation) else Conversation((p,)) for p in chosen.prompts]
        rowless = rowless_tokens(self.chat.tokenizer).values()
        talks = [talk for talk in talks if not any(token in talk.text for token in rowless)]
        unknown = len(chosen.prompts) - len(talks)
        refused = chosen.refused | ({"unknown_id": unknown} if unknown else {})
        notes = [chosen.note]
        conversations = any(isinstance(prompt, Conversation) for prompt in chosen.prompts)
        if conversations or source.chat:  # refuses a template of no use before anything is loaded
            notes.append(self.chat.note(talks))

        def encode(place: int) -> list[int]:
            talk = talks[place]
            return self.chat.prompt_ids(talk if conversations else talk.text, chat=source.chat)

        plan = self._prompts(source, temperatures, len(talks), encode, talks if conversations else ())
        return replace(plan, refused=refused, note="; ".join(filter(None, notes)))

    def _prompts(
        self,
        source: TextPrompts | CorpusPrompts,
        temperatures: Sequence[float],
        size: int,
        encode: Callable[[int], list[int]],
        talks: Sequence[Conversation] = (),
    ) -> SourcePlan:
        """`encode` gives the token ids of prompt i of `size`, the same whenever asked."""
        rows, count = self.config.batch_rows, len(temperatures)
        # All prompts once, then all at their next temperature: a small budget is spent on many prompts.
        order = [
            (chunk, temperature)
            for turn in range(count * self.config.samples)
            for chunk in range(-(-size // rows))
            if (temperature := temperatures[(chunk + turn) % count]) > 0 or turn < count  # greedy once
        ]

        @lru_cache(maxsize=1)
        def window(number: int) -> list[list[int]]:
            """Prompts sorted by length and cut into chunks, the chunks in an order drawn from the seed."""
            prompts = range(number * WINDOW * rows, min(size, (number + 1) * WINDOW * rows))
            by_length = sorted(prompts, key=lambda i: len(encode(i)))
            chunks = [by_length[start : start + rows] for start in range(0, len(by_length), rows)]
            random.Random(f"{self.seed}/{source.name}/{number}").shuffle(chunks)
            return chunks

        def unit(number: int) -> Unit:
            chunk, temperature = order[number]
            chosen = window(chunk // WINDOW)[chunk % WINDOW]
            conversations = tuple(talks[i] for i in chosen) if talks else ()
            return Unit(source.name, temperature, tuple(map(encode, chosen)), conversations=conversations)

        return SourcePlan(source.name, source.share, len(order), unit)

    def _magpie(self, source: MagpiePrompts, temperatures: Sequence[float]) -> SourcePlan:
        prefix, rows = self.chat.user_prefix_ids(), self.config.batch_rows

        def unit(number: int) -> Unit:
            left = rows if source.count is None else min(rows, source.count - number * rows)
            temperature = temperatures[number % len(temperatures)]
            return Unit(source.name, temperature, (list(prefix),) * left, MAX_INSTRUCTION_TOKENS)

        units = math.inf if source.count is None else -(-source.count // rows)
        return SourcePlan(source.name, source.share, units, unit)

    def _log(self, source: TranscriptPrompts) -> SourcePlan:
        def is_evaluation(text: str) -> bool:
            return normalised(text) in self.held_out

        log = read_transcripts(source, self.chat, self.vocabulary, self.seed, is_evaluation)
        alike, rows = dict[Sampling, list[Transcript]](), self.config.batch_rows
        for answer in log.rows:
            alike.setdefault(answer.sampling, []).append(answer)
        units = [
            Unit(source.name, drawn.temperature, transcripts=tuple(answers[start : start + rows]))
            for drawn, answers in alike.items()
            for start in range(0, len(answers), rows)
        ]
        random.Random(f"{self.seed}/{source.name}").shuffle(units)
        return SourcePlan(source.name, source.share, len(units), units.__getitem__, log.refused, log.note)


def unit_seed(seed: int, source: str, number: int) -> int:
    """The seed of a source's unit, whichever units come before it: far from its neighbours', below 2**62."""
    return int(digest(["unit", seed, source, number])[:15], 16)


class CorpusPrefixes:
    """Prefixes of a prepared corpus, one for each row, at a document's start where the row holds one.

    `before` are ids that the tokenizer puts before plain text (a BOS id, or none).
    """

    def __init__(
        self, rows: PackedCorpus, separator_id: int, tokens: tuple[int, int], before: Sequence[int], seed: int
    ) -> None:
        self.rows, self.separator_id, self.prompt_tokens = rows, separator_id, tokens
        self.before, self.seed = list(before), seed
        self._order = np.random.default_rng([seed, 7]).permutation(rows.rows)

    def __len__(self) -> int:
        return int(self.rows.rows)

    def __call__(self, index: int) -> list[int]:
        """Prefix number `index`; shorter than asked only where every document in the row is."""
        row = [int(token) for token in self.rows[int(self._order[index])]]
        draw = random.Random(f"{self.seed}/prefix/{index}")
        length = draw.randint(*self.prompt_tokens)
        marks = [i for i, token in enumerate(row) if token == self.separator_id]
        # Pieces between separators as (before, behind); the first may be the rest of an earlier document.
        pieces = list(zip([-1, *marks], [*marks, len(row)], strict=True))
        long = [piece for piece in pieces if piece[1] - piece[0] - 1 >= self.prompt_tokens[0]]
        documents = [piece for piece in long if piece[0] >= 0]
        if documents:
            start, stop = draw.choice(documents)
        else:
            start, stop = max(long or pieces, key=lambda piece: piece[1] - piece[0])
        text = row[start + 1 : min(stop, start + 1 + length)] or row[:1]
        return [*self.before, *text] if start >= 0 else text
