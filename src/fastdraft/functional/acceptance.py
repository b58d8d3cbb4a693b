"""Counts of speculative decoding, and their exact expectation from per-token accept probabilities.

Counts are stored and added, rates derived when printed; the conventions are those of decoding/speculative.py.
Shape suffixes: B texts, T tokens, K proposals, E = K + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOTALS = 7  # columns of `counts_to_array` before the positions
DRAFTS, PROPOSED, ACCEPTED, GENERATED, OVERLAP, OVERLAP_TOKENS = 0, 1, 2, 4, 5, 6  # some of these columns
Floats = NDArray[np.float64]
CountsTable = Floats  # one line for each text, with the columns of `counts_to_array`


@dataclass(frozen=True)
class Counts:
    """What happened in some rounds: whole numbers from a run, expectations from replay. Add, then rate."""

    num_drafts: float = 0.0  # rounds: one proposal of K tokens and one pass of the target each
    num_draft_tokens: float = 0.0  # proposed: K for each round
    num_accepted_tokens: float = 0.0  # proposals that became part of the text
    num_accepted_tokens_per_pos: tuple[float, ...] = ()  # the same by place in the round
    num_examined_tokens: float = 0.0  # decided on: each accepted one, and the rejected one that ended a round
    num_generated_tokens: float = 0.0  # tokens of the text
    overlap_sum: float = 0.0  # over `overlap_tokens` positions, of sum_v min(target_probs, draft_probs)
    overlap_tokens: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return add_counts([self, other])

    @property
    def acceptance_rate(self) -> float:
        """Accepted / proposed. Falls as K grows. NaN without proposals."""
        return _ratio(self.num_accepted_tokens, self.num_draft_tokens)

    @property
    def conditional_acceptance_rate(self) -> float:
        """Accepted / examined: the alpha of Leviathan et al., arXiv 2211.17192."""
        return _ratio(self.num_accepted_tokens, self.num_examined_tokens)

    @property
    def block_efficiency(self) -> float:
        """Generated tokens for each pass of the target."""
        return _ratio(self.num_generated_tokens, self.num_drafts)

    @property
    def overlap(self) -> float:
        """Mean over positions of sum_v min(target_probs, draft_probs)."""
        return _ratio(self.overlap_sum, self.overlap_tokens)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def add_counts(counts: Iterable[Counts]) -> Counts:
    """The sum of any number of counts of the same K; an empty `Counts()` fits any K."""
    listed = [c for c in counts if c != Counts()]
    if not listed:
        return Counts()
    if len({len(c.num_accepted_tokens_per_pos) for c in listed}) > 1:
        raise ValueError("counts of different num_speculative_tokens cannot be added")
    return counts_from_array(np.sum([counts_to_array(c) for c in listed], axis=0))


def counts_to_array(counts: Counts) -> Floats:
    """A row for sums and bootstraps: the seven totals in the order of the fields, then the positions."""
    drafts, proposed, accepted, per_pos, *rest = vars(counts).values()
    return np.array([drafts, proposed, accepted, *rest, *per_pos], dtype=np.float64)


def counts_from_array(row: Floats) -> Counts:
    """The inverse of `counts_to_array`."""
    drafts, proposed, accepted, *rest = [float(value) for value in row]
    return Counts(drafts, proposed, accepted, tuple(rest[TOTALS - 3 :]), *rest[: TOTALS - 3])


def counts_table(counts: Sequence[Counts]) -> CountsTable:
    """A line for each."""
    return np.stack([counts_to_array(c) for c in counts])


def tidy(value: float) -> float | None:
    """For JSON: six decimals, null for what is not a number."""
    return round(value, 6) if math.isfinite(value) else None


def tidy_count(value: float) -> float | int:
    """For JSON: whole counts, as every exact run gives, as such; expected ones to six decimals."""
    return int(value) if value == int(value) else round(value, 6)


def batched_expected_counts(
    accepts: Sequence[Floats], num_speculative_tokens: Sequence[int]
) -> list[dict[int, Counts]]:
    """Expected counts of runs that emit given texts, from each token's chance to be accepted when drafted.

    One dictionary from K to counts for each text. Given the text, the accept decisions are independent, and a
    drafted token x is accepted with probability min(1, draft_probs[x] / target_probs[x]); 0 and 1 (greedy)
    give a run's own counts.

    The chance visit[i] that a round begins at token i obeys a recursion from the front, the adjoint of f(i) =
    1 + sum_{j<K} (a_i...a_{i+j-1})(1 - a_{i+j}) f(i+j+1) + (a_i...a_{i+K-1}) f(i+K+1): a rejection at token m
    starts the next round at m + 1, the bonus token after K acceptances at i + K + 1. Every count is linear in
    `visit`. All K and all texts advance together: O(longest text * K) numpy steps, not O(tokens * K).
    """
    ks = sorted(set(num_speculative_tokens))
    if not ks or ks[0] < 1:
        raise ValueError("num_speculative_tokens must be at least 1")
    if not accepts:
        return []
    lengths = np.array([len(a) for a in accepts])
    padded_BT = pad_accepts(accepts, ks[-1])
    runs_BTK = acceptance_runs(padded_BT, int(lengths.max()), ks[-1])
    found: list[dict[int, Counts]] = [{} for _ in accepts]
    for k in ks:
        visit_BT = round_starts(runs_BTK[:, :, :k], lengths)
        table = rounds_table(runs_BTK[:, :, :k], visit_BT, lengths, np.full(visit_BT.shape, k))
        table[:, OVERLAP], table[:, OVERLAP_TOKENS] = padded_BT.sum(1), lengths
        for by_k, line in zip(found, table, strict=True):
            by_k[k] = counts_from_array(line)
    return found


def neighbours(lengths: Sequence[int], together: int) -> Iterator[list[int]]:
    """Places of texts of near-equal length, so that short ones do not pay for the longest beside them."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return (order[start : start + together] for start in range(0, len(order), together))


def pad_accepts(accepts: Sequence[NDArray[Any]], num_speculative_tokens: int) -> Floats:
    """Texts side by side, [B, longest + K + 1]; padding accepts nothing, so runs end where the text does."""
    padded_BT = np.zeros((len(accepts), max(map(len, accepts)) + num_speculative_tokens + 1))
    for row, values in zip(padded_BT, accepts, strict=True):
        row[: len(values)] = values
    return padded_BT


def acceptance_runs(padded_BT: Floats, longest: int, top: int) -> Floats:
    """[b, i, j]: the chance that tokens i .. i+j are all accepted, given that a round begins at i."""
    windows_BTK = np.lib.stride_tricks.sliding_window_view(padded_BT, top, axis=1)[:, :longest]
    return np.asarray(np.cumprod(windows_BTK, axis=2, dtype=np.float64))


def rounds_table(
    runs_BTK: Floats, visit_BT: Floats, lengths: NDArray[np.int64], widths_BT: NDArray[Any]
) -> CountsTable:
    """Expected counts but overlap, of rounds that begin with chance `visit` and propose `widths` tokens."""
    batch, longest, k = runs_BTK.shape
    accepted_BK = np.einsum("bt,btk->bk", visit_BT, runs_BTK)
    # The proposal at j is decided on when the j before it were accepted and its place lies inside the text.
    room_BT = np.minimum(widths_BT, lengths[:, None] - np.arange(longest))
    inside_BTK = (np.arange(k) < room_BT[:, :, None]).astype(np.float64)
    examined_B = np.einsum("bt,btk,btk->b", visit_BT, reached(runs_BTK), inside_BTK)
    proposed_B = (visit_BT * widths_BT).sum(1)
    totals = [visit_BT.sum(1), proposed_B, accepted_BK.sum(1), examined_B, lengths, *np.zeros((2, batch))]
    return np.concatenate([np.stack(totals, axis=1), accepted_BK], axis=1)


def round_starts(runs_BTK: Floats, lengths: NDArray[np.int64]) -> Floats:
    """[b, i]: the chance that a round begins at token i of text b; 0 beyond its end."""
    batch, longest, k = runs_BTK.shape
    # [b, i, j]: a round that begins at i is rejected at its j-th proposal; for j = k the bonus token follows.
    ends_BTE = np.concatenate([np.ones((batch, longest, 1)), runs_BTK], axis=2)
    ends_BTE[:, :, :k] -= runs_BTK
    visit_BT = np.zeros((batch, longest + k + 1))
    visit_BT[:, 0] = 1.0
    for i in range(longest):
        visit_BT[:, i + 1 : i + k + 2] += visit_BT[:, i, None] * ends_BTE[:, i]
    return np.asarray(visit_BT[:, :longest] * (np.arange(longest) < lengths[:, None]))


def reached(runs_BTK: Floats) -> Floats:
    """[b, i, j]: the chance that the j proposals before the j-th were accepted: 1 for the first."""
    return np.concatenate([np.ones_like(runs_BTK[:, :, :1]), runs_BTK[:, :, :-1]], axis=2)
