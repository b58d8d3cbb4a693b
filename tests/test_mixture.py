"""Which rows a step has: shares, epochs, parts of a step, no state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
    def shards(self) -> list[np.ndarray[Any, Any]]:  # type: ignore[override]
        return [np.repeat(self.first + np.arange(self.rows, dtype=np.uint16)[:, None], 4, 1)]


def test_there_is_no_state_and_weights_are_on_any_scale() -> None:
    corpora = {"a": Numbers(37), "b": Numbers(101, 1000)}
    mixture, other = (
        Mixture(corpora, weights, 20, 3) for weights in ({"a": 1, "b": 2}, {"b": 0.2, "a": 0.1})
    )
    whole = [mixture.rows(step) for step in range(20)]
    assert all((other.rows(step) == whole[step]).all() for step in (17, 2, 19, 0))
    assert (whole[0].dtype, whole[0].shape) == (np.int64, (20, 4))
    assert (Mixture(corpora, {"a": 1, "b": 2}, 20, 4).rows(0) != whole[0]).any()


@pytest.mark.parametrize("rows_per_step", [1, 7, 64])
def test_every_step_holds_the_corpora_in_their_shares(rows_per_step: int) -> None:
    mixture = Mixture(
        {"a": Numbers(50), "b": Numbers(50, 1000), "c": Numbers(9, 5000)},
        {"a": 1, "b": 2, "c": 0},
        rows_per_step,
        0,
    )
    counts = np.array([(mixture.rows(step)[:, 0] < 1000).sum() for step in range(60)])
    assert (np.abs(counts - rows_per_step / 3) < 1).all()
    assert (np.abs(counts.cumsum() - rows_per_step / 3 * np.arange(1, 61)) < 1).all()
    assert mixture.epochs(30) == pytest.approx({"a": rows_per_step * 10 / 50, "b": rows_per_step * 20 / 50})
    if rows_per_step == 64:
        assert len({tuple(mixture.rows(step)[:, 0] < 1000) for step in range(9)}) == 9, (
            "shuffled anew each step"
        )


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
