"""Which row comes next: a weighted mixture of prepared corpora as a pure function of the row's number.

Decides that the sampler keeps no state (row 12,345 of a run is the same row in every process, so that a resumed run only
needs its counter), that each 64 rows hold every corpus in its weight to within a row, and that each corpus is walked in a
fresh permutation per epoch. All randomness is splitmix64 of (seed, number), so it does not depend on a library's version.
Where corpora have rows of several lengths, one number stands for as many shorter rows as fill the longest: every number is the
same count of tokens, and each length of a corpus comes as often as it has tokens.
Shape letters: N numbers (rows, where there is one length).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdraft.data.shards import PackedCorpus, open_corpus, open_lengths
from fastdraft.errors import DataError
from fastdraft.run_folder import StageFolder

__all__ = ["MixtureSampler", "PackedCorpus", "open_corpus", "open_mixture", "permute"]

U64 = npt.NDArray[np.uint64]
GROUP, BLOCK = 64, 1 << 16
"""Rows whose draws are stratified together; rows whose corpus counts are remembered together."""
FEISTEL_ROUNDS = 6


def splitmix(values: U64) -> U64:
    """The splitmix64 finaliser: a bijection of 64-bit numbers that scatters neighbours (Steele et al., OOPSLA 2014)."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def mix(*parts: int | U64) -> U64:
    """One 64-bit hash of several numbers or arrays, elementwise."""
    state: U64 = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = splitmix(state ^ splitmix(np.atleast_1d(np.asarray(part, dtype=np.uint64))))
    return state


def permute(indices: npt.ArrayLike, size: int, key: U64) -> npt.NDArray[np.int64]:
    """A pseudo-random permutation of range(size), evaluated at `indices` only, in constant memory.

    A Feistel network on the next even power of two, walked until it falls inside (cycle walking: Black and Rogaway,
    CT-RSA 2002). `key` [1] or [N] picks the permutation.
    """
    values = np.asarray(indices, dtype=np.uint64).reshape(-1).copy()
    keys = np.broadcast_to(key, values.shape)
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    todo = np.arange(len(values))
    while len(todo):
        left, right = values[todo] >> half, values[todo] & low
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (splitmix(right ^ splitmix(keys[todo] + np.uint64(number))) & low)
        values[todo] = (left << half) | right
        todo = todo[values[todo] >= np.uint64(size)]
    return values.astype(np.int64)


class MixtureSampler:
    """Rows of several corpora in given shares, addressed by their number in the run.

    Args:
        corpora: By name; every row length divides the longest.
        weights: Share of rows by name, any positive scale; names without a weight are not used.
        seed: Fixes everything.

    Raises:
        DataError: when a weight names no corpus, no weight is positive, a corpus has no row, or row lengths do not fit together.
    """

    def __init__(self, corpora: Mapping[str, PackedCorpus], weights: Mapping[str, float], seed: int) -> None:
        self.names = _used_names(corpora, weights)
        self._corpora = [corpora[name] for name in self.names]
        shares = np.cumsum([float(weights[name]) for name in self.names])
        self._bounds = shares / shares[-1]
        self._seed, self.row_length = seed, max(corpus.row_length for corpus in self._corpora)
        self._before: list[npt.NDArray[np.int64]] = [np.zeros(len(self.names), dtype=np.int64)]
        self._last_block: tuple[int, npt.NDArray[np.int64]] | None = None

    def sources(self, start: int, count: int) -> list[tuple[str, int]]:
        """(corpus, row in it) of numbers start .. start + count - 1, the first row where a number stands for several."""
        picks, occurrences = self._locate(start, count)
        rows = np.empty(count, dtype=np.int64)
        for number in range(len(self._corpora)):
            chosen = picks == number
            rows[chosen] = self._rows_of(number, occurrences[chosen])[:, 0]
        return [(self.names[pick], row) for pick, row in zip(picks.tolist(), rows.tolist(), strict=True)]

    def rows(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Rows start .. start + count - 1 of a run with rows of one length: int64 [count, row_length + 1]."""
        (rows,) = self.groups(start, count)
        return rows

    def groups(self, start: int, count: int) -> list[npt.NDArray[np.int64]]:
        """The rows behind numbers start .. start + count - 1, one array [rows, row_length + 1] for each length, the longest first."""
        picks, occurrences = self._locate(start, count)
        lengths = np.array([corpus.row_length for corpus in self._corpora])
        found = []
        for length in sorted(set(lengths.tolist()), reverse=True):
            own = np.flatnonzero(lengths[picks] == length)
            per_number = self.row_length // length
            rows = np.empty((len(own), per_number, length + 1), dtype=np.int64)
            for number in np.flatnonzero(lengths == length).tolist():
                chosen = picks[own] == number
                wanted = self._rows_of(number, occurrences[own[chosen]])
                rows[chosen] = self._corpora[number].take(wanted).reshape(-1, per_number, length + 1)
            if len(rows) or per_number == len(set(lengths.tolist())) == 1:
                found.append(rows.reshape(-1, length + 1))
        return found

    def num_rows(self, corpus: str) -> int:
        """Numbers until a corpus of `open_mixture` has been walked through once: rows of the longest length that its tokens fill."""
        own = [
            part for name, part in zip(self.names, self._corpora, strict=True) if corpus_of(name) == corpus
        ]
        return sum(part.rows * part.row_length for part in own) // self.row_length

    def _rows_of(self, number: int, occurrences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows [N, rows a number] in corpus `number` for its occurrences [N] in the run."""
        corpus = self._corpora[number]
        per_number = self.row_length // corpus.row_length
        places = occurrences[:, None] * per_number + np.arange(per_number)
        epoch, position = np.divmod(places.reshape(-1), corpus.rows)
        keys = mix(self._seed, 2, number, epoch.astype(np.uint64))
        return permute(position, corpus.rows, keys).reshape(-1, per_number)

    def _locate(self, start: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Corpus number [N], and how often that corpus came before [N]."""
        picks, occurrences = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        for block in range(start // BLOCK, (start + count - 1) // BLOCK + 1) if count else ():
            drawn, before = self._block(block), self._counts_before(block)
            low, high = max(start - block * BLOCK, 0), min(start + count - block * BLOCK, BLOCK)
            out = slice(block * BLOCK + low - start, block * BLOCK + high - start)
            picks[out] = drawn[low:high]
            counts = before + np.bincount(drawn[:low], minlength=len(self.names))
            here = drawn[low:high]
            for number in range(len(self.names)):
                places = np.flatnonzero(here == number)
                occurrences[out][places] = counts[number] + np.arange(len(places))
        return picks, occurrences

    def _block(self, block: int) -> npt.NDArray[np.int64]:
        """The corpus of each row of a block: stratified uniform draws, GROUP at a time, in shuffled order."""
        if self._last_block and self._last_block[0] == block:
            return self._last_block[1]
        numbers = np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.uint64)
        keys = mix(self._seed, 0, numbers // np.uint64(GROUP))
        strata = permute(numbers % np.uint64(GROUP), GROUP, keys)
        jitter = (mix(self._seed, 1, numbers) >> np.uint64(11)).astype(np.float64) / float(1 << 53)
        drawn = np.minimum(
            np.searchsorted(self._bounds, (strata + jitter) / GROUP, side="right"), len(self.names) - 1
        ).astype(np.int64)
        self._last_block = (block, drawn)
        return drawn

    def _counts_before(self, block: int) -> Any:
        """Rows of each corpus in all earlier blocks; computed once, in order."""
        while len(self._before) <= block:
            drawn = self._block(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self.names)))
        return self._before[block]


def _used_names(corpora: Mapping[str, PackedCorpus], weights: Mapping[str, float]) -> list[str]:
    """The corpora with a positive weight, sorted by name, after all checks."""
    for name, weight in weights.items():
        if name not in corpora:
            rule, remedy = (
                f"must be one of {', '.join(corpora)}",
                "correct the name or add it to prepare.corpora",
            )
            raise DataError(f"mixture.{name}", "no such corpus", rule, remedy)
        if not 0 <= weight < math.inf:
            raise DataError(
                f"mixture.{name}", weight, "a weight must not be negative", "use a positive share"
            )
    names = sorted(name for name in weights if weights[name] > 0)
    if not names:
        raise DataError(
            "mixture", dict(weights), "at least one weight must be positive", "give a corpus a share"
        )
    lengths = {corpora[name].row_length for name in names}
    if any(max(lengths) % length for length in lengths) or not all(corpora[name].rows for name in names):
        found = ", ".join(
            f"{name}: {corpora[name].rows} rows of {corpora[name].row_length}" for name in names
        )
        raise DataError(
            "mixture",
            found,
            "corpora need rows, of lengths that fill the longest exactly",
            "prepare them again",
        )
    return names


def corpus_of(name: str) -> str:
    """`text@4096` -> `text`: the corpus that rows of one length belong to."""
    return name.split("@", maxsplit=1)[0]


def open_mixture(prepare: StageFolder, weights: Mapping[str, float], seed: int) -> MixtureSampler:
    """The training rows of a finished prepare stage, of every length: those longer than the shortest under names like `text@4096`.

    Raises:
        DataError: as the sampler, or when a corpus was not prepared. FastDraftError: when a shard is missing or damaged.
    """
    corpora: dict[str, PackedCorpus] = {}
    shares: dict[str, float] = {}
    for corpus, weight in weights.items():
        lengths = open_lengths(prepare, corpus, "train")
        tokens = sum(rows.rows * rows.row_length for rows in lengths.values())
        for number, (length, rows) in enumerate(lengths.items()):
            name = f"{corpus}@{length}" if number else corpus
            if rows.rows or not tokens:
                corpora[name], shares[name] = rows, weight * rows.rows * length / tokens if tokens else weight
    return MixtureSampler(corpora, shares, seed)
