"""Prompt lookup over a text that stands: what a target gains without any draft model.

Where the last 3 tokens, else the last 2, stood before, in prompt or answer, the tokens behind their latest
place are proposed (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding). A proposal without a
probability is accepted where it is the text's own token, sampled text too. Suffixes: B texts, T response
tokens, K proposals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastdraft.functional.acceptance import (
    TOTALS,
    Floats,
    acceptance_runs,
    neighbours,
    pad_accepts,
    round_starts,
    rounds_table,
)

NGRAMS = (3, 2)  # how many last tokens are looked for, in this order
_TOGETHER = 256  # texts counted at once


@dataclass(frozen=True)
class Lookups:
    """What a round would find that begins at each response token, [T]."""

    proposed: NDArray[np.int64]  # tokens; 0 where nothing is found
    right: NDArray[np.int64]  # how many of them, from the front, are the text's own


def look_up(prompt: Sequence[int], response: Sequence[int], num_speculative_tokens: int) -> Lookups:
    """At most K tokens at every place: fewer where the text that is known ends, and none are made up."""
    text, first = [*prompt, *response], len(prompt)
    found = np.zeros((2, len(response)), dtype=np.int64)
    behind: dict[tuple[int, ...], int] = {}  # the place behind the latest of every n-gram
    for end in range(min(first, NGRAMS[-1]), len(text)):
        grams = [tuple(text[end - n : end]) for n in NGRAMS if n <= end]
        if end >= first:
            at = next((behind[gram] for gram in grams if gram in behind), end)
            width = min(num_speculative_tokens, end - at)
            pairs = zip(text[at : at + width], text[end : end + width], strict=False)
            right = next((j for j, (a, b) in enumerate(pairs) if a != b), min(width, len(text) - end))
            found[:, end - first] = width, right
        behind.update(dict.fromkeys(grams, end))
    return Lookups(*found)


def lookup_counts(
    found: Sequence[Lookups], num_speculative_tokens: Sequence[int], accepts: Sequence[Floats] | None = None
) -> Floats:
    """Counts of lookup alone, or, given a draft's `accepts`, of lookup and the draft where it finds nothing.

    [K, texts, columns of `counts_to_array` at the largest K and, last, the rounds in which lookup proposes].
    """
    top = max(num_speculative_tokens)
    counts = np.zeros((len(num_speculative_tokens), len(found), TOTALS + top + 1))
    for chosen in neighbours([len(each.right) for each in found], _TOGETHER):
        lengths = np.array([len(found[i].right) for i in chosen])
        longest = int(lengths.max())
        proposed_BT = pad_accepts([found[i].proposed for i in chosen], 0)[:, :longest]
        right_BT = pad_accepts([found[i].right for i in chosen], 0)[:, :longest]
        finds_BT = proposed_BT > 0
        if accepts is not None:
            drafted_BTK = acceptance_runs(pad_accepts([accepts[i] for i in chosen], top), longest, top)
        for table, k in zip(counts, num_speculative_tokens, strict=True):
            widths_BT = np.minimum(proposed_BT, k)
            runs_BTK = (np.arange(k) < right_BT[:, :, None]).astype(np.float64)
            if accepts is not None:
                widths_BT = np.where(finds_BT, widths_BT, k)
                runs_BTK = np.where(finds_BT[:, :, None], runs_BTK, drafted_BTK[:, :, :k])
            visit_BT = round_starts(runs_BTK, lengths)
            table[chosen, : TOTALS + k] = rounds_table(runs_BTK, visit_BT, lengths, widths_BT)
            table[chosen, -1] = (visit_BT * finds_BT).sum(1)
    return counts
