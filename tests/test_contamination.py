"""13-gram overlap between evaluation prompts and training ids."""

from __future__ import annotations

import numpy as np
import pytest

from fastdraft.data import contamination
from fastdraft.data.contamination import Contamination, ngram_hashes


def result(prompts: int, overlap: int, ngrams: int, matched: int) -> dict[str, int]:
    names = ("prompts", "prompts_with_overlap", "ngrams", "ngrams_matched")
    return dict(zip(names, (prompts, overlap, ngrams, matched), strict=True))


def by_hand(prompts: list[list[int]], corpus: list[int], n: int) -> tuple[int, int, int]:
    grams = [{tuple(p[i : i + n]) for i in range(len(p) - n + 1)} for p in prompts]
    seen = {tuple(corpus[i : i + n]) for i in range(len(corpus) - n + 1)}
    return sum(bool(g & seen) for g in grams), len(set().union(*grams)), len(set().union(*grams) & seen)


@pytest.mark.parametrize("chunk", [10, 1 << 20])
def test_overlap_equals_a_count_by_hand(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(contamination, "CHUNK_IDS", chunk)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 3, 12).tolist() for _ in range(20)]
    corpus = draw.integers(0, 3, 200)
    finder = Contamination({"a": prompts, "none": [[7] * 9]}, n=5)
    finder.scan(corpus.astype(np.uint16))
    overlap, ngrams, matched = by_hand(prompts, corpus.tolist(), 5)
    assert finder.result() == {"a": result(20, overlap, ngrams, matched), "none": result(1, 0, 1, 0)}
    assert 0 < matched < ngrams


def test_a_prompt_of_thirteen_tokens_is_found_and_of_twelve_is_not() -> None:
    finder = Contamination({"a": [list(range(13)), list(range(12))]})
    finder.scan(np.arange(100).reshape(10, 10))
    assert finder.result()["a"] == result(2, 1, 1, 1)


def test_ngrams_do_not_reach_over_separate_texts() -> None:
    finder = Contamination({"a": [list(range(13))]})
    for ids in (range(7), range(7, 20)):
        finder.scan(list(ids))
    assert finder.result()["a"]["ngrams_matched"] == 0


def test_no_prompts_and_short_texts_are_fine() -> None:
    finder = Contamination({"a": []})
    finder.scan([1, 2, 3])
    assert finder.result()["a"] == result(0, 0, 0, 0)
    assert len(ngram_hashes([1, 2, 3])) == 0


def test_hashes_of_different_windows_differ() -> None:
    ids = np.random.default_rng(1).integers(0, 2, 4000)
    windows = {tuple(ids[i : i + 13].tolist()) for i in range(len(ids) - 12)}
    assert len(np.unique(ngram_hashes(ids))) == len(windows)
