"""Expected counts against brute force and simulation; rates, intervals, loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastdraft.data.filters import is_looping
from fastdraft.functional.acceptance import (
    Counts,
    add_counts,
    batched_expected_counts,
    counts_from_array,
    counts_to_array,
)
from fastdraft.functional.intervals import difference_interval, group_numbers, num_groups, ratio_interval


def expected_counts(accept: np.ndarray, k: int) -> Counts:
    return batched_expected_counts([accept], [k])[0][k]


def simulate(decisions: list[bool], k: int) -> Counts:
    """A run over a text whose accept decisions are known, by the conventions in words."""
    place, end, found = 0, len(decisions), Counts()
    while place < end:
        accepted = 0
        while accepted < k and place + accepted < end and decisions[place + accepted]:
            accepted += 1
        refused = accepted < k and place + accepted < end
        emitted = min(accepted + 1, end - place)
        per_pos = tuple(float(j < accepted) for j in range(k))
        found += Counts(1, k, accepted, per_pos, accepted + refused, emitted, 0, 0)
        place += emitted
    return found


def numbers(counts: Counts) -> list[float]:
    c = counts
    proposals = [c.num_drafts, c.num_draft_tokens, c.num_accepted_tokens, c.num_examined_tokens]
    return [*proposals, c.num_generated_tokens, *c.num_accepted_tokens_per_pos]


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_zero_one_probabilities_give_the_counts_of_the_run(k: int) -> None:
    rng = np.random.default_rng(k)
    for length in (1, 2, 3, 4, 9, 40):
        decisions = rng.random(length) < 0.7
        assert numbers(expected_counts(decisions.astype(float), k)) == numbers(
            simulate(decisions.tolist(), k)
        )


def test_expected_counts_are_the_mean_over_all_runs() -> None:
    accept = np.array([0.3, 0.9, 0.5, 1.0, 0.0, 0.8])
    for k in (1, 2, 4):
        total = np.zeros(5 + k)
        for code in range(2 ** len(accept)):
            decisions = [bool(code >> i & 1) for i in range(len(accept))]
            weight = math.prod(a if d else 1 - a for a, d in zip(accept, decisions, strict=True))
            total += weight * np.array(numbers(simulate(decisions, k)))
        assert np.allclose(numbers(expected_counts(accept, k)), total)


def test_texts_of_different_length_counted_together_are_as_if_counted_alone() -> None:
    rng = np.random.default_rng(1)
    accepts = [rng.random(n) for n in (5, 1, 30, 0, 12)]
    together = batched_expected_counts(accepts, [4, 1, 2])
    for accept, found in zip(accepts, together, strict=True):
        assert list(found) == [1, 2, 4]
        for k, counts in found.items():
            assert np.allclose(numbers(counts), numbers(expected_counts(accept, k)))
    assert numbers(together[3][2]) == [0] * 7
    assert batched_expected_counts([], [3]) == []


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        expected_counts(np.ones(3), 0)


def test_rates_follow_from_added_counts_not_from_mean_rates() -> None:
    total = Counts(10, 30, 9, (5, 3, 1), 15, 19, 6.0, 12) + Counts(1, 3, 3, (1, 1, 1), 3, 4, 3.0, 3)
    assert total.acceptance_rate == 12 / 33
    assert total.conditional_acceptance_rate == 12 / 18
    assert total.block_efficiency == 23 / 11
    assert total.overlap == 9 / 15
    assert total.num_accepted_tokens_per_pos == (6, 4, 2)
    assert counts_from_array(counts_to_array(total)) == total


def test_empty_counts_have_no_rates_and_change_no_sum() -> None:
    assert math.isnan(Counts().acceptance_rate)
    one = Counts(1, 2, 1, (1, 0), 2, 2, 1, 2)
    assert add_counts([Counts(), one]) == one
    assert add_counts([]) == Counts()
    with pytest.raises(ValueError, match="different"):
        add_counts([one, Counts(1, 1, 1, (1,), 1, 2)])


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    for seed in range(100):
        wholes = rng.integers(20, 60, size=60).astype(float)
        low, high = ratio_interval(rng.binomial(wholes.astype(int), 0.3).astype(float), wholes, seed)
        hits += low <= 0.3 <= high
    assert 88 <= hits <= 99


def test_paired_differences_are_surer_than_unpaired_ones() -> None:
    rng = np.random.default_rng(0)
    wholes = np.full(50, 40.0)
    before = rng.uniform(2, 30, size=50)
    low, high = difference_interval((before, wholes), (before + 1 + rng.normal(0, 0.2, 50), wholes), seed=1)
    assert 0 < low < 1 / 40 < high
    assert high - low < 0.01


def test_one_prompt_or_one_conversation_has_no_interval() -> None:
    assert all(math.isnan(value) for value in ratio_interval(np.ones(1), np.ones(1), 0))
    one = np.zeros(5, dtype=np.int64)
    assert all(math.isnan(value) for value in ratio_interval(np.arange(5.0), np.full(5, 9.0), 0, one))
    assert all(
        math.isnan(value)
        for value in difference_interval((np.arange(5.0), np.full(5, 9.0)), (np.ones(5), np.ones(5)), 0, one)
    )


def test_duplicated_turns_do_not_narrow_an_interval() -> None:
    rng = np.random.default_rng(3)
    wholes = rng.integers(10, 60, size=30).astype(float)
    parts, others = (rng.binomial(wholes.astype(int), rate).astype(float) for rate in (0.3, 0.4))
    talks = group_numbers(np.repeat(np.arange(30), 4).tolist())
    four = [np.repeat(values, 4) for values in (parts, wholes, others)]
    assert ratio_interval(four[0], four[1], 5, talks) == ratio_interval(parts, wholes, 5)
    assert difference_interval((four[0], four[1]), (four[2], four[1]), 5, talks) == difference_interval(
        (parts, wholes), (others, wholes), 5
    )
    low, high = ratio_interval(parts, wholes, 5)
    narrow = ratio_interval(four[0], four[1], 5)
    assert narrow[1] - narrow[0] < 0.7 * (high - low), "without groups they would"
    assert (num_groups(talks, 120), num_groups(None, 120)) == (30, 120)


def test_a_text_that_ends_in_a_repeated_piece_loops() -> None:
    start = list(range(100, 150))
    assert is_looping(start + [7] * 32)
    assert is_looping(start + [1, 2, 3, 4, 5] * 7)
    assert is_looping(start + list(range(30)) * 3)


def test_a_text_that_does_not_repeat_three_times_does_not_loop() -> None:
    start = list(range(100, 150))
    assert not is_looping(start)
    assert not is_looping([7] * 31)
    assert not is_looping(start + list(range(30)) * 2)
    assert not is_looping(start + [7] * 40 + [8])
