"""When two greedy texts count as the same: equal ids, or parted at a near-tie, which rounding decides.

One pass over several tokens rounds otherwise than one pass over one, so a text written with a draft may leave the target's own where two
tokens are nearly equally likely. The gap between their log-probs behind the common text tells such a near-tie from a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Judge = Callable[[list[int], int, int], float]
"""The gap in log-prob between two next tokens of a text, under the target."""

# Widest gap, in nats, that rounding decides. float32 differs by about 1e-5; up to 0.13 was seen in a device's own fast arithmetic.
_NEAR_TIE = {"float32": 1e-3, "exact": 1e-3, "float16": 0.03}
_NEAR_TIE_ELSE = 0.2


@dataclass(frozen=True)
class TextMismatch:
    """Where a text leaves the target's own."""

    place: int
    """The first response token that differs, from 0."""
    gap: float | None
    """Log-prob between the two tokens there; None where one text is the beginning of the other."""

    def is_near_tie(self, precision: str) -> bool:
        return self.gap is not None and self.gap < near_tie(precision)


def near_tie(precision: str) -> float:
    """Gap below which two tokens count as tied: by torch's name of a dtype, or `exact` and `fast` of a runtime."""
    return _NEAR_TIE.get(precision, _NEAR_TIE_ELSE)


def first_difference(own: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place at which two texts differ; where one is the other's beginning, its length; None for equal texts."""
    if list(own) == list(other):
        return None
    return next(
        (place for place, (a, b) in enumerate(zip(own, other, strict=False)) if a != b),
        min(len(own), len(other)),
    )


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
