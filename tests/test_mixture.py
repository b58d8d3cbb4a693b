"""Which rows a step has: shares, epochs, parts of a step, no state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdraft.data.mixture import Mixture, open_mixture
from fastdraft.data.shards import PackedCorpus
from fastdraft.errors import DataError
from fastdraft.training.batches import packed_batch
from test_data import make_corpus

GOLDEN_ROWS = [109, 2, 103, 101, 4, 6]


class Numbers(PackedCorpus):
    """A corpus without files whose rows hold `first` + their number."""

    def __init__(self, rows: int, first: int = 0) -> None:
        super().__init__(Path("."), [{"file": "", "rows": rows}], 3, "uint16")
        self.first = first

    @property
    def shards(self) -> list[np.ndarray[Any, Any]]:
        return [np.repeat(self.first + np.arange(self.rows, dtype=np.uint16)[:, None], 4, 1)]


def test_there_is_no_state_and_weights_are_on_any_scale() -> None:
    corpora = {"a": Numbers(37), "b": Numbers(101, 1000)}
    mixture, other = (
        Mixture(corpora, weights, 20, 3) for weights in ({"a": 1, "b": 2}, {"b": 0.2, "a": 0.1})
    )
    whole = [mixture.rows(step) for step in range(20)]
    assert all((other.rows(step) == whole[step]).all() for step in (17, 2, 19, 0))
    assert whole[0].dtype == np.int64
    assert whole[0].shape == (20, 4)
    assert (Mixture(corpora, {"a": 1, "b": 2}, 20, 4).rows(0) != whole[0]).any()


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(1, 70), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_step_holds_the_corpora_in_their_shares(weights: list[float], size: int, first: int) -> None:
    names = [str(number) for number in range(len(weights))]
    corpora = {name: Numbers(50, 1000 * int(name)) for name in names}
    mixture = Mixture(
        {**corpora, "none": Numbers(9)}, {**dict(zip(names, weights, strict=True)), "none": 0}, size, 0
    )
    shares = np.array(weights) / sum(weights)
    for step in range(first, first + 5):
        rows = mixture.rows(step)
        assert len(rows) == size
        counts = np.bincount(rows[:, 0] // 1000, minlength=len(weights))
        assert (np.abs(counts - shares * size) < 2).all()
    read = np.array([mixture.epochs(first)[name] for name in names]) * 50
    assert (np.abs(read - shares * size * first) < 1.5).all()


def test_the_rows_of_a_step_are_shuffled_anew_each_step() -> None:
    mixture = Mixture({"a": Numbers(50), "b": Numbers(50, 1000)}, {"a": 1, "b": 2}, 64, 0)
    assert len({tuple(mixture.rows(step)[:, 0] < 1000) for step in range(9)}) == 9


def test_each_epoch_walks_a_corpus_once_in_a_new_order() -> None:
    mixture = Mixture({"a": Numbers(60)}, {"a": 1}, 20, 0)
    epochs = np.concatenate([mixture.rows(step)[:, 0] for step in range(9)]).reshape(3, 60)
    assert all(sorted(epoch.tolist()) == list(range(60)) for epoch in epochs)
    assert len({tuple(sorted(epoch[:20].tolist())) for epoch in epochs}) == 3
    across = Mixture({"a": Numbers(60)}, {"a": 1}, 25, 0)
    rows = np.concatenate([across.rows(step)[:, 0] for step in range(12)])
    assert np.bincount(rows).tolist() == [5] * 60, "steps that reach over the end of an epoch"


def test_a_corpus_smaller_than_its_share_of_a_step_is_read_several_times_a_step() -> None:
    rows = Mixture({"a": Numbers(3)}, {"a": 1}, 9, 0).rows(4)[:, 0]
    assert np.bincount(rows).tolist() == [3, 3, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 12])
def test_the_parts_of_all_processes_are_the_step(size: int) -> None:
    mixture = Mixture({"a": Numbers(37), "b": Numbers(101, 1000)}, {"a": 1, "b": 2}, 10, 3)
    parts = [mixture.rows(5, slice(rank, None, size)) for rank in range(size)]
    whole = mixture.rows(5)
    for rank, part in enumerate(parts):
        assert (part == whole[rank::size]).all()


def test_prepared_rows_are_trained_on_one_token_ahead(tmp_path: Path) -> None:
    stage = make_corpus(tmp_path / "prepare", 30)
    rows = open_mixture(stage, {"text": 2.0, "none": 0.0}, 4, 0).rows(1)
    batch = packed_batch(rows)
    assert batch.input_ids.tolist() == rows[:, :-1].tolist()
    assert batch.labels.reshape(4, -1).tolist() == rows[:, 1:].tolist()
    with pytest.raises(DataError, match="corpus 'prose': not prepared; must be one of text"):
        open_mixture(stage, {"prose": 1.0}, 4, 0)


def test_the_first_rows_of_a_seed_do_not_change() -> None:
    mixture = Mixture({"a": Numbers(10), "b": Numbers(10, 100)}, {"a": 1, "b": 1}, 6, 0)
    assert mixture.rows(0)[:, 0].tolist() == GOLDEN_ROWS
