"""From documents to rows: token ids concatenated, with separators, into rows of one length.

Decides that nothing is padded or dropped but the last partial row of a corpus, and that each document is preceded by
the separator.
Shape letters: N rows, R row_length + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


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
