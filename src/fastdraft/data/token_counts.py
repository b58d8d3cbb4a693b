"""Which token ids are written most: counts over what the target wrote and over prepared corpora.

Shapes: V vocabulary, K chosen ids.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from fastdraft.data.rows import read_all
from fastdraft.data.shards import Split, open_corpus
from fastdraft.run_folder import StageFolder

# What the target writes is what has to be proposed; the corpora stand for what its prompts did not ask for.
ANSWERS_SHARE = 0.9
_MOST_ROWS, _ROWS = 1 << 18, 1 << 12  # of a corpus that are counted, and at once

Counts = dict[str, NDArray[np.int64]]


def count_tokens(
    prepare: StageFolder | None, synthesize: StageFolder | None, vocab_size: int, split: Split
) -> Counts:
    """How often each id stands in the target's `answers` and in the `corpora` of a split, int64 [V] each.

    Of a stage that is None, or a split without a token, there are none.
    """
    found = {name: np.zeros(vocab_size, dtype=np.int64) for name in ("answers", "corpora")}
    for row in read_all(synthesize, split) if synthesize else ():
        np.add.at(found["answers"], np.array(row.response_ids, dtype=np.int64), 1)
    for corpus in (
        [open_corpus(prepare, name, split) for name in prepare.manifest()["corpora"]] if prepare else ()
    ):
        for start in range(0, min(corpus.rows, _MOST_ROWS), _ROWS):
            rows = corpus.take(np.arange(start, min(start + _ROWS, corpus.rows)))
            found["corpora"] += np.bincount(rows.reshape(-1), minlength=vocab_size)
    return {name: counts for name, counts in found.items() if counts.any()}


def most_written(
    counts: Mapping[str, NDArray[np.int64]],
    always: Collection[int],
    never: Collection[int],
    size: int | None = None,
    coverage: float | None = None,
) -> NDArray[np.int64]:
    """The ids that are written most, rising, int64 [K], `always` among them: `size` of them, or as few as
    hold a share `coverage` of the text, of which the answers are nine tenths where there are corpora too.

    Among ids that are equally frequent the lower come first: those of a BPE were merged earlier.
    """
    weights = {name: ANSWERS_SHARE if name == "answers" else 1 - ANSWERS_SHARE for name in counts}
    share_V = sum(weights[name] * each / each.sum() for name, each in counts.items()) / sum(weights.values())
    rank_V = share_V.copy()
    rank_V[list(always)] += 2.0
    rank_V[list(never)] = -1.0
    order = np.argsort(-rank_V, kind="stable")[: len(rank_V) - len(never)]
    if coverage is not None:
        # up to rounding: a coverage of 1 is every id that was ever written
        size = 1 + int(np.searchsorted(np.cumsum(share_V[order]), coverage - 1e-9))
    return np.sort(order[: max(size or 0, len(always))])


def covered(counts: Mapping[str, NDArray[np.int64]], ids: NDArray[np.int64]) -> dict[str, float]:
    """The share of each kind of text that these ids write."""
    return {name: float(each[ids].sum() / each.sum()) for name, each in counts.items()}
