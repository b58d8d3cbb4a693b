"""Which responses are kept and how the others are counted."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdraft.data.filters import RowCounts, RowFilter, loop_start
from fastdraft.data.rows import SyntheticRow
from fastdraft.functional.generation import Generation, Sampling

WARM = Sampling(0.6)


def judge(
    row_filter: RowFilter, response: list[int], reason: str = "length", *, counts: RowCounts | None = None
) -> SyntheticRow | None:
    generation = Generation([1, 2], response, [-0.5] * len(response), reason)  # type: ignore[arg-type]
    return row_filter.judge(generation, "s", WARM, counts if counts is not None else RowCounts())


def new_filter(**options: object) -> RowFilter:
    return RowFilter({300, 301}, lambda ids: " ".join("" if i == 9 else str(i) for i in ids), **options)  # type: ignore[arg-type]


def test_a_good_response_becomes_a_row_with_all_that_training_needs() -> None:
    counts = RowCounts(asked=1)
    row = judge(new_filter(), [5, 6, 3], "stop", counts=counts)
    assert row is not None
    assert (row.prompt_ids, row.response_ids, row.logprobs, row.temperature, row.finish_reason) == (
        [1, 2],
        [5, 6, 3],
        [-0.5] * 3,
        0.6,
        "stop",
    )
    assert (counts.written, counts.tokens, counts.stopped, counts.balance()) == (1, 3, 1, 0)


@pytest.mark.parametrize(
    ("response", "finish", "options", "reason"),
    [
        ([5, 301, 6], "length", {}, "unknown_id"),
        ([3], "stop", {}, "empty"),
        ([9, 9, 3], "stop", {}, "empty"),
        ([4, *[7, 8] * 40], "length", {"looping": "drop"}, "looping"),
    ],
)
def test_each_filter_counts_its_reason(
    response: list[int], finish: str, options: dict[str, object], reason: str
) -> None:
    counts = RowCounts(asked=1)
    assert judge(new_filter(**options), response, finish, counts=counts) is None
    assert counts.filtered == {reason: 1}
    assert counts.balance() == 0


def test_the_same_response_to_the_same_prompt_is_written_once() -> None:
    row_filter, counts = new_filter(), RowCounts(asked=2)
    assert judge(row_filter, [5, 6], counts=counts)
    assert judge(row_filter, [5, 6], counts=counts) is None
    assert counts.filtered == {"duplicate": 1}


def test_rows_of_an_earlier_process_count_as_written() -> None:
    row = judge(new_filter(), [5, 6])
    assert row is not None
    later = new_filter()
    later.remember([row.row_id], [row.prompt_key])
    assert judge(later, [5, 6]) is None
    assert later.has_prompt([1, 2])


def test_a_nan_log_prob_is_a_failed_row() -> None:
    counts = RowCounts(asked=1)
    assert new_filter().judge(Generation([1], [5], [math.nan], "length"), "s", WARM, counts) is None
    assert (counts.failed, counts.filtered, counts.balance()) == (1, {}, 0)


def test_a_loop_is_cut_behind_its_second_round() -> None:
    counts = RowCounts(asked=1)
    row = judge(new_filter(), [4, 5, *[7, 8, 6] * 20], counts=counts)
    assert row is not None
    assert row.response_ids == [4, 5, 7, 8, 6, 7, 8, 6]
    assert len(row.logprobs) == 8
    assert (counts.cut, counts.tokens, counts.generated) == (1, 8, 62)


def test_a_loop_before_the_eos_is_cut_and_the_answer_no_longer_ends_by_itself() -> None:
    row = judge(new_filter(), [4, *[7] * 50, 3], "stop")
    assert row is not None
    assert (row.response_ids, row.finish_reason) == ([4, 7, 7], "length")


def test_loops_are_kept_when_the_recipe_says_so() -> None:
    row = judge(new_filter(looping="keep"), [4, *[7, 8] * 40])
    assert row is not None
    assert len(row.response_ids) == 81


@given(
    st.lists(st.integers(0, 3), max_size=30),
    st.lists(st.integers(0, 3), min_size=1, max_size=36),
    st.integers(0, 120),
)
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
    assert RowCounts.from_dict(json.loads(json.dumps(total.as_dict()))) == total
