"""The one rule for `the same text`: equal ids, or parted where rounding decides."""

from __future__ import annotations

import pytest

from fastdraft.functional.same_text import TextMismatch, compare_texts, first_difference, near_tie


@pytest.mark.parametrize(
    ("own", "other", "place"),
    [([1, 2], [1, 2], None), ([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1], 1), ([1], [1, 2], 1), ([], [], None)],
)
def test_the_first_difference_is_a_place_and_a_text_may_be_the_others_beginning(
    own: list[int], other: list[int], place: int | None
) -> None:
    assert first_difference(own, other) == place


def test_the_gap_is_asked_behind_the_common_text() -> None:
    asked: list[tuple[list[int], int, int]] = []

    def judge(prefix: list[int], first: int, second: int) -> float:
        asked.append((prefix, first, second))
        return -0.02

    assert compare_texts([10, 11], [0, 1, 2, 3], [0, 1, 7, 3], judge) == TextMismatch(2, 0.02)
    assert asked == [([10, 11, 0, 1], 2, 7)]
    assert compare_texts([10], [1, 2], [1, 2], judge) is None
    assert compare_texts([10], [1, 2], [1], judge) == TextMismatch(1, None)
    assert len(asked) == 1, "no gap behind a text's end"


def test_a_near_tie_is_what_the_precision_rounds_to() -> None:
    assert TextMismatch(3, 5e-4).is_near_tie("float32")
    assert not TextMismatch(3, 5e-3).is_near_tie("exact")
    assert TextMismatch(3, 5e-3).is_near_tie("float16")
    assert TextMismatch(3, 0.1).is_near_tie("bfloat16")
    assert not TextMismatch(3, None).is_near_tie("fast")
    assert near_tie("fast") == 0.2
