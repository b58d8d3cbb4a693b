"""What a runtime must offer so that its wall clock can be measured with and without a draft.

Decides the two things that every runtime's adapter is asked for: texts with the times at which they came, and, with a
draft, the rounds in which they came. Which runs are made, in which order and how often, and what follows from them, is
in wall_clock_runs.py and wall_clock_rows.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastdraft.decoding.speculative import Round
from fastdraft.functional.acceptance import Counts, add_counts
from fastdraft.functional.generation import Sampling


@dataclass(frozen=True)
class TimedText:
    """One answer and when it came."""

    response_ids: list[int]
    seconds: float
    """From handing over the batch to this answer's last token."""
    first_token_seconds: float
    """From handing over the batch to this answer's first token."""
    rounds: list[Round] = field(default_factory=list)
    """In our conventions; empty without a draft."""

    @property
    def counts(self) -> Counts:
        """The rounds added up."""
        return add_counts(r.counts for r in self.rounds)


@dataclass(frozen=True)
class TimedBatch:
    """Answers that were asked for at the same moment."""

    texts: list[TimedText]
    seconds: float
    """From handing over the batch to the last token of all."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(text.response_ids) for text in self.texts)


class Contender(Protocol):
    """A loaded target, alone or with a draft at a fixed K, that answers prompts and says how long it took."""

    lossless_sampling: bool
    """Whether text sampled at a temperature above 0 follows the target alone."""

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        *,
        exact_counts: bool = False,
    ) -> TimedBatch:
        """Answers all prompts at the same time.

        Args:
            prompts: Token ids.
            sampling: Temperature 0 is greedy.
            max_new_tokens: Most tokens of each answer.
            seed: Of the sampling.
            exact_counts: Counts the round at a text's end exactly, at the cost of more passes; not for timing.
        """
        ...
