"""Where in a text a draft is accepted: the expected counts of replay, split by absolute position.

A round belongs whole to the bucket in which its first proposal stands. Shape suffixes: B texts, T response
positions, K proposals of a round, C columns of `counts_to_array`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastdraft.functional.acceptance import (
    TOTALS,
    acceptance_runs,
    neighbours,
    pad_accepts,
    reached,
    round_starts,
)

FIRST_BUCKET = 512
TOGETHER = 32  # texts worked on together: bounds the memory of long ones


def bucket_bounds(bucket: int) -> tuple[int, int]:
    """First position of a bucket and the first one behind it."""
    return (FIRST_BUCKET << (bucket - 1) if bucket else 0), FIRST_BUCKET << bucket


def bucket_of(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bucket of each absolute position, 0-based."""
    return np.frexp(positions // FIRST_BUCKET)[1].astype(np.int64)  # bits of the quotient: 0 below 512


def counts_by_bucket(
    accepts: Sequence[NDArray[np.float64]], starts: Sequence[int], num_speculative_tokens: int
) -> NDArray[np.float64]:
    """Expected counts of every text in every bucket, [texts, buckets, columns of `counts_to_array`].

    Over the buckets they add up to the text's counts. `starts`: the position of each text's first response
    token.
    """
    ends = [start + len(accept) for start, accept in zip(starts, accepts, strict=True)]
    buckets = 1 + int(bucket_of(np.array([max([1, *ends]) - 1]))[0])
    found = np.zeros((len(accepts), buckets, TOTALS + num_speculative_tokens))
    for chosen in neighbours([len(accept) for accept in accepts], TOGETHER):
        columns_BTC = _columns([accepts[i] for i in chosen], num_speculative_tokens)
        for index, columns_TC in zip(chosen, columns_BTC, strict=True):
            places = starts[index] + np.arange(len(accepts[index]))
            np.add.at(found[index], bucket_of(places), columns_TC[: len(places)])
    return found


def _columns(accepts: Sequence[NDArray[np.float64]], k: int) -> NDArray[np.float64]:
    """What the rounds that begin at each response position contribute to each count, [B, T, C]."""
    lengths = np.array([len(a) for a in accepts])
    longest = int(lengths.max())
    padded_BT = pad_accepts(accepts, k)
    runs_BTK = acceptance_runs(padded_BT, longest, k)
    visit_BT = round_starts(runs_BTK, lengths)
    left_BT = lengths[:, None] - np.arange(longest)  # tokens of the text from this one on
    accepted_BTK, inside_BT = visit_BT[:, :, None] * runs_BTK, left_BT > 0
    examined_BT = (reached(runs_BTK) * (np.arange(k) < left_BT[:, :, None])).sum(2)
    # The token that the target adds is missing only where the last token of the text is an accepted proposal.
    last_BT = np.take_along_axis(runs_BTK, np.clip(left_BT - 1, 0, k - 1)[:, :, None], axis=2)[:, :, 0]
    last_BT = last_BT * (left_BT <= k)
    totals = [
        visit_BT,
        k * visit_BT,
        accepted_BTK.sum(2),
        visit_BT * examined_BT,
        accepted_BTK.sum(2) + visit_BT * (1 - last_BT),
        padded_BT[:, :longest] * inside_BT,
        inside_BT.astype(np.float64),
    ]
    return np.concatenate([np.stack(totals, axis=2), accepted_BTK], axis=2)
