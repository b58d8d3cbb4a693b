"""When two greedy texts count as the same: equal ids, or parted at a near-tie, which rounding decides.

A pass over several tokens rounds otherwise than a pass over one, so a text written with a draft may leave the
target's own where two tokens are nearly equally likely; the gap between their log-probs there tells a
near-tie from a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The gap in log-prob between two next tokens of a text, under the target.
Judge = Callable[[list[int], int, int], float]
# Widest gap, in nats, that rounding decides: float32 differs by about 1e-5, a device's fast arithmetic by up
# to 0.13.
_NEAR_TIE, _NEAR_TIE_ELSE = {"float32": 1e-3, "exact": 1e-3, "float16": 0.03}, 0.2


@dataclass(frozen=True)
class TextMismatch:
    """Where a text leaves the target's own."""

    place: int  # the first response token that differs, from 0
    gap: float | None  # log-prob between the two tokens there; None where one text is the other's beginning

    def is_near_tie(self, precision: str) -> bool:
        return self.gap is not None and self.gap < near_tie(precision)


def near_tie(precision: str) -> float:
    """Gap below which two tokens count as tied: by the name of a dtype, or a runtime's `exact` and `fast`."""
    return _NEAR_TIE.get(precision, _NEAR_TIE_ELSE)


def first_difference(own: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two texts differ, the shorter's end where it begins the other."""
    if list(own) == list(other):
        return None
    pairs = enumerate(zip(own, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(own), len(other)))


def compare_texts(
    prompt_ids: Sequence[int], own: Sequence[int], other: Sequence[int], judge: Judge
) -> TextMismatch | None:
    """How a text to the same prompt differs from the target's own; None where it does not."""
    place = first_difference(own, other)
    if place is None:
        return None
    if place == min(len(own), len(other)):
        return TextMismatch(place, None)
    return TextMismatch(place, abs(judge([*prompt_ids, *own[:place]], own[place], other[place])))
