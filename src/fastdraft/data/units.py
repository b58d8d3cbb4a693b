"""The plan of what the target is asked: units of prompts, each asked together at one temperature and committed together.

Decides that unit n of a source follows from the recipe, the seed and the source's data alone; that the prompts of a unit
have similar lengths (they are sorted inside a window of a few units, whose order is drawn from the seed); and that every
prompt is asked once before any is asked at a second temperature, so that a small budget is spent on many prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from fastdraft.data.chat import Conversation
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.run_folder import digest

if TYPE_CHECKING:
    from fastdraft.data.shards import PackedCorpus
    from fastdraft.data.transcripts import Transcript

UNITS_PER_WINDOW = 8
"""Prompts are sorted by length within this many units."""


@dataclass(frozen=True)
class Unit:
    """Prompts that are asked together, at one temperature."""

    source: str
    temperature: float
    prompts: tuple[list[int], ...]
    """Token ids. For Magpie all are the template's beginning."""
    chat: bool
    """The answers have an end of their own."""
    instruction_tokens: int = 0
    """For Magpie the most tokens of an instruction that the target writes itself; 0 for every other source."""
    answers: tuple[Generation, ...] = ()
    """Answers that stand already (transcripts), one for each prompt: nothing is asked."""
    keys: tuple[str, ...] = ()
    """For each answer the key with whose rows it is held out; empty: its own prompt's."""
    sampling: Sampling | None = None
    """How these were drawn."""
    conversations: tuple[Conversation, ...] = ()
    """Whose first turns `prompts` are, where all turns are asked one after the other."""


@dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """One source's units, by number."""

    name: str
    """The source's."""
    size: int | None
    """Number of prompts; None is endless (Magpie)."""
    encode: Callable[[int], list[int]]
    """Token ids of prompt i, the same whenever asked."""
    temperatures: Sequence[float]
    """Taken in turn, unit by unit."""
    samples: int = 1
    """Answers for each prompt at each temperature above 0; greedy is asked once."""
    unit_rows: int = 64
    seed: int = 0
    """Of the order in which a window's units come."""
    chat: bool = True
    """The answers have an end of their own."""
    instruction_tokens: int = 0
    """Above 0 for Magpie, whose prompts are the template's beginning."""
    conversation: Callable[[int], Conversation] | None = None
    """The conversation that prompt i opens, for sources of conversations."""
    share: float = 1.0
    """Part of the budget's tokens, relative to other sources."""

    @cached_property
    def _turns(self) -> list[list[tuple[int, float]]]:
        """(chunk, temperature) in the order asked: all chunks once, then all at their next temperature, and so on."""
        count, chunks = len(self.temperatures), -(-(self.size or 0) // self.unit_rows)
        turns = [
            [(chunk, self.temperatures[(chunk + turn) % count]) for chunk in range(chunks)]
            for turn in range(count * self.samples)
        ]
        return [
            [place for place in places if place[1] > 0 or turn < count] for turn, places in enumerate(turns)
        ]

    def unit(self, number: int) -> Unit | None:
        """The source's unit of that number; None behind the last."""
        if self.size is None:
            prompts = tuple(self.encode(0) for _ in range(self.unit_rows))
            return Unit(
                self.name,
                self.temperatures[number % len(self.temperatures)],
                prompts,
                self.chat,
                self.instruction_tokens,
            )
        for places in self._turns:
            if number < len(places):
                chunk, temperature = places[number]
                chosen = self._chunk(chunk)
                prompts = tuple(self.encode(i) for i in chosen)
                conversations = tuple(self.conversation(i) for i in chosen) if self.conversation else ()
                return Unit(
                    self.name,
                    temperature,
                    prompts,
                    self.chat,
                    self.instruction_tokens,
                    conversations=conversations,
                )
            number -= len(places)
        return None

    def has_unit(self, number: int) -> bool:
        """Whether the source has a unit of that number; no prompt is read to tell."""
        return self.size is None or number < sum(map(len, self._turns))

    def _chunk(self, chunk: int) -> list[int]:
        """Numbers of a chunk's prompts."""
        window, place = divmod(chunk, UNITS_PER_WINDOW)
        if window not in self._windows:
            self._windows.clear()
            self._windows[window] = self._window(window)
        return self._windows[window][place]

    @cached_property
    def _windows(self) -> dict[int, list[list[int]]]:
        """The window looked at last, for its other chunks."""
        return {}

    def _window(self, window: int) -> list[list[int]]:
        """Numbers of a window's prompts sorted by length and cut into chunks, the chunks in an order drawn from the seed."""
        rows = UNITS_PER_WINDOW * self.unit_rows
        prompts = sorted(
            range(window * rows, min(self.size or 0, (window + 1) * rows)), key=lambda i: len(self.encode(i))
        )
        chunks = [prompts[start : start + self.unit_rows] for start in range(0, len(prompts), self.unit_rows)]
        random.Random(f"{self.seed}/{self.name}/{window}").shuffle(chunks)
        return chunks


class Plan(Protocol):
    """One source's units, by number: what `UnitPlan` and `StandingPlan` have in common."""

    @property
    def name(self) -> str: ...
    @property
    def share(self) -> float: ...
    def unit(self, number: int) -> Unit | None: ...
    def has_unit(self, number: int) -> bool: ...


class StandingPlan:
    """Units of answers that stand already, each drawn in one way.

    Args:
        name: The source's.
        rows: The answers, in seeded order.
        share: Part of the budget's tokens.
        unit_rows: Answers in a unit.
        seed: Of the order of the units.
    """

    def __init__(
        self, name: str, rows: Sequence[Transcript], *, share: float, unit_rows: int, seed: int
    ) -> None:
        self.name, self.share = name, share
        alike: dict[tuple[Sampling, bool], list[Transcript]] = {}
        for row in rows:
            alike.setdefault((row.sampling, row.chat), []).append(row)
        chunks = [
            (key, group[i : i + unit_rows])
            for key, group in alike.items()
            for i in range(0, len(group), unit_rows)
        ]
        random.Random(f"{seed}/{name}").shuffle(chunks)
        self._units = [
            Unit(
                name,
                key[0].temperature,
                tuple(row.generation.prompt_ids for row in chunk),
                key[1],
                answers=tuple(row.generation for row in chunk),
                keys=tuple(row.key for row in chunk),
                sampling=key[0],
            )
            for key, chunk in chunks
        ]

    def unit(self, number: int) -> Unit | None:
        """The unit of that number; None behind the last."""
        return self._units[number] if number < len(self._units) else None

    def has_unit(self, number: int) -> bool:
        return number < len(self._units)


def unit_seed(seed: int, index: int) -> int:
    """The seed of unit `index`: far from those of its neighbours, below 2**62."""
    return int(digest(["unit", seed, index])[:15], 16)


class CorpusPrefixes:
    """Prefixes of a prepared corpus, one for each row, at a document's start where the row holds one.

    Args:
        rows: The training split.
        separator_id: Stands before every document.
        prompt_tokens: Shortest and longest prefix.
        before: Ids that the tokenizer puts before plain text (a BOS id, or none).
        seed: Of the order of rows and of every draw.
    """

    def __init__(
        self,
        rows: PackedCorpus,
        separator_id: int,
        prompt_tokens: tuple[int, int],
        before: Sequence[int],
        seed: int,
    ) -> None:
        import numpy as np

        self.rows, self.separator_id, self.prompt_tokens, self.before, self.seed = (
            rows,
            separator_id,
            prompt_tokens,
            list(before),
            seed,
        )
        self._order = np.random.default_rng([seed, 7]).permutation(rows.rows)

    def __len__(self) -> int:
        return int(self.rows.rows)

    def __call__(self, index: int) -> list[int]:
        """Prefix number `index`; shorter than asked only where every document in the row is."""
        row = [int(token) for token in self.rows[int(self._order[index])]]
        draw = random.Random(f"{self.seed}/prefix/{index}")
        length = draw.randint(*self.prompt_tokens)
        marks = [i for i, token in enumerate(row) if token == self.separator_id]
        # Pieces between separators as (place before, place behind); the first may be the rest of an earlier row's document.
        pieces = list(zip([-1, *marks], [*marks, len(row)], strict=True))
        long = [piece for piece in pieces if piece[1] - piece[0] - 1 >= self.prompt_tokens[0]]
        documents = [piece for piece in long if piece[0] >= 0]
        start, stop = (
            draw.choice(documents)
            if documents
            else max(long or pieces, key=lambda piece: piece[1] - piece[0])
        )
        text = row[start + 1 : min(stop, start + 1 + length)] or row[:1]
        return [*self.before, *text] if start >= 0 else text
