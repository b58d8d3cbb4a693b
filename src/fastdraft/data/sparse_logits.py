"""The target's distribution at each response token: its k likeliest tokens and the mass of all others, at
temperature 1.

Kept beside a unit's rows, in their order: `ids` [N, k] (uint16, or int32 for vocabularies above 65,536) and
`logprobs` float16 [N, k + 1], the log of the tail's mass last: 258 bytes a token for k = 64, or 386.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from fastdraft.data.rows import Split, SyntheticRow, read_with_places
from fastdraft.run_folder import StageFolder

# Log-probs below are kept as this: no probability either way, and finite in float16.
_SMALLEST = -1e4


@dataclass(frozen=True)
class SparseLogits:
    """The distributions at n tokens."""

    ids: NDArray[np.int32]  # [n, k]
    logprobs: NDArray[np.float32]  # [n, k + 1], the log of the tail's mass last

    def __len__(self) -> int:
        return len(self.ids)


def logits_name(unit: str) -> str:
    """`unit-00000.parquet` -> `unit-00000.logits.safetensors`."""
    return f"{unit.removesuffix('.parquet')}.logits.safetensors"


def write_sparse_logits(path: Path, logits: SparseLogits, vocab_size: int) -> None:
    """Writes the distributions of every response token of a unit; ids are below `vocab_size`."""
    ids: NDArray[Any] = logits.ids.astype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
    logprobs: NDArray[Any] = np.maximum(logits.logprobs, _SMALLEST).astype(np.float16)
    path.write_bytes(save({"ids": ids, "logprobs": logprobs}))


def read_sparse_logits(path: Path, start: int, stop: int) -> SparseLogits:
    """The distributions at tokens `start` to `stop` of a unit; nothing else is read."""
    with safe_open(path, "np") as file:
        parts = [file.get_slice(name) for name in ("ids", "logprobs")]
        if start < stop:
            ids, logprobs = (part[start:stop] for part in parts)
        else:  # safetensors has no empty slices
            ids, logprobs = (np.zeros((0, part.get_shape()[1])) for part in parts)
    return SparseLogits(ids.astype(np.int32), logprobs.astype(np.float32))


@dataclass(frozen=True)
class RowLogits:
    """The part of a unit's distributions that belongs to one row."""

    unit: Path
    before: int  # response tokens of the unit that stand before this row's

    def read(self, start: int, stop: int) -> SparseLogits:
        """The distributions at the row's response tokens `start` to `stop`."""
        return read_sparse_logits(self.unit, self.before + start, self.before + stop)


def read_with_logits(
    folder: StageFolder, split: Split | None = None
) -> Iterator[tuple[SyntheticRow, RowLogits]]:
    """Every row in the order of writing with its distributions, which are read later, when asked for."""
    for unit, before, row in read_with_places(folder, split):
        yield row, RowLogits(unit.with_name(logits_name(unit.name)), before)
