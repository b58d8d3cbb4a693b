"""Shard files: rows of `row_length + 1` token ids, little-endian uint16 or uint32, no header.

`RowWriter` packs documents into rows and appends them; `open_corpus` reads one split of a prepared corpus by
memory map.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastdraft.data.remote import fetch, put
from fastdraft.errors import DataError, FastDraftError
from fastdraft.run_folder import StageFolder, file_sha256

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


def token_dtype(vocabulary_size: int) -> str:
    """`uint16` when every id fits, else `uint32`."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class RowForm:
    """The form of the rows on disk."""

    row_length: int
    separator_id: int
    dtype: str
    shard_tokens: int
    validation: float = 0.0  # share of the documents
    store: str = ""  # an address behind which the shards go; empty: they stay where they are written

    @property
    def row_ids(self) -> int:
        return self.row_length + 1

    @property
    def rows_per_shard(self) -> int:
        return max(1, self.shard_tokens // self.row_ids)


class RowWriter:
    """Concatenates documents, a separator before each, into the rows of one split and its shards.

    Only the last partial row of a corpus is dropped. Given a `state()` that was written down, it cuts the
    files back.
    """

    def __init__(
        self, folder: Path, split: Split, form: RowForm, state: dict[str, Any] | None = None
    ) -> None:
        state = state or {"shards": [], "open_rows": 0, "carry": []}
        self.folder, self.split, self.form = folder, split, form
        self.shards: list[dict[str, Any]] = list(state["shards"])
        self._forgotten = 0
        self.open_rows: int = state["open_rows"]
        self._dtype = np.dtype(form.dtype).newbyteorder("<")
        self._carry = np.array(state["carry"], dtype=self._dtype)
        folder.mkdir(parents=True, exist_ok=True)
        closed = {shard["file"] for shard in self.shards}
        for path in folder.glob(f"{split}-*.bin"):
            if path == self._path and self.open_rows:
                os.truncate(path, self.open_rows * form.row_ids * self._dtype.itemsize)
            elif path.name not in closed:
                path.unlink()

    @property
    def rows(self) -> int:
        return self.open_rows + sum(int(shard["rows"]) for shard in self.shards)

    def add(self, documents: Sequence[npt.NDArray[Any]]) -> None:
        """Appends documents (ids, 1-D each); what does not fill a row waits for the next ones."""
        separator = np.array([self.form.separator_id])
        parts = [self._carry, *(part for ids in documents for part in (separator, ids))]
        flat = np.concatenate([part.astype(self._dtype, copy=False) for part in parts])
        whole = len(flat) // self.form.row_ids
        rows = flat[: whole * self.form.row_ids].reshape(whole, self.form.row_ids)
        self._carry = flat[rows.size :].copy()
        while len(rows):
            part = rows[: self.form.rows_per_shard - self.open_rows]
            with open(self._path, "ab") as file:
                file.write(part.tobytes())
            self.open_rows, rows = self.open_rows + len(part), rows[len(part) :]
            if self.open_rows == self.form.rows_per_shard:
                self.close_shard()

    def close_shard(self) -> None:
        """Ends the open shard, if it has a row: the next row begins a new one."""
        if self.open_rows:
            self.sync()
            shard = {"file": self._path.name, "rows": self.open_rows, "sha256": file_sha256(self._path)}
            if self.form.store:
                put(self._path, f"{self.form.store.rstrip('/')}/{self.folder.name}")
            self.shards.append(shard)
            self.open_rows = 0

    def forget(self) -> None:
        """Removes what is in the store; call it when `state()` is written down."""
        for shard in self.shards[self._forgotten :] if self.form.store else ():
            (self.folder / shard["file"]).unlink(missing_ok=True)
        self._forgotten = len(self.shards)

    def sync(self) -> None:
        """Forces what was written to disk: call it before `state()` is written down."""
        if self.open_rows:
            with open(self._path, "rb+") as file:
                os.fsync(file.fileno())

    def state(self) -> dict[str, Any]:
        return {"shards": self.shards, "open_rows": self.open_rows, "carry": self._carry.tolist()}

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.shards):05}.bin"


class PackedCorpus:
    """Rows of one split of one corpus in the order on disk, read by memory map."""

    def __init__(
        self, folder: Path, shards: Sequence[dict[str, Any]], row_length: int, dtype: str, store: str = ""
    ) -> None:
        self._store = store
        self.folder, self.row_length, self._dtype = folder, row_length, np.dtype(dtype).newbyteorder("<")
        self._files = [folder / shard["file"] for shard in shards]
        self._ends = np.cumsum([shard["rows"] for shard in shards], dtype=np.int64)

    @property
    def rows(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def tokens(self) -> int:
        """Ids on disk: rows x (row_length + 1)."""
        return self.rows * (self.row_length + 1)

    @cached_property
    def shards(self) -> list[npt.NDArray[Any]]:
        """The rows of each shard [n, row_length + 1] as read-only memory maps."""
        counts = np.diff(self._ends, prepend=0).tolist()
        for path, rows in zip(self._files, counts, strict=True):
            wanted = rows * (self.row_length + 1) * self._dtype.itemsize
            if self._store and not path.is_file():
                fetch(f"{self._store.rstrip('/')}/{self.folder.name}", path)
            if not path.is_file() or path.stat().st_size != wanted:
                raise FastDraftError(f"{path}: must have {wanted} bytes", "do it again with --redo prepare")
        return [
            # The same memory as a plain array: a memmap's own indexing is several times slower.
            np.memmap(path, self._dtype, "r", shape=(rows, self.row_length + 1)).view(np.ndarray)
            for path, rows in zip(self._files, counts, strict=True)
        ]

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """One row: int64 [row_length + 1]; inputs are `[:-1]`, labels `[1:]`."""
        return np.asarray(self.take([index])[0])

    def take(self, indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Rows by number: int64 [n, row_length + 1]."""
        wanted = np.asarray(indices, dtype=np.int64)
        out = np.empty((len(wanted), self.row_length + 1), dtype=np.int64)
        shard_of = np.searchsorted(self._ends, wanted, side="right")
        for number in np.unique(shard_of).tolist():
            own = np.flatnonzero(shard_of == number)
            first = self._ends[number - 1] if number else 0
            out[own] = self.shards[number][wanted[own] - first]
        return out


def open_corpus(prepare: StageFolder, corpus: str, split: Split) -> PackedCorpus:
    """One split of one corpus of a finished prepare stage."""
    manifest = prepare.manifest()
    if corpus not in manifest["corpora"]:
        message = f"corpus '{corpus}': not prepared; must be one of {', '.join(manifest['corpora'])}"
        raise DataError(message, "correct the name or add it to prepare.corpora")
    shards = manifest["corpora"][corpus][split]["shards"]
    form = manifest["row_length"], manifest["dtype"], manifest.get("store", "")
    return PackedCorpus(prepare.path / corpus, shards, *form)
