"""Which rows a step has: a weighted mixture of prepared corpora, as a function of the step.

Every step holds each corpus in its share, to within about a row; each corpus is walked in a fresh permutation
per epoch. There is no state: a resumed run asks for its step and gets the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fastdraft.data.shards import PackedCorpus, open_corpus
from fastdraft.run_folder import StageFolder


class Mixture:
    """Rows of corpora in shares on any scale; `rows_per_step` are those of all processes together."""

    def __init__(
        self, corpora: Mapping[str, PackedCorpus], weights: Mapping[str, float], rows_per_step: int, seed: int
    ) -> None:
        self.names = sorted(name for name, weight in weights.items() if weight > 0)
        self.corpora, self.rows_per_step, self.seed = corpora, rows_per_step, seed
        self.row_length = corpora[self.names[0]].row_length
        weighted = np.array([weights[name] for name in self.names], dtype=np.float64)
        self._shares = weighted / weighted.sum()
        # A step may touch two epochs of each corpus.
        self._order = lru_cache(2 * len(self.names))(self._permutation)

    def rows(self, step: int, part: slice = slice(None)) -> npt.NDArray[np.int64]:
        """The rows of step `step` (0-based), or a part of them: int64 [rows, row_length + 1].

        Of several processes, number r of n takes `slice(r, None, n)`; no other rows are read.
        """
        before, behind = self._taken(step * self.rows_per_step), self._taken((step + 1) * self.rows_per_step)
        picks = np.repeat(np.arange(len(self.names)), behind - before)
        occurrences = np.concatenate([np.arange(*ends) for ends in zip(before, behind, strict=True)])
        # Shuffled, so that every process and every micro-batch gets of each corpus.
        order = np.random.default_rng([self.seed, step]).permutation(self.rows_per_step)[part]
        picks, occurrences = picks[order], occurrences[order]
        rows = np.empty((len(order), self.row_length + 1), dtype=np.int64)
        for number in np.unique(picks).tolist():
            own = picks == number
            corpus = self.corpora[self.names[number]]
            rows[own] = corpus.take(self._row_numbers(number, occurrences[own]))
        return rows

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each corpus is read in `steps` steps."""
        taken = self._taken(steps * self.rows_per_step).tolist()
        return {name: count / self.corpora[name].rows for name, count in zip(self.names, taken, strict=True)}

    def _taken(self, rows: int) -> npt.NDArray[np.int64]:
        """How many of the run's first `rows` rows each corpus gives."""
        # Sainte-Lague's method: as near to the shares as rounding, but no count falls as `rows` grows.
        least = np.floor(self._shares * max(rows - len(self.names), 0) + 0.5)
        taken: npt.NDArray[np.int64] = least.astype(np.int64)
        for _ in range(rows - int(taken.sum())):
            taken[np.argmin((taken + 0.5) / self._shares)] += 1
        return taken

    def _row_numbers(self, number: int, occurrences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows in corpus `number` for its occurrences in the run."""
        epochs, positions = np.divmod(occurrences, self.corpora[self.names[number]].rows)
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            own = epochs == epoch
            numbers[own] = self._order(number, epoch)[positions[own]]
        return numbers

    def _permutation(self, number: int, epoch: int) -> npt.NDArray[np.int64]:
        rows = self.corpora[self.names[number]].rows
        return np.random.default_rng([self.seed, number, epoch]).permutation(rows)


def open_mixture(
    prepare: StageFolder, weights: Mapping[str, float], rows_per_step: int, seed: int
) -> Mixture:
    """The training rows of a finished prepare stage in the shares of a recipe's `mixture`."""
    corpora = {name: open_corpus(prepare, name, "train") for name, weight in weights.items() if weight > 0}
    return Mixture(corpora, weights, rows_per_step, seed)
