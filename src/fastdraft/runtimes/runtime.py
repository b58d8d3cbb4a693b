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
from fastdraft.decoding.speculative import Round
from fastdraft.functional.acceptance import Counts, add_counts
from fastdraft.functional.generation import Sampling
from fastdraft.target import Target


@dataclass(frozen=True)
class TimedText:
    """One answer and when it came, in seconds from handing over the batch."""

    response_ids: list[int]
    seconds: float  # to its last token
    first_token_seconds: float
    rounds: list[Round] = field(
        default_factory=list
    )  # as functional/acceptance.py counts; empty without a draft

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
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[TimedText]:
        """The target alone answers all prompts at the same time."""

    def write_with_draft(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        num_speculative_tokens: int,
        *,
        exact_counts: bool = False,
    ) -> list[TimedText]:
        """`exact_counts` counts the round at a text's end exactly, at the cost of more passes."""

    def gap(self, prefix_ids: list[int], first: int, second: int) -> float:
        """Distance of the log-probs of two next tokens under the target, as exactly as the runtime can."""

    def time_spent(
        self, prompt: Sequence[int], max_new_tokens: int, num_speculative_tokens: int
    ) -> TimeSpent | None:
        """Where the time of one greedy answer goes; None where the runtime does not tell."""


class Runtime(Protocol):
    """How models run: the runtime and its settings."""

    name: ClassVar[str]
    lossless_sampling: ClassVar[bool]  # whether text sampled with a draft follows the target alone

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

    def measure_passes(
        self, target: Path, draft: Path, widths: Sequence[int], prefix_tokens: int
    ) -> Latency | None:
        """Single passes of two exports behind a prefix; None where the runtime cannot be asked for one."""

    def open(self, target: Path, draft: Path) -> LoadedPair: ...

    def launch_line(self, target: str, draft: str, num_speculative_tokens: int) -> str:
        """What a user types to run the pair so."""
