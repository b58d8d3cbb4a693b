"""Whether a text has run into a loop, as small models do when greedy, and where the loop begins.

Decides the definition: some period of at most 32 tokens fills the end of the text at least three times over and for at
least 32 tokens. A draft predicts a loop easily, so acceptance on looping texts flatters: evaluation reports their share
and the figures without them, and synthesis cuts loops off.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_PERIOD, MIN_TOKENS, MIN_TIMES = 32, 32, 3


def loop_start(token_ids: Sequence[int]) -> tuple[int, int] | None:
    """Where the loop at the end of a text begins and its period, the shortest of several; None for a text that does not end in one."""
    count = len(token_ids)
    for period in range(1, MAX_PERIOD + 1):
        needed = max(MIN_TOKENS, MIN_TIMES * period)
        if needed > count:
            return None  # longer periods need longer texts still
        start = count - period
        while start > 0 and token_ids[start - 1] == token_ids[start - 1 + period]:
            start -= 1
        if count - start >= needed:
            return start, period
    return None


def is_looping(token_ids: Sequence[int]) -> bool:
    """Whether the end of `token_ids` repeats one piece of at most 32 tokens, at least 3 times and for at least 32 tokens."""
    return loop_start(token_ids) is not None
