"""What the benchmark asks of a runtime: one `Runtime` for each, one `LoadedPair` for two models in it.

A runtime is a frozen dataclass of plain settings (device, threads, ...), so that another process can make the
same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from fastdraft.decoding.latency import Latency
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.decoding.speculative import Round
from fastdraft.functional.acceptance import Counts, add_counts
from fastdraft.functional.generation import Sampling
from fastdraft.functional.lookup import Lookups
from fastdraft.target import Target


@dataclass(frozen=True)
class Proposer:
    """What proposes tokens to the target, and at most how many in a round."""

    kind: ProposerKind
    num_speculative_tokens: int
    num_lookup_tokens: int | None = None  # of lookup with a draft behind it; None: as many

    def __str__(self) -> str:
        looked_up = "" if self.num_lookup_tokens is None else f"-n{self.num_lookup_tokens}"
        return f"{self.kind}-k{self.num_speculative_tokens}{looked_up}"

    @property
    def lookup_tokens(self) -> int:
        """The most of a round of lookup."""
        return self.num_speculative_tokens if self.num_lookup_tokens is None else self.num_lookup_tokens

    @property
    def most(self) -> int:
        """The most that any round proposes."""
        return max(self.num_speculative_tokens, self.num_lookup_tokens or 0)


@dataclass(frozen=True)
class TimedText:
    """One answer and when it came, in seconds from handing over the batch."""

    response_ids: list[int]
    seconds: float  # to its last token
    first_token_seconds: float
    # As functional/acceptance.py counts; empty of the target alone, and where a runtime does not tell.
    rounds: list[Round] = field(default_factory=list)

    @property
    def counts(self) -> Counts:
        return add_counts(r.counts for r in self.rounds)


@dataclass(frozen=True)
class TimeSpent:
    """Where an answer's time went, by the runtime's own clocks; the rest is the runtime's own work."""

    target_seconds: float
    draft_seconds: float
    total_seconds: float


class LoadedPair(Protocol):
    """A target and its draft; each is loaded when it is first needed and let go with this object."""

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        proposer: Proposer | None = None,
        *,
        exact_counts: bool = False,
    ) -> list[TimedText]:
        """The target answers all prompts at the same time, alone or with one of the runtime's `proposers`.

        `exact_counts` counts the round at a text's end exactly, at the cost of more passes. Of prompt lookup
        only the tokens of each round and how many of them were proposals are used: not what was refused.
        """

    def gap(self, prefix_ids: list[int], first: int, second: int) -> float:
        """Distance of the log-probs of two next tokens under the target, as exactly as the runtime can."""

    def time_spent(
        self, prompt: Sequence[int], max_new_tokens: int, num_speculative_tokens: int
    ) -> TimeSpent | None:
        """Where the time of one greedy answer with the draft goes; None where the runtime does not tell."""


class Runtime(Protocol):
    """How models run: the runtime and its settings."""

    name: ClassVar[str]
    exports: ClassVar[str]  # the form of the models that it loads, which runtimes may share
    proposers: ClassVar[tuple[ProposerKind, ...]]  # what it can run
    greedy_proposals: ClassVar[bool]  # whether a draft proposes its likeliest token to sampled text too
    serves: ClassVar[
        bool
    ]  # a server: texts share passes, and its memory is a setting rather than a measurement

    @property
    def lossless_sampling(self) -> bool: ...  # whether text sampled with a proposer follows the target alone

    @property
    def device(self) -> str: ...

    @property
    def draft_device(self) -> str: ...  # "" is the target's

    def describe(self) -> dict[str, Any]:
        """`runtime` of benchmark.json; refuses a device that is not there."""

    def check_pair(self, target: Target, draft: Target) -> None:
        """Refuses, before anything is loaded, a draft that the runtime could not run for this target."""

    def export(self, source: Target, folder: Path, weights: str, target: Path | None = None) -> None:
        """Writes a model as the runtime loads it; a draft is tried with the exported `target`."""

    def weights_bytes(self, exported: Path) -> int: ...

    def bytes_per_token(self, model: Target, exported: Path, weights: str) -> float:
        """What an exported model reads of its weights for one token."""

    def measure_passes(
        self, target: Path, draft: Path, widths: Sequence[int], prefix_tokens: int, texts: Sequence[int]
    ) -> Latency | None:
        """Single passes of two exports behind a prefix; None where the runtime cannot be asked for one.

        `texts` are the numbers of texts at a time, [1] but for a server.
        """

    def look_up(
        self, prompt: Sequence[int], response: Sequence[int], num_speculative_tokens: int
    ) -> Lookups | None:
        """What its prompt lookup proposes at every place of a text; None where its rule is not known here."""

    def open(self, target: Path, draft: Path) -> LoadedPair: ...

    def launch_line(self, target: str, draft: str, proposer: Proposer) -> str:
        """What a user types to run the pair so; `target` and `draft` are their weights."""
