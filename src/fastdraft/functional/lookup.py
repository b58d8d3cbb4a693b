"""Prompt lookup over a text that stands: what a target gains without any draft model.

Where the last 3 tokens, else the last 2, stood before, in prompt or answer, the tokens behind their latest
place are proposed (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding). A proposal without a
probability is accepted where it is the text's own token, sampled text too. Suffixes: B texts, T response
tokens, K proposals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


class PromptLookup:
    """A text that grows, and where its last tokens stood before: a constant time for each token."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self.ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # the place behind the latest of every n-gram
        self.append(ids)

    def append(self, ids: Iterable[int]) -> None:
        """The text goes on."""
        for token in ids:
            # Only now, so that the text's own end is never found.
            self._behind.update(dict.fromkeys(self._last(), len(self.ids)))
            self.ids.append(token)

    def find(self, num_lookup_tokens: int) -> list[int]:
        """At most so many tokens: fewer where the text that is known ends, none where nothing is found."""
        at = next((self._behind[gram] for gram in self._last() if gram in self._behind), len(self.ids))
        return self.ids[at : at + num_lookup_tokens]

    def _last(self) -> list[tuple[int, ...]]:
        """The n-grams at the text's end, in the order in which they are looked for."""
        return [tuple(self.ids[-n:]) for n in NGRAMS if n <= len(self.ids)]


def look_up(prompt: Sequence[int], response: Sequence[int], num_lookup_tokens: int) -> Lookups:
    """What would be proposed at every place of a response, and how much of it is right."""
    known, found = PromptLookup(prompt), np.zeros((2, len(response)), dtype=np.int64)
    for place, token in enumerate(response):
        proposed = known.find(num_lookup_tokens)
        own = response[place : place + len(proposed)]
        same = [a == b for a, b in zip(proposed, own, strict=False)]
        found[:, place] = len(proposed), [*same, False].index(False)
        known.append([token])
    return Lookups(*found)


def lookup_counts(
    found: Sequence[Lookups],
    num_speculative_tokens: Sequence[int],
    accepts: Sequence[Floats] | None = None,
    num_lookup_tokens: int | None = None,
) -> Floats:
    """Counts of lookup alone, or, given a draft's `accepts`, of lookup and the draft where it finds nothing.

    `num_lookup_tokens`: most of a find; None: K, as of the draft. [K, texts, columns of `counts_to_array` at
    the largest of them, then the tokens of lookup's rounds that a later round of the draft has to read, and
    the rounds in which lookup proposes].
    """
    top = max(*num_speculative_tokens, num_lookup_tokens or 0)
    counts = np.zeros((len(num_speculative_tokens), len(found), TOTALS + top + 2))
    for chosen in neighbours([len(each.right) for each in found], _TOGETHER):
        lengths = np.array([len(found[i].right) for i in chosen])
        longest = int(lengths.max())
        proposed_BT = pad_accepts([found[i].proposed for i in chosen], 0)[:, :longest]
        right_BT = pad_accepts([found[i].right for i in chosen], 0)[:, :longest]
        finds_BT = proposed_BT > 0
        if accepts is not None:
            drafted_BTK = acceptance_runs(pad_accepts([accepts[i] for i in chosen], top), longest, top)
        for table, k in zip(counts, num_speculative_tokens, strict=True):
            n = k if num_lookup_tokens is None else num_lookup_tokens
            most = max(k, n)
            widths_BT, own_BT = np.minimum(proposed_BT, n), np.minimum(right_BT, n).astype(np.int64)
            runs_BTK = (np.arange(most) < own_BT[:, :, None]).astype(np.float64)
            if accepts is not None:
                widths_BT = np.where(finds_BT, widths_BT, k)
                behind_BTK = drafted_BTK[:, :, :most] * (np.arange(most) < k)
                runs_BTK = np.where(finds_BT[:, :, None], runs_BTK, behind_BTK)
            visit_BT = round_starts(runs_BTK, lengths)
            table[chosen, : TOTALS + most] = rounds_table(runs_BTK, visit_BT, lengths, widths_BT)
            looked_BT = visit_BT * finds_BT
            table[chosen, -1] = looked_BT.sum(1)
            if accepts is not None:
                table[chosen, -2] = (looked_BT * _read_later(finds_BT, own_BT + 1, lengths)).sum(1)
    return counts


def _read_later(
    finds_BT: NDArray[np.bool_], written_BT: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """What a round of lookup writes where a round of the draft follows it sooner or later, else 0; [B, T]."""
    batch, longest = finds_BT.shape
    drafts_BT = np.zeros((batch, longest + int(written_BT.max(initial=0)) + 1), dtype=bool)
    rows_B = np.arange(batch)
    for place in reversed(range(longest)):
        # After lookup the next round's place is known, given the text.
        behind_B = drafts_BT[rows_B, place + written_BT[:, place]]
        drafts_BT[:, place] = np.where(finds_BT[:, place], behind_B, place < lengths)
    follows_BT = np.take_along_axis(drafts_BT, np.arange(longest) + written_BT, axis=1)
    return np.where(follows_BT, written_BT, 0)
