"""The target's distribution at each response token, as few bytes: its k most likely tokens and the mass of all others.

Decides the record of a token (all distributions at temperature 1, whatever the text was drawn at):
    ids        uint16[k]   low 16 bits of the token ids, most likely first
    high_bits  uint8[...]  what is left of ids above 65535, 1 or 2 bits each, packed; absent for smaller vocabularies
    logprobs   float16[k]  natural logs
    tail       float16     log of the mass of all other tokens
which for k = 64 is 258 bytes with 8,192 or 32,064 ids, 266 with 128,256 and 274 with 262,144. And that a unit's records stand in
one safetensors file beside its rows, in the order of the rows, written at once or not at all, with a digest that ties both together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdraft.data.responses import Split, SyntheticRow, read_columns, read_placed
from fastdraft.errors import FastDraftError
from fastdraft.run_folder import StageFolder, digest, write_atomic

_RECORDS, _FACTS, _SUFFIX = "records", "facts", ".logits.safetensors"
_LOW_BITS = 16
_SMALLEST = -1e4
"""Log-probs below are kept as this: no probability either way, and finite in float16."""


def record_type(k: int, vocab_size: int) -> np.dtype[Any]:
    """The record of one token, without gaps; its `itemsize` is the bytes of a token."""
    packed = -(-k * _high_bits(vocab_size) // 8)
    return np.dtype(
        [("ids", "<u2", (k,)), ("high_bits", "u1", (packed,)), ("logprobs", "<f2", (k,)), ("tail", "<f2")]
    )


@dataclass(frozen=True)
class SparseLogits:
    """The distributions at n tokens."""

    ids: NDArray[np.int32]
    """[n, k]."""
    logprobs: NDArray[np.float32]
    """[n, k + 1], the log of the tail's mass last."""

    def __len__(self) -> int:
        return len(self.ids)


def logits_path(unit: Path) -> Path:
    """Where the records of a unit's rows are kept: `unit-00000.parquet` -> `unit-00000.logits.safetensors`."""
    return unit.with_name(unit.stem + _SUFFIX)


def rows_digest(row_ids: Sequence[str]) -> str:
    """Ties records to the rows that they belong to."""
    return digest(list(row_ids))


def write_sparse_logits(path: Path, logits: SparseLogits, vocab_size: int, rows: str) -> None:
    """Writes the records of one unit: all or nothing.

    Args:
        path: From `logits_path`.
        logits: For every response token of the unit's rows, in their order.
        vocab_size: Ids are below it.
        rows: The unit's `rows_digest`.

    Raises:
        FastDraftError: when the disk is full or the folder cannot be written.
    """
    from safetensors.numpy import save

    k, high = logits.ids.shape[1], _high_bits(vocab_size)
    records = np.zeros(len(logits), dtype=record_type(k, vocab_size))
    records["ids"] = logits.ids & 0xFFFF
    if high:
        bits = (logits.ids[:, :, None] >> (_LOW_BITS + np.arange(high))) & 1
        records["high_bits"] = np.packbits(bits.astype(np.uint8).reshape(len(logits), k * high), axis=1)
    logprobs = np.maximum(logits.logprobs, _SMALLEST)
    records["logprobs"], records["tail"] = logprobs[:, :k], logprobs[:, k]
    content = records.view(np.uint8).reshape(len(logits), records.dtype.itemsize)
    checksum = hashlib.sha256(content.tobytes()).hexdigest()
    facts = json.dumps({"k": k, "vocab_size": vocab_size, "rows": rows, "sha256": checksum})
    write_atomic(
        path, save({_RECORDS: content}, metadata={_FACTS: facts})
    )  # one entry: their order in the file is not fixed


def _high_bits(vocab_size: int) -> int:
    return max(0, (vocab_size - 1).bit_length() - _LOW_BITS)


@dataclass(frozen=True)
class StoredLogits:
    """A unit's records on disk; nothing is read before it is asked for, and no file stays open."""

    path: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """`tokens`, `k`, `vocab_size`, `rows`.

        Raises:
            FastDraftError: when the file is missing or damaged.
        """
        facts = self._read(0, 0)[1]
        if (
            facts["sha256"]
            and facts["sha256"] != hashlib.sha256(self._read(0, facts["tokens"])[0].tobytes()).hexdigest()
        ):
            raise self._damaged("another checksum")
        return facts

    def read(self, start: int, stop: int) -> SparseLogits:
        """The distributions at tokens `start` to `stop` of the unit.

        Raises:
            FastDraftError: when the file is missing or damaged.
        """
        content, facts = self._read(start, stop)
        if len(content) != stop - start:
            raise self._damaged(f"{facts['tokens']} tokens, {stop} asked for")
        records = np.ascontiguousarray(content).view(record_type(facts["k"], facts["vocab_size"]))[:, 0]
        ids, high = records["ids"].astype(np.int32), _high_bits(facts["vocab_size"])
        if high:
            bits = np.unpackbits(records["high_bits"], axis=1, count=ids.shape[1] * high).reshape(
                *ids.shape, high
            )
            ids |= (bits.astype(np.int32) << (_LOW_BITS + np.arange(high, dtype=np.int32))).sum(
                -1, dtype=np.int32
            )
        if ids.size and int(ids.max()) >= facts["vocab_size"]:
            raise self._damaged("an id beyond the vocabulary")
        return SparseLogits(
            ids, np.concatenate([records["logprobs"], records["tail"][:, None]], axis=1).astype(np.float32)
        )

    def _read(self, start: int, stop: int) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "np") as file:
                facts = json.loads(file.metadata()[_FACTS])
                part = file.get_slice(_RECORDS)
                tokens, width = part.get_shape()
                known: dict[str, Any] = {
                    "tokens": tokens,
                    **{name: int(facts[name]) for name in ("k", "vocab_size")},
                }
                known |= {"rows": str(facts["rows"]), "sha256": str(facts.get("sha256", ""))}
                if not 0 < known["k"] < known["vocab_size"] <= 1 << 31:
                    raise ValueError(f"k {known['k']} of {known['vocab_size']}")
                if width != record_type(known["k"], known["vocab_size"]).itemsize or part.get_dtype() != "U8":
                    raise ValueError(f"{width} bytes a token")
                stop = min(stop, tokens)  # safetensors has no empty slices
                return (part[start:stop] if start < stop else np.zeros((0, width), dtype=np.uint8)), known
        except (
            OSError,
            SafetensorError,
            LookupError,
            ValueError,
            TypeError,
            MemoryError,
            OverflowError,
            RecursionError,
        ) as error:
            raise self._damaged(str(error)[:80] if self.path.exists() else "") from None

    def _damaged(self, why: str) -> FastDraftError:
        found = f"damaged ({why})" if why else "missing"
        return FastDraftError(
            self.path, found, "must hold the target's stored logits", "redo the stage with --redo synthesize"
        )


@dataclass(frozen=True)
class RowLogits:
    """The part of a unit's records that belongs to one row."""

    unit: StoredLogits
    before: int
    """Response tokens of the unit that stand before this row's."""

    def read(self, start: int, stop: int) -> SparseLogits:
        """The distributions at the row's response tokens `start` to `stop`."""
        return self.unit.read(self.before + start, self.before + stop)


def read_with_logits(
    synthesize: StageFolder, split: Split | None = None
) -> Iterator[tuple[SyntheticRow, RowLogits]]:
    """Every row in the order of writing with its logits, which are read later, when asked for.

    Raises:
        FastDraftError: when a unit's logits are missing, damaged or those of other rows.
    """
    unit, path = None, None
    for placed, before, row in read_placed(synthesize, split):
        if unit is None or placed != path:
            unit, path = _matching(placed), placed
        yield row, RowLogits(unit, before)


def _matching(unit: Path) -> StoredLogits:
    stored, columns = StoredLogits(logits_path(unit)), read_columns(unit, ["row_id", "response_ids"])
    tokens = sum(map(len, columns["response_ids"]))
    if stored.facts["rows"] != rows_digest(columns["row_id"]) or stored.facts["tokens"] != tokens:
        remedy = "redo the stage with --redo synthesize"
        raise FastDraftError(
            stored.path, "belongs to other rows", f"must hold the logits of {unit.name}", remedy
        )
    return stored
