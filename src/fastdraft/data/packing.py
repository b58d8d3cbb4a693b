"""From documents to rows: cutting long documents, then concatenating token ids with separators into rows of one length.

Decides that nothing is padded or dropped but the last partial row of a corpus, that each document is preceded by the
separator, and that a document cut into pieces is cut at a paragraph end where there is one.
Shape letters: N rows, R row_length + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

PIECE_CHARS = 20_000
"""Longest piece: about 5,000 tokens, a couple of rows, so that one book cannot fill a small budget."""


def split_document(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Pieces of at most `limit` characters, without blank ends cut off, that concatenate to the document.

    Cuts behind the last blank line in the second half of the window, else behind the last line end, else the last space,
    else at the limit. A blank document gives nothing.
    """
    start = 0
    while len(text) - start > limit:
        end = start + limit
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, start + limit // 2, end)
            if found >= 0:
                end = found + len(mark)
                break
        if piece := text[start:end]:
            if not piece.isspace():
                yield piece
        start = end
    if (rest := text[start:]) and not rest.isspace():
        yield rest


class RowPacker:
    """Concatenates documents into rows; what is left over waits in `carry` for the next documents."""

    def __init__(self, row_ids: int, separator_id: int, dtype: str) -> None:
        self.row_ids, self.dtype = row_ids, dtype
        self._separator = np.array([separator_id], dtype=dtype)
        self.carry: npt.NDArray[Any] = np.empty(0, dtype=dtype)

    def add(self, documents: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The rows [N, R] that these documents (ids, 1-D each) complete."""
        parts = [self.carry]
        for ids in documents:
            parts += [self._separator, ids.astype(self.dtype, copy=False)]
        flat = np.concatenate(parts)
        whole = len(flat) // self.row_ids * self.row_ids
        self.carry = flat[whole:].copy()
        return flat[:whole].reshape(-1, self.row_ids)
