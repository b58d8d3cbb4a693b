"""A recipe's corpora as streams of documents: JSONL, Parquet, text, source code, data sets of the hub.

`describe` is what of a source enters fingerprints; `parts` cuts it into what is read by itself, on whatever
machine; `blocks` gives a part's text in a seeded order.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdraft.data.files import (
    ALL,
    JSONL,
    TEXT,
    FoundFiles,
    describe_data_set,
    describe_files,
    find_files,
    local_folder,
)
from fastdraft.data.readers import field_values, missing_field, read_text, unreadable
from fastdraft.data.remote import DataFile
from fastdraft.errors import DataError
from fastdraft.recipe.prepare import FileSource, HubSource, RowsSource, SourceConfig

# Text that is read and shuffled together: memory is a small multiple of it, a killed stage repeats one.
BLOCK_CHARS = 16_000_000
# Files are read together up to so many bytes on disk; of a larger Parquet file each part has about as many.
PART_BYTES = 16_000_000
# Longest piece of a document: about 5,000 tokens, so that one book cannot fill a small budget.
PIECE_CHARS = 20_000
ENDINGS = {"jsonl": JSONL, "parquet": (".parquet",), "text": TEXT, "source_code": (".py",)}

Position = tuple[int, int]
"""Number of a file in the seeded order, and a line or row in it: documents up to there have been read."""


@dataclass(frozen=True)
class Block:
    """Text that was read together, in shuffled order."""

    pieces: list[str]  # none where others have encoded them
    digests: npt.NDArray[np.uint64]  # of each piece's text
    skipped: int  # files passed over on the way
    empty: int  # documents without text
    end: Position
    # Where others have encoded them: the ids of all pieces, one behind the other, and where each ends.
    ids: tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]] | None = None

    def with_ids(self, encoded: npt.NDArray[np.int64], ids: list[npt.NDArray[np.uint32]]) -> Block:
        """With the ids of these pieces instead of any text."""
        lengths = np.zeros(len(self.digests), dtype=np.int64)
        lengths[encoded] = [len(own) for own in ids]
        flat = np.concatenate([np.zeros(0, np.uint32), *ids])
        return replace(self, pieces=[], ids=(flat, np.cumsum(lengths)))

    def ids_of(self, chosen: npt.NDArray[np.int64]) -> Iterator[list[npt.NDArray[np.uint32]]]:
        """Those of these pieces, in order."""
        assert self.ids
        flat, ends = self.ids
        starts = np.concatenate([[0], ends[:-1]])
        for few in np.array_split(chosen, len(chosen) // 1000 + 1):
            yield [flat[starts[i] : ends[i]] for i in few]


@dataclass(frozen=True)
class SourcePart:
    """What of a source is read by itself; its blocks hold nothing of another part."""

    first: int  # number of its first file in the seeded order
    files: tuple[DataFile, ...] = ()  # none of a data set of the hub
    share: tuple[int, int] = (0, 1)  # of that Parquet file or data set: number of this part, and of all


def parts(source: SourceConfig, seed: int) -> list[SourcePart]:
    """All parts in the seeded order, the same on every machine: by names and sizes alone."""
    if isinstance(source, HubSource):
        count = int(open_hub(source).num_shards)
        order = list(range(count))
        # A small budget would otherwise see only the first of a sorted data set.
        random.Random(seed).shuffle(order)
        return [SourcePart(number, share=(shard, count)) for number, shard in enumerate(order)]
    files, found, together = source_files(source).files, list[SourcePart](), 0
    # By the name within the source, so that the order is the same on every machine.
    names = sorted(files, key=lambda name: hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest())
    for number, name in enumerate(names):
        try:
            size = files[name].stat().st_size
        except OSError as error:
            raise unreadable(files[name], error) from None
        count = -(-size // PART_BYTES) if source.kind == "parquet" else 1
        if count > 1:
            found += [SourcePart(number, (files[name],), (share, count)) for share in range(count)]
            together = PART_BYTES  # the next file begins a part of its own
        elif found and together + size <= PART_BYTES:
            found[-1] = replace(found[-1], files=(*found[-1].files, files[name]))
            together += size
        else:
            found.append(SourcePart(number, (files[name],)))
            together = size
    return found


def blocks(
    source: SourceConfig, seed: int, start: Position = (0, 0), part: SourcePart | None = None
) -> Iterator[Block]:
    """The text behind `start` of a part, or of all; about BLOCK_CHARS at a time, never of two parts.

    The order depends on source and seed alone.
    """
    for own in [part] if part else parts(source, seed):
        pieces: list[str] = []
        chars = skipped = empty = 0
        end = start
        for file, row, text in _documents(source, own, start):
            if chars >= BLOCK_CHARS:
                yield _block(pieces, seed, skipped, empty, end)
                pieces, chars, skipped, empty = [], 0, 0, 0
            end = (file, row)
            skipped += text is None
            empty += text is not None and (not text or text.isspace())
            pieces += split_document(text or "")
            chars += len(text or "")
        if pieces or skipped or empty:
            yield _block(pieces, seed, skipped, empty, end)


def _block(pieces: list[str], seed: int, skipped: int, empty: int, end: Position) -> Block:
    random.Random(f"{seed}/{end}").shuffle(pieces)
    digests = np.empty(len(pieces), dtype=np.uint64)
    for number, piece in enumerate(pieces):
        content = piece.encode("utf-8", "replace")
        digests[number] = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        if not piece.isascii():  # lone surrogates, which UTF-8 cannot hold, become question marks
            pieces[number] = content.decode("utf-8")
    return Block(pieces, digests, skipped, empty, end)


def documents(source: SourceConfig, seed: int) -> Iterator[tuple[int, int, str | None]]:
    """(file, row, text) of all documents, files in seeded order; no text: passed over."""
    for part in parts(source, seed):
        yield from _documents(source, part)


def _documents(
    source: SourceConfig, part: SourcePart, start: Position = (0, 0)
) -> Iterator[tuple[int, int, str | None]]:
    """Of one part those behind `start`."""
    if isinstance(source, HubSource):
        if part.first >= start[0]:
            yield from _hub_documents(source, part, start[1] if part.first == start[0] else 0)
        return
    for number, path in enumerate(part.files, part.first):
        if number >= start[0]:
            after = start[1] if number == start[0] else 0
            for row, text in _file_documents(source, path, after, part.share):
                yield number, row, text


def _file_documents(
    source: FileSource, path: DataFile, after: int, share: tuple[int, int]
) -> Iterator[tuple[int, str | None]]:
    if isinstance(source, RowsSource):
        yield from _texts(field_values(path, source.field, after, share), source.field)
    elif not after:
        try:
            yield 1, read_text(path)
        except DataError:
            # Source folders hold the odd file in another encoding; one that has gone is a fault.
            if source.kind != "source_code" or not path.is_file():
                raise
            yield 1, None


def _texts(values: Iterable[tuple[int, str, Any]], field: str) -> Iterator[tuple[int, str]]:
    for number, where, value in values:
        if not isinstance(value, str | None):
            found = f"{where}: '{field}' is a {type(value).__name__}; must be text"
            raise DataError(found, "set `field` to the one that holds the text")
        yield number, value or ""


def _hub_documents(source: HubSource, part: SourcePart, after: int) -> Iterator[tuple[int, int, str]]:
    shard, count = part.share
    data = open_hub(source).shard(num_shards=count, index=shard)
    name = f"data set {source.dataset}: file {shard + 1} of {count}"
    values = hub_values(data.skip(after) if after else data, name, source.field, after)
    for row, text in _texts(((n, f"{name}: row {n}", v) for n, v in values), source.field):
        yield part.first, row, text


def open_hub(source: Any) -> Any:
    """The data set as `datasets` streams it: only what is read is downloaded, and nothing is kept on disk."""
    from datasets import load_dataset  # here: a second of start that only data sets of the hub are worth

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a README without a card is no news
    try:
        how = {"split": source.split, "revision": source.revision, "streaming": True}
        return load_dataset(str(local_folder(source.dataset) or source.dataset), source.subset, **how)
    except Exception as error:
        raise _unreachable(f"data set {source.dataset}", error, 0) from error


def data_set_files(source: Any, folder: Path) -> FoundFiles:
    """Which files of a data set's folder `datasets` reads: those of the commonest kind and of the split."""
    from datasets import load_dataset_builder

    told = load_dataset_builder(str(folder), source.subset).config.data_files or {}
    read = {str(Path(name).resolve()) for name in told.get(re.split(r"[\[+]", source.split)[0], ())}
    found = find_files(str(folder), ALL)
    files = {name: path for name, path in found.files.items() if os.path.realpath(str(path)) in read}
    others = [name for name in found.files if name not in files] if files else []
    return FoundFiles(files, sorted(found.passed_over + others))


def hub_values(data: Any, name: str, field: str, after: int = 0) -> Iterator[tuple[int, Any]]:
    """(row number from `after` + 1, value of column `field`) of each row."""
    for number, row in hub_rows(data, name, after):
        if field not in row:
            raise missing_field(f"{name}: row {number}", field, row)
        yield number, row[field]


def hub_rows(data: Any, name: str, after: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from `after` + 1, row)."""
    rows, number = iter(data), after
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # the library raises dozens of types: the network's or the id's fault
            raise _unreachable(name, error, number) from error
        if row is None:
            return
        number += 1
        yield number, row


def _unreachable(name: str, error: Exception, rows: int) -> DataError:
    found = f"{name}: {type(error).__name__} after {rows} rows ({' '.join(str(error).split())[:160]})"
    return DataError(f"{found}; must be reachable", "check id, subset, split and network, then run again")


def source_files(source: FileSource) -> FoundFiles:
    """The files of a source."""
    exclude = source.exclude if source.kind == "source_code" else ()
    return find_files(source.path, ENDINGS[source.kind], exclude)


def describe(source: SourceConfig) -> dict[str, Any]:
    """A source's settings and what they point at now, for fingerprints: names, sizes, samples, no times."""
    settings = source.model_dump(exclude={"license"})
    if isinstance(source, HubSource):
        return settings | describe_data_set(source.dataset)
    return settings | describe_files(source_files(source).files)


def split_document(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Pieces of at most `limit` characters that concatenate to the document; blank ones are left out.

    Cuts behind the last blank line in the second half of a piece, else behind the last line end, else before
    the last space.
    """
    start = 0
    while start < len(text):
        end = start + limit
        for mark, kept in (("\n\n", 2), ("\n", 1), (" ", 0)) if end < len(text) else ():
            found = text.rfind(mark, start + (limit + 1) // 2, end)
            if found >= 0:
                end = found + kept
                break
        piece = text[start:end]
        if piece.strip():
            yield piece
        start = end
