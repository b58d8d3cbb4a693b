"""Do the evaluation texts occur in what was trained on? Overlap of 13-grams of ids (arXiv 2005.14165, C).

n-grams are compared by a 64-bit hash, and arrays are scanned piece by piece: memory is that of the texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdraft.console import Console
from fastdraft.data.rows import read_all
from fastdraft.data.shards import open_corpus
from fastdraft.run_folder import StageFolder

NGRAM = 13
CHUNK_IDS = 1 << 20
U64 = npt.NDArray[np.uint64]


def ngram_hashes(ids: npt.ArrayLike, n: int = NGRAM) -> U64:
    """The hash of each window of n ids: uint64 [len(ids) - n + 1], empty for shorter texts."""
    values = np.asarray(ids).astype(np.uint64).reshape(-1) + np.uint64(1)
    count = max(0, len(values) - n + 1)
    state = np.zeros(count, dtype=np.uint64)
    for offset in range(n if count else 0):
        # A polynomial in an odd factor; the shift brings the high bits down.
        state = state * np.uint64(0x9E3779B97F4A7C15) + values[offset : offset + count]
        state ^= state >> np.uint64(29)
    return state


class Contamination:
    """Looks for the n-grams of evaluation prompts (token ids by task name) in arrays of training ids."""

    def __init__(self, tasks: Mapping[str, Sequence[Sequence[int]]], n: int = NGRAM) -> None:
        self.n = n
        hashes = {
            name: [np.unique(ngram_hashes(ids, n)) for ids in prompts] for name, prompts in tasks.items()
        }
        self._hashes = hashes
        self._wanted = _distinct([one for prompts in hashes.values() for one in prompts])
        self._found = np.zeros(len(self._wanted), dtype=bool)

    def scan(self, ids: npt.ArrayLike) -> None:
        """Looks through one run of training ids (1-D; 2-D arrays are read row after row as one run)."""
        flat = np.asarray(ids).reshape(-1)
        for start in range(0, len(flat) if len(self._wanted) else 0, CHUNK_IDS):
            hashes = ngram_hashes(flat[start : start + CHUNK_IDS + self.n - 1], self.n)
            positions = np.minimum(np.searchsorted(self._wanted, hashes), len(self._wanted) - 1)
            self._found[positions[self._wanted[positions] == hashes]] = True

    def result(self) -> dict[str, dict[str, Any]]:
        """Per task: prompts, prompts_with_overlap, ngrams (distinct, of all prompts), ngrams_matched."""
        results = {}
        for name, prompts in self._hashes.items():
            matched = [hashes[self._found[np.searchsorted(self._wanted, hashes)]] for hashes in prompts]
            results[name] = {
                "prompts": len(prompts),
                "prompts_with_overlap": sum(len(hashes) > 0 for hashes in matched),
                "ngrams": len(_distinct(prompts)),
                "ngrams_matched": len(_distinct(matched)),
            }
        return results


def _distinct(arrays: list[U64]) -> U64:
    return np.unique(np.concatenate(arrays)) if arrays else np.empty(0, dtype=np.uint64)


def search_training_text(
    tasks: Mapping[str, Sequence[Sequence[int]]], trained_on: Sequence[StageFolder], console: Console
) -> dict[str, dict[str, Any]]:
    """What evaluation texts share with the stages prepare and synthesize, as `Contamination.result`."""
    search = Contamination(tasks)
    prepared = [folder for folder in trained_on if folder.name == "prepare"]
    corpora = [open_corpus(one, name, "train") for one in prepared for name in one.manifest()["corpora"]]
    with console.progress("overlap search", sum(corpus.tokens for corpus in corpora), "tokens") as progress:
        for shard in (shard for corpus in corpora for shard in corpus.shards):
            search.scan(shard)
            progress.advance(shard.size)
            console.stop.check("overlap search")
    for folder in trained_on:
        if folder.name == "synthesize":
            for row in read_all(folder):
                search.scan(row.prompt_ids + row.response_ids)
    return search.result()
