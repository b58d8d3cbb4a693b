"""Forecasts: closed forms against hand-made numbers and against the published table."""

from __future__ import annotations

import pytest

from fastdraft import forecast


def test_block_efficiency_of_a_perfect_and_of_a_useless_draft() -> None:
    assert forecast.block_efficiency(1.0, 3) == 4
    assert forecast.block_efficiency(0.0, 3) == 1
    assert forecast.block_efficiency(0.5, 3) == pytest.approx((1 - 0.5**4) / (1 - 0.5))


def test_acceptance_rate_and_conditional_rate_are_inverse() -> None:
    for k in (1, 3, 8):
        for chance in (0.05, 0.45, 0.9):
            rate = forecast.acceptance_rate(chance, k)
            assert forecast.conditional_acceptance_rate(rate, k) == pytest.approx(chance)


def test_memory_bound_speedup_gives_the_papers_figures() -> None:
    """The Phi-3-mini pair: acceptance rates at K = 3 and the speed-ups derived from them, costs by
    parameters.
    """
    cost = 52_107_776 / 3_821_079_552
    for rate, speedup in ((0.369, 2.02), (0.306, 1.84), (0.370, 2.03), (0.562, 2.58)):
        assert forecast.mbsu(1 + 3 * rate, 3, cost) == pytest.approx(speedup, abs=0.006)
        assert forecast.mbsu_at(rate, 3, cost) == pytest.approx(forecast.mbsu(1 + 3 * rate, 3, cost))


def test_predicted_speedup_of_a_free_draft_is_the_block_efficiency() -> None:
    assert forecast.predicted_speedup(2.5, 3, 0.0, 0.02, 0.02) == pytest.approx(2.5)
    assert forecast.predicted_speedup(2.0, 4, 0.25, 1.0, 1.0) == pytest.approx(1.0)


def test_lookup_pays_for_wide_passes_where_it_finds_something_and_its_draft_elsewhere() -> None:
    seconds = {1: 1.0, 4: 1.4}
    assert forecast.lookup_speedup(1.5, 3, 0.25, seconds) == pytest.approx(1.5 / (0.25 * 1.4 + 0.75 * 1.0))
    both = forecast.lookup_speedup(2.0, 3, 0.25, seconds, 0.1, 0.05)
    assert both == pytest.approx(2.0 / (1.4 + 0.75 * 3 * 0.1 + 0.05))
    apart = forecast.lookup_speedup(2.0, 1, 0.25, seconds | {2: 1.1}, 0.1, 0.05, 3)
    assert apart == pytest.approx(2.0 / (0.25 * 1.4 + 0.75 * (1.1 + 0.1) + 0.05))


def test_a_dearer_draft_wants_a_shorter_draft_length() -> None:
    def best(cost_ratio: float) -> int:
        return max(range(1, 9), key=lambda k: forecast.mbsu_at(0.3, k, cost_ratio))

    assert best(0.3) < best(0.01)


def test_training_time_grows_with_tokens_and_size() -> None:
    seconds = forecast.training_seconds
    assert seconds(2e6, 10**6) == pytest.approx(2 * seconds(1e6, 10**6))
    assert seconds(1e6, 2 * 10**6) == pytest.approx(2 * seconds(1e6, 10**6))
    assert seconds(1e6, 10**8, "cuda:0") < seconds(1e6, 10**8, "cpu", threads=2)


def test_disk_sizes_are_exact_where_the_format_is() -> None:
    assert forecast.shard_bytes(1000, 32064) == 2000
    assert forecast.shard_bytes(1000, 65536) == 2000
    assert forecast.shard_bytes(1000, 128256) == 4000
    assert forecast.checkpoint_bytes(1000) == 4000
    assert forecast.checkpoint_bytes(1000, resumable=True) == 12000


def test_training_memory_counts_weights_gradients_and_two_moments() -> None:
    shape = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "layers": 2}
    assert forecast.training_memory_bytes(10**6, **shape, micro_batch=0) == 16e6
    assert forecast.training_memory_bytes(10**6, **shape, micro_batch=2048) > 16e6
