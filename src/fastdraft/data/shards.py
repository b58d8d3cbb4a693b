"""Shard files: packed rows of token ids on disk, and how they are read back.

Decides the format (rows of `row_length + 1` ids, little-endian uint16 or uint32, no header), that a shard grows under a
temporary name whose committed length is kept by the caller and gets its final name when full, and that sizes are
checked before a corpus is used and checksums too where that takes no noticeable time.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastdraft.errors import DataError, FastDraftError
from fastdraft.machine import disk_errors
from fastdraft.run_folder import MANIFEST, StageFolder, file_sha256

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
_FILE = re.compile(r"(train|validation)(\.[0-9]{1,9})?-[0-9]{5,9}\.bin")
VERIFY_BYTES = 256 << 20
"""Corpora up to this size are checked against their checksums whenever they are opened."""


def shard_prefix(split: Split, row_length: int | None = None) -> str:
    """What the names of a split's shards begin with; rows longer than the others have their length in it."""
    return split if row_length is None else f"{split}.{row_length}"


def token_dtype(vocabulary_size: int) -> str:
    """`uint16` when every id fits, else `uint32`."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


@dataclass
class ShardWriter:
    """Writes the rows of one length of one split of a corpus; `state()` is all that a later process needs to go on after the last commit.

    Bytes behind the committed length, and a shard renamed after the last commit, are undone by `restore`.
    """

    folder: Path
    prefix: str
    """What the shards' names begin with: `shard_prefix`."""
    row_ids: int
    """Ids in a row: row_length + 1."""
    dtype: str
    rows_per_shard: int

    def __post_init__(self) -> None:
        self.shards: list[dict[str, Any]] = []
        self.open_rows = 0
        self._pending: list[bytes] = []

    def restore(self, shards: list[dict[str, Any]], open_rows: int) -> None:
        """Brings the folder back to a committed state.

        Raises:
            FastDraftError: when committed bytes are no longer there.
        """
        self.shards, self.open_rows = list(shards), open_rows
        partial, final = self._path(".partial"), self._path(".bin")
        with disk_errors(partial):
            self.folder.mkdir(parents=True, exist_ok=True)
            if final.exists() and not partial.exists():
                os.replace(final, partial)
            known = {partial.name, *(shard["file"] for shard in self.shards)}
            for extra in self.folder.glob(f"{self.prefix}-*"):
                if extra.name not in known:
                    extra.unlink()
            partial.touch()
            if partial.stat().st_size < self._bytes(open_rows):
                raise FastDraftError(
                    partial,
                    "shorter than was committed",
                    "unfinished work must be whole to go on from it",
                    "redo it with --redo prepare",
                )
            os.truncate(partial, self._bytes(open_rows))

    def state(self) -> dict[str, Any]:
        """Takes part in the caller's commit; call `flush` first."""
        return {"shards": self.shards, "open_rows": self.open_rows}

    def write(self, rows: npt.NDArray[Any]) -> None:
        """Adds rows [n, row_ids]; a full shard is closed on the way."""
        while len(rows):
            part = rows[: self.rows_per_shard - self.open_rows]
            self._pending.append(part.astype(np.dtype(self.dtype).newbyteorder("<")).tobytes())
            self.open_rows += len(part)
            rows = rows[len(part) :]
            if self.open_rows == self.rows_per_shard:
                self.close_shard()

    def flush(self) -> None:
        """Forces what was written to disk."""
        if self._pending:
            with disk_errors(self._path(".partial")), open(self._path(".partial"), "ab") as file:
                file.write(b"".join(self._pending))
                file.flush()
                os.fsync(file.fileno())
            self._pending = []

    def close_shard(self) -> None:
        """Gives the open shard its name, rows and checksum; nothing when it has no row."""
        self.flush()
        partial, final = self._path(".partial"), self._path(".bin")
        if self.open_rows:
            self.shards = [
                *self.shards,
                {"file": final.name, "rows": self.open_rows, "sha256": file_sha256(partial)},
            ]
            os.replace(partial, final)
            self.open_rows = 0
        else:
            partial.unlink(missing_ok=True)

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.prefix}-{len(self.shards):05}{suffix}"

    def _bytes(self, rows: int) -> int:
        return rows * self.row_ids * np.dtype(self.dtype).itemsize


class PackedCorpus:
    """Rows of one length of one split of one corpus, read by memory map; the order on disk."""

    def __init__(self, folder: Path, shards: list[dict[str, Any]], row_length: int, dtype: str) -> None:
        self.folder, self.row_length, self._shards = folder, row_length, shards
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._ends = list(accumulate(shard["rows"] for shard in shards))
        self._maps: dict[int, npt.NDArray[Any]] = {}

    @property
    def rows(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def tokens(self) -> int:
        """Ids on disk: rows x (row_length + 1)."""
        return self.rows * (self.row_length + 1)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> npt.NDArray[np.int64]:
        """One row: int64 [row_length + 1]; inputs are `[:-1]`, labels `[1:]`."""
        if not 0 <= index < self.rows:
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        start = self._ends[shard] - int(self._shards[shard]["rows"])
        row: npt.NDArray[np.int64] = self.shard(shard)[index - start].astype(np.int64)
        return row

    def take(self, indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Rows by number: int64 [n, row_length + 1]."""
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.rows:
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {self.rows}")
        out = np.empty((len(wanted), self.row_length + 1), dtype=np.int64)
        ends = np.asarray(self._ends, dtype=np.int64)
        shards = np.searchsorted(ends, wanted, side="right")
        for number in np.unique(shards).tolist():
            own = np.flatnonzero(shards == number)
            first = int(ends[number]) - int(self._shards[number]["rows"])
            out[own] = self.shard(number)[wanted[own] - first]
        return out

    def shard(self, number: int) -> npt.NDArray[Any]:
        """One shard's rows [n, row_length + 1] as a read-only memory map."""
        if number not in self._maps:
            shard = self._shards[number]
            shape = (int(shard["rows"]), self.row_length + 1)
            mapped = np.memmap(self.folder / shard["file"], dtype=self._dtype, mode="r", shape=shape)
            self._maps[number] = mapped.view(
                np.ndarray
            )  # the same memory; a memmap's own indexing is several times slower
        return self._maps[number]

    @property
    def num_shards(self) -> int:
        return len(self._shards)


def corpus_names(prepare: StageFolder) -> list[str]:
    """The corpora of a finished prepare stage, in the recipe's order."""
    return list(_corpora(prepare.path / MANIFEST, prepare.manifest()))


def open_corpus(prepare: StageFolder, corpus: str, split: Split, verify: bool | None = None) -> PackedCorpus:
    """One split of one prepared corpus; of several row lengths the shortest (`open_lengths` has all).

    Args:
        prepare: The finished prepare stage.
        corpus: Its name in the recipe.
        split: train or validation.
        verify: Compare checksums; None does so for corpora up to 256 MB. Sizes are always compared.

    Raises:
        DataError: when there is no corpus of that name.
        FastDraftError: when a shard is missing or damaged.
    """
    return next(iter(open_lengths(prepare, corpus, split, verify).values()))


def open_lengths(
    prepare: StageFolder, corpus: str, split: Split, verify: bool | None = None
) -> dict[int, PackedCorpus]:
    """One split of one prepared corpus by row length, the shortest first; a length may have no rows.

    Arguments and errors are those of `open_corpus`.
    """
    manifest = prepare.manifest()
    where = prepare.path / MANIFEST
    corpora = _corpora(where, manifest)
    if corpus not in corpora:
        raise DataError(
            f"corpus '{corpus}'",
            "not prepared",
            f"must be one of {', '.join(corpora)}",
            "correct the name or add it to prepare.corpora",
        )
    shards, dtype = _listed(where, corpora[corpus], split), manifest["dtype"]
    if dtype not in ("uint16", "uint32"):
        raise _damaged(where, f"dtype {dtype!r:.20}")
    found = {}
    for length in row_lengths(manifest):
        own = [shard for shard in shards if shard.get("row_length", manifest["row_length"]) == length]
        row_bytes = (length + 1) * np.dtype(dtype).itemsize
        check = sum(shard["rows"] for shard in own) * row_bytes <= VERIFY_BYTES if verify is None else verify
        for shard in own:
            _check_shard(prepare.path / corpus / shard["file"], shard, row_bytes, check)
        found[length] = PackedCorpus(prepare.path / corpus, own, length, dtype)
    return found


def row_lengths(manifest: Mapping[str, Any]) -> list[int]:
    """The lengths of a prepare stage's rows, the shortest first.

    Raises:
        FastDraftError: when the manifest lists none, or what is no length.
    """
    lengths = manifest.get("row_lengths", [manifest["row_length"]])
    if (
        not isinstance(lengths, list)
        or not lengths
        or not all(type(length) is int and 0 < length < 1 << 31 for length in lengths)
    ):
        raise _damaged("prepare", f"row lengths {lengths!r:.40}")
    return lengths


def _corpora(where: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    corpora = manifest["corpora"]
    if not isinstance(corpora, dict):
        raise _damaged(where, "no list of corpora")
    return corpora


def _listed(where: Path, corpus: Any, split: Split) -> list[dict[str, Any]]:
    """The shards of one split as the manifest lists them, every value looked at: names become paths, and rows sizes."""
    part = corpus.get(split) if isinstance(corpus, dict) else None
    shards = part.get("shards") if isinstance(part, dict) else None
    if not isinstance(shards, list):
        raise _damaged(where, f"no shards of {split}")
    for shard in shards:
        facts = shard if isinstance(shard, dict) else {}
        name, rows = facts.get("file"), facts.get("rows")
        named = isinstance(name, str) and _FILE.fullmatch(name) and isinstance(facts.get("sha256"), str)
        if not named or type(rows) is not int or not 0 < rows < 1 << 48:
            raise _damaged(where, f"shard {shard!r:.60}")
    return shards


def _damaged(where: Path | str, found: str) -> FastDraftError:
    return FastDraftError(
        where,
        f"damaged ({found})",
        "must list each corpus with its shards",
        "run it again with --redo prepare",
    )


def _check_shard(path: Path, shard: dict[str, Any], row_bytes: int, verify: bool) -> None:
    remedy = "run it again with --redo prepare"
    if not path.is_file():
        raise FastDraftError(path, "missing", "every shard of the manifest must be there", remedy)
    size = path.stat().st_size
    if size != shard["rows"] * row_bytes:
        raise FastDraftError(
            path, f"corrupt shard of {size} bytes", f"must have {shard['rows'] * row_bytes} bytes", remedy
        )
    if verify and file_sha256(path) != shard["sha256"]:
        raise FastDraftError(path, "corrupt shard", "its checksum must be the manifest's", remedy)
