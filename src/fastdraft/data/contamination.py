"""Do the evaluation texts occur in what was trained on? Overlap of 13-grams of token ids.

Decides the n-gram length (13, as in GPT-3's appendix C, arXiv 2005.14165), that n-grams are compared by a 64-bit hash,
and that scanning goes over arrays piece by piece, so that memory is that of the evaluation texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdraft.console import Console
from fastdraft.data.rows import read_all
from fastdraft.data.shards import PackedCorpus, corpus_names, open_lengths
from fastdraft.run_folder import StageFolder

NGRAM = 13
CHUNK_IDS = 1 << 20
_FACTOR = 0x9E3779B97F4A7C15

U64 = npt.NDArray[np.uint64]


def ngram_hashes(ids: npt.ArrayLike, n: int = NGRAM) -> U64:
    """The hash of each window of n ids: uint64 [len(ids) - n + 1], empty for shorter texts.

    A polynomial in an odd 64-bit factor, then a finaliser; equal windows have equal hashes.
    """
    values = np.asarray(ids).astype(np.uint64).reshape(-1) + np.uint64(1)
    if len(values) < n:
        return np.empty(0, dtype=np.uint64)
    count = len(values) - n + 1
    state = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        state = state * np.uint64(_FACTOR) + values[offset : offset + count]
        state ^= state >> np.uint64(29)
    return state


class Contamination:
    """Looks for the n-grams of evaluation prompts in arrays of training ids.

    Args:
        tasks: Token ids of each prompt by task name.
        n: Length of the n-grams.
    """

    def __init__(self, tasks: Mapping[str, Sequence[Sequence[int]]], n: int = NGRAM) -> None:
        self.n = n
        self._hashes = {
            name: [np.unique(ngram_hashes(prompt, n)) for prompt in prompts]
            for name, prompts in tasks.items()
        }
        every = [hashes for prompts in self._hashes.values() for hashes in prompts]
        self._wanted: U64 = np.unique(np.concatenate(every)) if every else np.empty(0, dtype=np.uint64)
        self._found = np.zeros(len(self._wanted), dtype=bool)

    def scan(self, ids: npt.ArrayLike) -> None:
        """Looks through one run of training ids (1-D; 2-D arrays are read row after row as one run)."""
        flat = np.asarray(ids).reshape(-1)
        if not len(self._wanted):
            return
        for start in range(0, len(flat), CHUNK_IDS):
            hashes = ngram_hashes(flat[start : start + CHUNK_IDS + self.n - 1], self.n)
            places = np.minimum(np.searchsorted(self._wanted, hashes), len(self._wanted) - 1)
            self._found[places[self._wanted[places] == hashes]] = True

    def scan_many(self, texts: Iterable[npt.ArrayLike]) -> None:
        """Looks through separate texts; n-grams never reach from one to the next."""
        for ids in texts:
            self.scan(ids)

    def scan_corpus(self, corpus: PackedCorpus, on_shard: Callable[[int], None] = lambda count: None) -> None:
        """Looks through a prepared corpus, shard by shard; calls `on_shard` with the number of ids after each."""
        for number in range(corpus.num_shards):
            shard = corpus.shard(number)
            self.scan(shard)
            on_shard(shard.size)

    def result(self) -> dict[str, dict[str, Any]]:
        """Per task: prompts, prompts_with_overlap, ngrams (distinct, of all prompts), ngrams_matched."""
        return {name: self._task_result(prompts) for name, prompts in self._hashes.items()}

    def _task_result(self, prompts: list[U64]) -> dict[str, Any]:
        matched = [hashes[self._found[np.searchsorted(self._wanted, hashes)]] for hashes in prompts]
        return {
            "prompts": len(prompts),
            "prompts_with_overlap": sum(len(hashes) > 0 for hashes in matched),
            "ngrams": _distinct(prompts),
            "ngrams_matched": _distinct(matched),
        }


def _distinct(arrays: list[U64]) -> int:
    return len(np.unique(np.concatenate(arrays))) if arrays else 0


def search_training_text(
    tasks: Mapping[str, Sequence[Sequence[int]]],
    trained_on: Sequence[StageFolder],
    console: Console,
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """What evaluation texts share with everything trained on, as `Contamination.result`.

    Args:
        tasks: Token ids of each text by task name.
        trained_on: The finished stages that hold training text: prepare, synthesize.
        console: Shows the progress and hears of Ctrl-C.
        folder: Named when the search is stopped.

    Raises:
        Interrupted: after a signal.
    """
    search = Contamination(tasks)
    prepared = [artifact for artifact in trained_on if artifact.name == "prepare"]
    lengths = [
        open_lengths(artifact, name, "train") for artifact in prepared for name in corpus_names(artifact)
    ]
    corpora = [corpus for by_length in lengths for corpus in by_length.values()]
    with console.progress("overlap search", sum(corpus.tokens for corpus in corpora), "tokens") as progress:

        def on_shard(count: int) -> None:
            progress.advance(count)
            console.stop.check(folder)

        for corpus in corpora:
            search.scan_corpus(corpus, on_shard)
        for artifact in trained_on:
            if artifact.name == "synthesize":
                search.scan_many(row.prompt_ids + row.response_ids for row in read_all(artifact))
    return search.result()
