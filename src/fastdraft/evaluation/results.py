"""`results.json` and `samples.json` as dataclasses, and the rules for which of their rows stands for a draft.

`EvaluationResults.from_json(read_json(path))`; written by the evaluate stage, read by reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

from fastdraft.decoding.latency import Latency
from fastdraft.json_rows import JsonRow, Number, called

# In the order of training, as the paper calls them.
CHECKPOINT_LABELS = {"design": "start", "pretrain": "PT", "continue_pretrain": "CP", "align": "FT"}
TASK_ORDER = ("code", "summarization", "text", "instructions")
# Kinds of speed-up that a row may hold, the paper's first, and how they are called.
SPEEDUPS = {
    "mbsu_parameters": "by parameters",
    "mbsu_bytes": "by bytes read",
    "mbsu_latency": "by measured latency",
    "predicted_speedup": "predicted wall clock",
}
HEADLINE_TEMPERATURE, HEADLINE_K = 0.6, 3  # where the paper prints its acceptance rates


class Rated:
    """A row with rates, some of them with `_low` and `_high`."""

    block_efficiency: float | None

    def interval(self, key: str) -> tuple[float, float] | None:
        """The 95 % interval of a rate or a speed-up."""
        if key in SPEEDUPS:
            # Block efficiency times what K and the costs fix; the costs' own spread is not in it.
            around, value = self.interval("block_efficiency"), getattr(self, key)
            factor = value / self.block_efficiency if value and self.block_efficiency else None
            return (around[0] * factor, around[1] * factor) if around and factor else None
        low, high = getattr(self, f"{key}_low", None), getattr(self, f"{key}_high", None)
        return None if low is None or high is None else (low, high)


@dataclass(frozen=True, kw_only=True)
class ResultRow(Rated, JsonRow):
    """Counts and rates of one draft on one task at one temperature and K; null what cannot be computed."""

    checkpoint: str
    task: str
    method: str  # `exact` or `replay`
    temperature: float
    num_speculative_tokens: int
    num_prompts: int
    num_conversations: int | None = None
    num_drafts: Number
    num_draft_tokens: Number
    num_accepted_tokens: Number
    num_accepted_tokens_per_pos: list[Number]
    num_generated_tokens: Number
    acceptance_rate: float | None = None
    conditional_acceptance_rate: float | None = None
    overlap: float | None = None
    block_efficiency: float | None = None
    mbsu_parameters: float | None = None
    mbsu_bytes: float | None = None
    mbsu_latency: float | None = None
    predicted_speedup: float | None = None
    num_examined_tokens: Number | None = None
    acceptance_rate_low: float | None = None
    acceptance_rate_high: float | None = None
    block_efficiency_low: float | None = None
    block_efficiency_high: float | None = None
    looping_share: float | None = None
    acceptance_rate_without_looping: float | None = None
    block_efficiency_without_looping: float | None = None

    @property
    def accepted_per_position(self) -> list[float]:
        """Share of rounds in which the proposal at position 1, 2, ... was accepted."""
        return [count / self.num_drafts for count in self.num_accepted_tokens_per_pos if self.num_drafts]


@dataclass(frozen=True, kw_only=True)
class LookupRow(Rated, JsonRow):
    """Prompt lookup by replay over the same texts, which needs no draft: what a draft must beat."""

    proposer: str  # `lookup`; `lookup_draft`: lookup, and the checkpoint in rounds that find nothing
    checkpoint: str | None
    task: str
    temperature: float
    num_speculative_tokens: int
    num_prompts: int
    num_conversations: int | None = None
    num_drafts: Number
    num_draft_tokens: Number  # of a round K, or as many as lookup found
    num_accepted_tokens: Number
    num_accepted_tokens_per_pos: list[Number]
    num_generated_tokens: Number
    num_examined_tokens: Number
    num_lookups: Number  # rounds in which lookup found something
    acceptance_rate: float | None
    conditional_acceptance_rate: float | None
    block_efficiency: float | None
    acceptance_rate_low: float | None
    acceptance_rate_high: float | None
    block_efficiency_low: float | None
    block_efficiency_high: float | None
    mbsu_parameters: float | None
    mbsu_bytes: float | None
    mbsu_latency: float | None = None
    predicted_speedup: float | None = None
    method: str = "replay"  # or `exact`
    # Tokens that lookup's rounds wrote and a later round of the draft read in its first pass.
    num_caught_up_tokens: Number | None = None


ProposedRow = ResultRow | LookupRow


@dataclass(frozen=True, kw_only=True)
class DifferenceRow(JsonRow):
    """Change of the acceptance rate from one checkpoint to the next on the same texts."""

    before: str = called("from")
    after: str = called("to")
    task: str
    temperature: float
    num_speculative_tokens: int
    difference: float | None
    difference_low: float | None
    difference_high: float | None


@dataclass(frozen=True, kw_only=True)
class PositionRow(JsonRow):
    """Counts and rates of the rounds whose first proposal lies in one stretch of the text."""

    checkpoint: str
    task: str
    temperature: float
    first: int = called("from")
    end: int = called("to")
    num_prompts: int
    num_conversations: int
    num_drafts: Number
    num_draft_tokens: Number
    num_accepted_tokens: Number
    num_examined_tokens: Number
    num_generated_tokens: Number
    acceptance_rate: float | None
    acceptance_rate_low: float | None
    acceptance_rate_high: float | None
    conditional_acceptance_rate: float | None
    block_efficiency: float | None


@dataclass(frozen=True, kw_only=True)
class FadedCase(JsonRow):
    """Where the acceptance of a draft falls under half of what it was before."""

    checkpoint: str
    task: str
    temperature: float
    first: int = called("from")
    acceptance_rate: float
    best_acceptance_rate: float


@dataclass(frozen=True, kw_only=True)
class PositionResults(JsonRow):
    """Acceptance along the text, by replay at one K."""

    num_speculative_tokens: int
    context_length: int
    rows: list[PositionRow]
    faded: list[FadedCase]


@dataclass(frozen=True, kw_only=True)
class GreedyCase(JsonRow):
    """A greedy exact text that leaves the target's own."""

    task: str
    prompt: str
    num_speculative_tokens: int
    token: int
    logprob_gap: float | None
    near_tie: bool


@dataclass(frozen=True, kw_only=True)
class GreedyCheck(JsonRow):
    """Greedy exact texts against the target's own."""

    texts: int
    different: int
    near_ties: int
    cases: list[GreedyCase]


@dataclass(frozen=True, kw_only=True)
class PromptOverlap(JsonRow):
    """13-grams that a task's texts share with what was trained on."""

    prompts: int
    prompts_with_overlap: int
    ngrams: int
    ngrams_matched: int


@dataclass(frozen=True, kw_only=True)
class ReplayedTexts(JsonRow):
    """Where the texts came from that were replayed; how many were left out, by reason."""

    kind: str
    left_out: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class AnswerPiece(JsonRow):
    """A part of an answer that was proposed by the draft and accepted, or that is the target's own."""

    text: str
    accepted: bool


@dataclass(frozen=True, kw_only=True)
class AnswerSample(JsonRow):
    """One answer of an exact run; `samples.json` is a list of them."""

    task: str
    id: str
    temperature: float
    num_speculative_tokens: int
    prompt: str
    pieces: list[AnswerPiece]


@dataclass(frozen=True, kw_only=True)
class EvaluationResults(JsonRow):
    """All of `results.json`."""

    schema: int = 1
    target: str
    draft: str
    cost_ratio_parameters: float
    cost_ratio_bytes: float
    cost_ratio_latency: float | None = None
    latency: Latency | None = None
    rows: list[ResultRow]
    differences: list[DifferenceRow] = field(default_factory=list)
    by_position: PositionResults | None = None
    greedy_check: GreedyCheck | None = None
    contamination: dict[str, PromptOverlap] | None = None
    texts: ReplayedTexts | None = None
    lookup: list[LookupRow] = field(default_factory=list)  # apart from `rows`, which are of drafts

    @cached_property
    def checkpoints(self) -> list[str]:
        """In the order of training; the last is the draft that is exported."""
        return ordered((row.checkpoint for row in self.rows), CHECKPOINT_LABELS)

    @cached_property
    def tasks(self) -> list[str]:
        return ordered((row.task for row in self.rows), TASK_ORDER)

    @cached_property
    def temperatures(self) -> list[float]:
        """The headline's first: 0.6, the paper's; else the lowest sampled one; else greedy."""
        found = sorted({row.temperature for row in self.rows})
        sampled = [t for t in found if t > 0]
        head = HEADLINE_TEMPERATURE if HEADLINE_TEMPERATURE in sampled else next(iter(sampled or found), None)
        return sorted(found, key=lambda t: (t != head, t))

    @cached_property
    def headline_k(self) -> int:
        """3, the paper's, or the nearest K that was evaluated."""
        return nearest_k(row.num_speculative_tokens for row in self.rows)

    @cached_property
    def speedups(self) -> list[str]:
        """The kinds of speed-up that these rows hold."""
        return [key for key in SPEEDUPS if any(getattr(row, key) is not None for row in self.rows)]

    @property
    def rows_by_position(self) -> list[PositionRow]:
        """Of the final draft; none where every text ends in the first stretch."""
        rows = self.by_position.rows if self.by_position else []
        found = [row for row in rows if row.checkpoint == self.checkpoints[-1]]
        return found if any(row.first for row in found) else []

    def select(self, **wanted: Any) -> list[ResultRow]:
        """Rows with these values, by rising K."""
        found = [row for row in self.rows if all(getattr(row, key) == value for key, value in wanted.items())]
        return sorted(found, key=lambda row: row.num_speculative_tokens)

    def against_k(self, checkpoint: str, task: str, temperature: float) -> list[ResultRow]:
        """One row for each K: by replay, which covers every checkpoint and K; else exact."""
        found = self.select(checkpoint=checkpoint, task=task, temperature=temperature)
        replayed = [row for row in found if row.method == "replay"]
        return list({row.num_speculative_tokens: row for row in [*found, *replayed]}.values())

    def row(self, checkpoint: str, task: str, temperature: float, k: int | None = None) -> ResultRow | None:
        """The one row at a K, the headline's by default."""
        rows, k = self.against_k(checkpoint, task, temperature), k or self.headline_k
        return next((row for row in rows if row.num_speculative_tokens == k), None)

    def best(
        self, task: str, temperature: float, speedup: str = "mbsu_parameters", proposer: str = "draft"
    ) -> ProposedRow | None:
        """The final draft's row at the K with the highest speed-up of a kind; the smallest such K."""
        rated = [r for r in self.proposed(proposer, task, temperature) if getattr(r, speedup) is not None]
        return max(rated, key=lambda row: float(getattr(row, speedup)), default=None)

    def proposed(self, proposer: str, task: str, temperature: float) -> Sequence[ProposedRow]:
        """By rising K the rows of the final draft, of lookup, or of both (`lookup_draft`)."""
        final = self.checkpoints[-1]
        if proposer == "draft":
            return self.against_k(final, task, temperature)
        wanted = (proposer, task, temperature)
        found = [row for row in self.lookup if (row.proposer, row.task, row.temperature) == wanted]
        mine = [row for row in found if row.checkpoint in (None, final) and row.method == "replay"]
        return sorted(mine, key=lambda row: row.num_speculative_tokens)

    @property
    def final_rows(self) -> list[ResultRow]:
        """Of the final draft at the headline K, one for each task and temperature."""
        rows = (self.row(self.checkpoints[-1], *setting) for setting in self.settings())
        return [row for row in rows if row]

    def settings(self) -> list[tuple[str, float]]:
        """Every task and temperature with rows of the final draft."""
        everything = product(self.tasks, sorted(self.temperatures))
        return [setting for setting in everything if self.against_k(self.checkpoints[-1], *setting)]


def nearest_k(available: Iterable[int]) -> int:
    """The K at which drafts are compared: 3 or the nearest."""
    return min(available, key=lambda k: (abs(k - HEADLINE_K), k), default=HEADLINE_K)


def ordered(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """Each name once: those of `order` first, in its order, then the others as they come."""
    seen, known = list(dict.fromkeys(names)), list(order)
    return [name for name in known if name in seen] + [name for name in seen if name not in known]
