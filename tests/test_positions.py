"""Acceptance by position: buckets add up to the text's counts, and a draft that fades before the context ends
is told.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdraft.evaluation.rows import faded_sentences, position_results
from fastdraft.functional import positions
from fastdraft.functional.acceptance import counts_to_array
from fastdraft.functional.positions import bucket_bounds, bucket_of, counts_by_bucket
from test_acceptance import expected_counts
from test_evaluate import context, run
from test_evaluate import settings as evaluation


def test_buckets_double_from_512_on() -> None:
    assert [bucket_bounds(i) for i in range(4)] == [(0, 512), (512, 1024), (1024, 2048), (2048, 4096)]
    places = np.array([0, 511, 512, 1023, 1024, 2047, 2048, 131071, 131072])
    assert bucket_of(places).tolist() == [0, 0, 1, 1, 2, 2, 3, 8, 9]
    for place, bucket in zip(places, bucket_of(places), strict=True):
        first, end = bucket_bounds(int(bucket))
        assert first <= place < end


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_buckets_of_a_text_add_up_to_its_counts(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 7))
    chance = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0]))
    accepts = [
        np.array(values, dtype=np.float64)
        for values in data.draw(st.lists(st.lists(chance, max_size=40), min_size=1, max_size=5))
    ]
    starts = [data.draw(st.integers(490, 530)) for _ in accepts]
    found = counts_by_bucket(accepts, starts, k)
    for counts, accept in zip(found, accepts, strict=True):
        assert np.allclose(
            counts.sum(0)[: 7 + k], counts_to_array(expected_counts(accept, k)) if len(accept) else 0
        )


def test_a_round_counts_where_its_first_proposal_stands() -> None:
    accept = np.ones(8)
    found = counts_by_bucket([accept], [508], 3)[0]
    # Rounds begin at positions 508 and 512 and give 4 tokens each.
    assert found[:, 0].tolist() == [1, 1]
    assert found[:, 2].tolist() == [3, 3]
    assert found[:, 4].tolist() == [4, 4]
    later = counts_by_bucket([np.concatenate([np.ones(4), np.zeros(4)])], [508], 3)[0]
    assert later[:, 0].tolist() == [1, 4]
    assert later[:, 2].tolist() == [3, 0]


def test_many_texts_count_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    accepts = [rng.random(int(length)) for length in rng.integers(0, 90, 20)]
    starts = [int(start) for start in rng.integers(1, 1500, 20)]
    together = counts_by_bucket(accepts, starts, 4)
    monkeypatch.setattr(positions, "TOGETHER", 3)
    assert np.allclose(together, counts_by_bucket(accepts, starts, 4))
    alone = counts_by_bucket([accepts[3]], [starts[3]], 4)[0]
    assert np.allclose(together[3][: len(alone)], alone)


def table(rates: list[float], texts: int = 30, tokens: int = 60) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.stack(
        [
            np.concatenate(
                [counts_by_bucket([(rng.random(tokens) < rate).astype(float)], [0], 3)[0] for rate in rates]
            )
            for _ in range(texts)
        ]
    )


def test_rows_of_the_results_hold_counts_and_rates_of_each_bucket() -> None:
    counts = table([0.8, 0.7])
    found = position_results({("align", "code", 0.6): counts}, 3, 4096, 0)
    first, second = found.rows
    assert (first.first, first.end, second.first, second.end) == (0, 512, 512, 1024)
    for row, bucket in zip(found.rows, range(2), strict=True):
        assert row.num_drafts == pytest.approx(counts[:, bucket, 0].sum())
        assert row.acceptance_rate == pytest.approx(row.num_accepted_tokens / row.num_draft_tokens, abs=1e-6)
        assert row.block_efficiency == pytest.approx(row.num_generated_tokens / row.num_drafts, abs=1e-6)
        assert row.acceptance_rate_low < row.acceptance_rate < row.acceptance_rate_high
    assert found.faded == []


def test_a_draft_that_loses_half_of_its_acceptance_is_told_with_the_place() -> None:
    tables = {
        ("pretrain", "code", 0.6): table([0.9, 0.1]),
        ("align", "code", 0.6): table([0.8, 0.75, 0.1, 0.05]),
    }
    found = position_results(tables, 3, 131072, 0)
    (case,) = found.faded
    assert (case.checkpoint, case.task, case.first) == ("align", "code", 1024)
    (sentence,) = faded_sentences(found)
    assert "from position 1,024 on" in sentence
    assert "context of 131,072" in sentence


@pytest.mark.parametrize("size", [{"texts": 3}, {"texts": 5, "tokens": 10}])
def test_a_bucket_with_few_texts_is_not_judged(size: dict[str, int]) -> None:
    assert position_results({("align", "code", 0.6): table([0.9, 0.05], **size)}, 3, 4096, 0).faded == []


def test_an_evaluation_tells_every_bucket_and_they_add_up_to_the_rows(
    tmp_path: Path, tiny_target: Path, near_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positions, "FIRST_BUCKET", 16)
    config = evaluation(tmp_path, temperatures=[0.6], num_speculative_tokens=[2, 4])
    where = context(tmp_path / "run", tiny_target, config, {"pretrain": tiny_target, "align": near_draft})
    outcome = run(config, where)
    found = outcome.by_position
    assert (found.num_speculative_tokens, found.context_length) == (2, 256)
    assert len({row.first for row in found.rows}) > 1
    for total in outcome.select(method="replay", num_speculative_tokens=2):
        place = (total.checkpoint, total.task, total.temperature)
        mine = [row for row in found.rows if (row.checkpoint, row.task, row.temperature) == place]
        for key in ("drafts", "draft_tokens", "accepted_tokens", "examined_tokens", "generated_tokens"):
            whole = getattr(total, f"num_{key}")
            assert sum(getattr(row, f"num_{key}") for row in mine) == pytest.approx(whole, abs=1e-4)
    (where.folder("evaluate").path / "replay" / "align-first-0.6.npz").unlink()
    assert run(config, where).by_position == found
