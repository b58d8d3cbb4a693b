"""Whether a text has run into a loop, as small models do when greedy.

Decides the definition: some period of at most 32 tokens fills the end of the text at least three times over and for at
least 32 tokens. A draft predicts a loop easily, so acceptance on looping texts flatters; evaluation reports their share
and the figures without them.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_PERIOD, MIN_TOKENS, MIN_TIMES = 32, 32, 3


def is_looping(token_ids: Sequence[int]) -> bool:
    """True if the end of `token_ids` repeats one piece of at most 32 tokens, at least 3 times and for at least 32 tokens."""
    for period in range(1, MAX_PERIOD + 1):
        length = max(MIN_TOKENS, MIN_TIMES * period)
        if length > len(token_ids):
            return False  # longer periods need longer texts still
        end = token_ids[-length:]
        if all(a == b for a, b in zip(end, end[period:], strict=False)):
            return True
    return False
