"""To which rows a document goes where a corpus has rows of several lengths.

Decides that only a document which fills at least half of a long row goes there (a long row of forty short documents would teach no
long context), that each length gets its share of a split's tokens as soon as such documents come, and that everything else
goes to the shortest rows. The choice depends on the documents before it in the corpus alone.
"""

from __future__ import annotations

from collections.abc import Mapping

FILLED = 0.5
"""Part of a long row that a document must fill."""


def all_lengths(row_length: int, long_rows: Mapping[int, float]) -> list[int]:
    """Every length, the shortest first."""
    return [row_length, *sorted(long_rows)]


def length_for(
    num_tokens: int, row_length: int, long_rows: Mapping[int, float], so_far: Mapping[int, int]
) -> int:
    """The length of the rows that a document goes to.

    Args:
        num_tokens: Of the document, its separator included.
        row_length: The shortest rows.
        long_rows: Share of the tokens by length, for the longer ones.
        so_far: Tokens of the split that went to rows of each length.
    """
    total = sum(so_far.values())
    for length in sorted(long_rows, reverse=True):
        if num_tokens >= FILLED * length and so_far.get(length, 0) <= long_rows[length] * total:
            return length
    return row_length
