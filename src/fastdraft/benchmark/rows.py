"""`benchmark.json` as dataclasses, and the rules for which of its rows a verdict may rest on.

`BenchmarkResults.from_json(read_json(path))`; written by the benchmark stage, read by reports.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

from fastdraft.decoding.proposers import ProposerKind
from fastdraft.evaluation.results import TASK_ORDER, ordered
from fastdraft.forecast import WORTH
from fastdraft.json_rows import JsonRow, Number

PROPOSERS: tuple[ProposerKind, ...] = ("lookup", "draft", "lookup_draft")
Pair = tuple[str, str, str]  # the runtime, the weights of the target and of the draft


class OfPair:
    """What is about a pair of weights in a runtime."""

    runtime: str
    target_weights: str
    draft_weights: str

    @property
    def key(self) -> Pair:
        return self.runtime, *self.weights

    @property
    def weights(self) -> tuple[str, str]:
        return self.target_weights, self.draft_weights

    @property
    def pair(self) -> str:
        """`int4 + int8`, kept on one line."""
        return "\u00a0+\u00a0".join(self.weights)


@dataclass(frozen=True, kw_only=True)
class TextDifference(JsonRow):
    """A greedy text that is not the same with the draft."""

    prompt: str
    token: int  # index of the first token that differs
    logprob_gap: float | None  # between the two tokens there under the target; None where one text ends


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow(OfPair, JsonRow):
    """One task under the clock, alone and with a proposer; null what cannot be computed.

    What is called `with_draft` is with this row's proposer. Of prompt lookup no runtime tells what was
    proposed and refused, only what was accepted. Its rows name the pair beside which it was timed.
    """

    part: str  # `tasks`, or what alone is varied: `prompt_tokens`, `max_new_tokens`, `concurrency`
    task: str
    target_weights: str
    draft_weights: str
    temperature: float
    num_speculative_tokens: int | None
    confidence_threshold: float = 0.0  # every round proposes K tokens
    concurrency: int = 1
    prompt_tokens: float | None = None
    max_new_tokens: int
    num_prompts: int
    repeats: int
    num_drafts: Number | None = None
    num_draft_tokens: Number | None = None
    num_accepted_tokens: Number | None = None
    num_accepted_tokens_per_pos: list[Number | None]
    num_generated_tokens: Number | None = None
    num_examined_tokens: Number | None = None
    acceptance_rate: float | None = None
    conditional_acceptance_rate: float | None = None
    block_efficiency: float | None = None
    num_tokens_alone: int
    num_tokens_with_draft: int
    seconds_alone: float | None = None
    seconds_alone_low: float | None = None
    seconds_alone_high: float | None = None
    seconds_with_draft: float | None = None
    seconds_with_draft_low: float | None = None
    seconds_with_draft_high: float | None = None
    tokens_per_second_alone: float | None = None
    tokens_per_second_with_draft: float | None = None
    speedup: float | None = None  # median over the repeats of seconds per token alone / with the draft
    speedup_low: float | None = None
    speedup_high: float | None = None
    decode_speedup: float | None = None  # behind each text's first token
    first_token_seconds_alone: float | None = None
    first_token_seconds_with_draft: float | None = None
    seconds_per_output_token_alone: float | None = None
    seconds_per_output_token_with_draft: float | None = None
    predicted_speedup: float | None = None
    predicted_quotient: float | None = None
    decode_quotient: float | None = None
    mbsu_bytes: float | None = None
    mbsu_quotient: float | None = None
    texts: int
    same_text: int | None = None
    differences: list[TextDifference] = field(default_factory=list)
    looping_share: float | None = None
    lossless: bool
    speedup_without_looping: float | None = None
    runtime: str = "openvino"
    proposer: str = "draft"  # or `lookup`, `lookup_draft`: runtimes/runtime.py says what they are
    # What replay of greedy proposals over these very texts predicts, to stand beside the counts.
    replayed_accepted_tokens: Number | None = None
    replayed_block_efficiency: float | None = None
    num_lookup_tokens: int | None = None  # of lookup before a draft, where it is not K

    def interval(self, key: str) -> tuple[float, float] | None:
        """The range of a figure over the repeats."""
        low, high = getattr(self, f"{key}_low", None), getattr(self, f"{key}_high", None)
        return None if low is None or high is None else (low, high)


@dataclass(frozen=True, kw_only=True)
class PassesRow(OfPair, JsonRow):
    """What one pass of each model takes alone, behind a prefix."""

    target_weights: str
    draft_weights: str
    prefix_tokens: int
    draft_seconds: float
    target_seconds: dict[int, float]  # by the tokens read at once
    device: str
    draft_device: str
    runtime: str = "openvino"
    draft_seconds_by_texts: dict[int, float] = field(default_factory=dict)  # of a server: one token of each
    draft_seconds_more: float = 0.0  # what each token more, read in the same pass of the draft, adds


@dataclass(frozen=True, kw_only=True)
class AtATimeRow(OfPair, JsonRow):
    """Up to how many texts at a time a draft pays (0: not even one), and the speed-ups by their number."""

    target_weights: str
    draft_weights: str
    num_speculative_tokens: int
    measured: int
    predicted: int
    measured_speedup: dict[int, float]
    predicted_speedup: dict[int, float]
    runtime: str

    @property
    def sentence(self) -> str:
        """For example `The draft pays up to 4 texts at a time (K = 3; predicted: 16, of at most 64).`"""
        most, curve = max(self.measured_speedup), max(self.predicted_speedup)
        paper = f"K = {self.num_speculative_tokens}; predicted: {self.predicted}, of at most {curve}"
        if not self.measured:
            return f"The draft does not pay for one text at a time ({paper})."
        beyond = " or more" if self.measured == most else ""
        texts = "one text" if self.measured == 1 else f"{self.measured} texts"
        return f"The draft pays up to {texts}{beyond} at a time ({paper})."


@dataclass(frozen=True, kw_only=True)
class BreakdownRow(OfPair, JsonRow):
    """Where the time of a speculative run goes, by the runtime's own clock."""

    target_weights: str
    draft_weights: str
    num_speculative_tokens: int
    target_seconds: float
    draft_seconds: float
    other_seconds: float
    total_seconds: float
    runtime: str = "openvino"

    @property
    def shares(self) -> list[float]:
        """Of target, draft and the rest."""
        parts = (self.target_seconds, self.draft_seconds, self.other_seconds)
        return [part / (sum(parts) or 1.0) for part in parts]


@dataclass(frozen=True, kw_only=True)
class MemoryRow(OfPair, JsonRow):
    """Peak memory of a fresh process; None where that process failed."""

    target_weights: str
    draft_weights: str
    alone_bytes: int | None
    with_draft_bytes: int | None
    runtime: str = "openvino"

    @property
    def added_bytes(self) -> int | None:
        if self.alone_bytes is None or self.with_draft_bytes is None:
            return None
        return self.with_draft_bytes - self.alone_bytes


@dataclass(frozen=True, kw_only=True)
class ModelSize(JsonRow):
    """Bytes of an export's weights."""

    role: str
    weights: str
    bytes: int
    runtime: str = "openvino"


@dataclass(frozen=True, kw_only=True)
class RuntimeUsed(JsonRow):
    """What the clock ran on."""

    name: str
    version: str
    device_name: str
    device: str
    draft_device: str
    threads: int
    precision: str


@dataclass(frozen=True, kw_only=True)
class TaskBest(JsonRow):
    """A task's fastest K."""

    num_speculative_tokens: int
    speedup: float


@dataclass(frozen=True, kw_only=True)
class BestK(JsonRow):
    """K of the largest geometric mean over the tasks, and each task's own; None where none may be judged."""

    num_speculative_tokens: int | None
    by_task: dict[str, TaskBest]


@dataclass(frozen=True, kw_only=True)
class BenchmarkResults(JsonRow):
    """All of `benchmark.json`; of every runtime the pair of weights that is deployed comes first."""

    schema: int = 2
    runtime: RuntimeUsed  # the first of `runtimes`
    target: str
    draft: str
    block: dict[str, Any]  # `settings` of the recipe, and what was `left_out`
    models: list[ModelSize]
    latencies: list[PassesRow]
    breakdown: list[BreakdownRow]
    memory: list[MemoryRow]
    rows: list[BenchmarkRow]
    best: BestK
    verdict: dict[str, str] = field(default_factory=dict)  # `sentence` and `tone`: good, mixed or bad
    launch: str = ""  # the first of `launches`
    runtimes: list[RuntimeUsed] = field(default_factory=list)
    # By runtime what a user types to run its deployed pair with its best proposer at its best K.
    launches: dict[str, str] = field(default_factory=dict)
    at_a_time: list[AtATimeRow] = field(default_factory=list)  # of servers

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every pair, of each runtime the deployed one first."""
        return list(dict.fromkeys(row.key for row in self.rows))

    @property
    def deployed(self) -> list[Pair]:
        """One pair of each runtime."""
        return list({pair[0]: pair for pair in reversed(self.pairs)}.values())[::-1]

    def used(self, pair: Pair) -> RuntimeUsed:
        """What a pair ran on."""
        return next((used for used in self.runtimes if used.name == pair[0]), self.runtime)

    def judged(self, pair: Pair | None = None, proposer: str = "draft") -> list[BenchmarkRow]:
        """`judged_rows` of a pair, by default the first."""
        return judged_rows(self.rows, pair or self.pairs[0], proposer) if self.pairs else []

    def fastest_of_each(self, pair: Pair | None = None, proposer: str = "draft") -> list[BenchmarkRow]:
        """Of every task the judged row of its best K."""
        return fastest(self.judged(pair, proposer))


def judged_rows(rows: Iterable[BenchmarkRow], pair: Pair, proposer: str = "draft") -> list[BenchmarkRow]:
    """Rows on which a verdict may rest: whole tasks, lossless text, the lowest temperature."""
    found = [
        row
        for row in rows
        if row.part == "tasks"
        and (row.key, row.proposer) == (pair, proposer)
        and row.lossless
        and row.speedup is not None
        and row.num_speculative_tokens  # None in files of an earlier release
    ]
    lowest = min((row.temperature for row in found), default=0.0)
    at_lowest = [row for row in found if row.temperature == lowest]
    tasks = ordered((row.task for row in at_lowest), TASK_ORDER)
    return sorted(at_lowest, key=lambda row: (tasks.index(row.task), row.num_speculative_tokens))


def fastest(judged: Iterable[BenchmarkRow]) -> list[BenchmarkRow]:
    """Of every task the first of its fastest rows."""
    by_task = groupby(judged, lambda row: row.task)
    return [max(rows, key=lambda row: row.speedup or 0.0) for _, rows in by_task]


def mean_speedups(judged: Iterable[BenchmarkRow]) -> dict[int, float]:
    """By K the geometric mean over the tasks of `judged_rows`."""
    speedups: dict[int, list[float]] = {}
    for row in judged:
        speedups.setdefault(row.num_speculative_tokens or 0, []).append(row.speedup or 0.0)
    return {k: math.prod(values) ** (1 / len(values)) for k, values in speedups.items()}


def best_proposer(rows: Iterable[BenchmarkRow], pair: Pair) -> tuple[ProposerKind, int] | None:
    """With its K what has the largest mean over the tasks; the draft where that is worth it nowhere.

    Lookup needs no training: what a draft brings must be worth its trouble beside it too.
    """
    listed, means = list(rows), dict[tuple[ProposerKind, int], float]()
    for kind in PROPOSERS:
        means |= {(kind, k): mean for k, mean in mean_speedups(judged_rows(listed, pair, kind)).items()}
    if not means:
        return None
    best = max(means, key=lambda each: means[each] / (1.0 if each[0] == "lookup" else WORTH))
    named = judged_rows(listed, pair, best[0])
    reached = [row.speedup or 0.0 for row in named if row.num_speculative_tokens == best[1]]
    drafts = [each for each in means if each[0] == "draft"]
    return max(drafts, key=means.__getitem__) if drafts and max(reached) < WORTH else best


def best_k(judged: Sequence[BenchmarkRow]) -> BestK:
    """The best K of `judged_rows`."""
    by_task = {
        row.task: TaskBest(num_speculative_tokens=row.num_speculative_tokens or 0, speedup=row.speedup or 0.0)
        for row in fastest(judged)
    }
    means = mean_speedups(judged)
    found = max(means, key=lambda k: (means[k], -k)) if means else None
    return BestK(num_speculative_tokens=found, by_task=by_task)
