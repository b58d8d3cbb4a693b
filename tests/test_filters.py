"""Which responses are kept and how the others are counted."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft.data.filters import RowCounts, RowFilter, loop_start
from fastdraft.data.rows import SyntheticRow
from fastdraft.functional.generation import Generation, Sampling


def new_filter(**options: Any) -> RowFilter:
    return RowFilter({300, 301}, lambda ids: " ".join("" if i == 9 else str(i) for i in ids), **options)


def judge(row_filter: RowFilter, response: list[int], finish: Any = "length", prob: float = -0.5) -> Any:
    """The row to write, and what was counted."""
    counts = RowCounts(asked=1)
    generation = Generation([1, 2], response, [prob] * len(response), finish)
    row = row_filter.judge(generation, "s", Sampling(0.6), counts)
    assert counts.balance() == 0
    return row, counts


def test_a_good_response_becomes_a_row_with_all_that_training_needs() -> None:
    row, counts = judge(new_filter(), [5, 6, 3], "stop")
    expected = Generation([1, 2], [5, 6, 3], [-0.5] * 3, "stop")
    assert row == SyntheticRow.of(expected, "s", Sampling(0.6))
    assert (counts.written, counts.tokens, counts.stopped) == (1, 3, 1)


@pytest.mark.parametrize(
    ("response", "finish", "options", "reason"),
    [
        ([5, 301, 6], "length", {}, "unknown_id"),
        ([3], "stop", {}, "empty"),
        ([9, 9, 3], "stop", {}, "empty"),
        ([4, *[7, 8] * 40], "length", {"looping": "drop"}, "looping"),
    ],
)
def test_each_filter_counts_its_reason(response: list[int], finish: str, options: Any, reason: str) -> None:
    row, counts = judge(new_filter(**options), response, finish)
    assert (row, counts.filtered) == (None, {reason: 1})


def test_the_same_response_to_the_same_prompt_is_written_once_whoever_wrote_it() -> None:
    first, later = new_filter(), new_filter()
    row, _ = judge(first, [5, 6])
    later.remember([row.row_id], [row.prompt_key])
    for row_filter in (first, later):
        assert judge(row_filter, [5, 6])[1].filtered == {"duplicate": 1}
        assert row_filter.has_prompt([1, 2])


def test_a_nan_log_prob_is_a_failed_row() -> None:
    row, counts = judge(new_filter(), [5], prob=math.nan)
    assert (row, counts.failed, counts.filtered) == (None, 1, {})


def test_a_loop_is_cut_behind_its_second_round_and_the_answer_no_longer_ends_by_itself() -> None:
    row, counts = judge(new_filter(), [4, 5, *[7, 8, 6] * 20])
    assert (row.response_ids, len(row.logprobs)) == ([4, 5, 7, 8, 6, 7, 8, 6], 8)
    assert (counts.cut, counts.tokens, counts.generated) == (1, 8, 62)
    row, _ = judge(new_filter(), [4, *[7] * 50, 3], "stop")
    assert (row.response_ids, row.finish_reason) == ([4, 7, 7], "length")
    row, _ = judge(new_filter(looping="keep"), [4, *[7, 8] * 40])
    assert len(row.response_ids) == 81


PIECE = st.lists(st.integers(0, 3), min_size=1, max_size=36)


@given(st.lists(st.integers(0, 3), max_size=30), PIECE, st.integers(0, 120))
def test_a_loop_is_found_exactly_where_its_definition_says(
    before: list[int], piece: list[int], length: int
) -> None:
    ids = before + (piece * 120)[:length]
    found = loop_start(ids)
    ends = {period: ids[-max(32, 3 * period) :] for period in range(1, 33) if max(32, 3 * period) <= len(ids)}
    assert (found is not None) == any(end[period:] == end[:-period] for period, end in ends.items())
    if found:
        start, period = found
        assert all(a == b for a, b in zip(ids[start:], ids[start + period :], strict=False))


def test_counts_add_up_and_survive_json() -> None:
    total = RowCounts()
    total.add(RowCounts(asked=3, written=1, filtered={"empty": 2}, tokens=9))
    total.add(RowCounts(asked=2, failed=1, filtered={"empty": 1}))
    assert total == RowCounts(asked=5, written=1, failed=1, filtered={"empty": 3}, tokens=9)
    assert RowCounts(**json.loads(json.dumps(asdict(total)))) == total
