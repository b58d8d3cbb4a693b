"""One corpus of a recipe: documents -> distinct documents -> token ids -> rows in shards.

Call `CorpusPacker(...).run(...)`. PackingProgress is written down after every block of text; a killed stage
repeats one block and ends with the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdraft.console import Console, format_count
from fastdraft.data.corpora import Block, blocks, source_files
from fastdraft.data.files import NAMED
from fastdraft.data.shards import SPLITS, RowForm, RowWriter, Split
from fastdraft.data.tokenize import DocumentEncoder
from fastdraft.errors import DataError
from fastdraft.recipe.prepare import HubSource, SourceConfig
from fastdraft.run_folder import read_json, write_json

BATCH_CHARS = 1_000_000
# While the ids of one batch become an array under the interpreter's lock, the other has the cores.
ENCODERS = 2
# Rows of validation that every corpus gets, however few of its documents are chosen by their hash.
VALIDATION_ROWS = 8


@dataclass
class PackingProgress:
    """How far a corpus has come."""

    source: int = 0  # number of the source that is read
    position: tuple[int, int] = (0, 0)  # behind which reading it goes on
    source_tokens: int = 0
    skipped: int = 0  # files of this source that were passed over
    empty: int = 0  # documents of this source without text
    seen: int = 0  # documents taken so far, of all sources
    duplicates: int = 0
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    sources: list[dict[str, Any]] = field(default_factory=list)  # what each finished source gave
    writers: dict[str, Any] = field(default_factory=dict)


class CorpusPacker:
    """All between a corpus's sources and its part of the manifest; progress is in `folder/.journal`."""

    def __init__(self, name: str, folder: Path, form: RowForm, encoder: DocumentEncoder, seed: int) -> None:
        self.name, self._folder, self._form, self._encoder, self._seed = name, folder, form, encoder, seed
        self._record = folder / ".journal" / f"{name}.json"
        self.progress = PackingProgress(**(read_json(self._record) if self._record.exists() else {}))
        self._seen = SeenDigests(self._record.with_suffix(".seen"), self.progress.seen)
        written = self.progress.writers
        self._writers = {split: RowWriter(folder / name, split, form, written.get(split)) for split in SPLITS}

    @property
    def tokens(self) -> int:
        return sum(self.progress.tokens.values())

    def run(
        self, sources: Sequence[SourceConfig], console: Console, advance: Callable[[float], None]
    ) -> dict[str, Any]:
        """Reads what is left, closes the shards, gives the manifest's part; `advance` hears of tokens."""
        # One thread reads: each thread that ever did would keep a block's memory for itself.
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(ENCODERS) as pool:
            for source in sources[self.progress.source :]:
                stream = blocks(source, self._seed, self.progress.position)
                # The next block is read while this one is encoded.
                coming = reader.submit(next, stream, None)
                while not self._is_full(source) and (block := coming.result()):
                    coming = reader.submit(next, stream, None)
                    for taken in self._pack(block, source, pool):
                        advance(taken)
                        console.stop.check(self._folder)
                    self._commit()
                self._finish(source, console)
        for split, writer in self._writers.items():
            writer.close_shard()
            if not writer.rows:
                found = f"prepare.corpora '{self.name}': {self.progress.tokens[split]} tokens for {split}"
                rule = f"each split needs at least one row of {self._form.row_ids}"
                raise DataError(f"{found}; {rule}", "give it more text or lower prepare.row_length")
        self._commit()
        result: dict[str, Any] = {}
        for split, writer in self._writers.items():
            counts = {"rows": writer.rows, "tokens": writer.rows * self._form.row_ids}
            result[split] = {**counts, "documents": self.progress.documents[split], "shards": writer.shards}
        return {**result, "duplicates": self.progress.duplicates, "sources": self.progress.sources}

    def _is_full(self, source: SourceConfig) -> bool:
        return source.tokens is not None and self.progress.source_tokens >= source.tokens

    def _pack(self, block: Block, source: SourceConfig, pool: Executor) -> Iterator[int]:
        """Encodes what is new of a block and writes it, up to the source's budget; yields tokens taken."""
        progress, taken = self.progress, 0
        new = self._seen.first_seen(block.digests)
        texts = [block.pieces[i] for i in new]
        ends = zip(texts, accumulate(map(len, texts)), strict=True)
        groups = groupby(ends, lambda end: end[1] // BATCH_CHARS)
        batches = [[text for text, _ in group] for _, group in groups]
        for encoded in pool.map(self._encoder.encode, batches):
            routed: dict[Split, list[npt.NDArray[np.uint32]]] = {split: [] for split in SPLITS}
            before = self.tokens
            for ids in encoded:
                if self._is_full(source):
                    break
                split = self._split_of(int(block.digests[new[taken]]))
                routed[split].append(ids)
                progress.documents[split] += 1
                progress.tokens[split] += len(ids) + 1
                progress.source_tokens += len(ids) + 1
                taken += 1
            for split, documents in routed.items():
                self._writers[split].add(documents)
            yield self.tokens - before
            if self._is_full(source):
                break
        self._seen.add(block.digests[new[:taken]])
        progress.duplicates += (int(new[taken]) if taken < len(new) else len(block.pieces)) - taken
        progress.seen += taken
        progress.skipped += block.skipped
        progress.empty += block.empty
        progress.position = block.end

    def _split_of(self, digest: int) -> Split:
        """By the hash of the text, so that it is the same for every seed and budget."""
        if digest < int(self._form.validation * 2**64):
            return "validation"
        train, validation = self.progress.tokens["train"], self.progress.tokens["validation"]
        # A corpus of few rows gives a tenth of its documents, a third until there is a row.
        share = 3 if validation <= self._form.row_ids else 10
        small = validation < VALIDATION_ROWS * self._form.row_ids
        return "validation" if small and validation * share < train else "train"

    def _finish(self, source: SourceConfig, console: Console) -> None:
        progress = self.progress
        tokens, skipped = progress.source_tokens, progress.skipped
        where = source.dataset if isinstance(source, HubSource) else source.path
        if not tokens:
            message = (
                f"prepare.corpora '{self.name}': {where}: no new text; a source needs at least one document"
            )
            raise DataError(message, "correct the path or the field")
        if source.tokens is not None and tokens < source.tokens:
            taken, wanted = format_count(tokens), format_count(source.tokens)
            console.warn(f"{self.name}: {where} ends at {taken} of {wanted} tokens")
        if skipped:
            console.warn(f"{self.name}: {skipped} files of {where} passed over (unreadable or not UTF-8)")
        if progress.empty:
            console.warn(f"{self.name}: {progress.empty} documents of {where} hold no text")
        about: dict[str, Any] = {"kind": source.kind, "from": where, "license": source.license}
        if not isinstance(source, HubSource):
            found = source_files(source)
            about |= {"files": len(found.files), "passed_over": len(found.passed_over)}
            about["passed_over_names"] = found.passed_over[:NAMED]
        counts = {"tokens": tokens, "files_skipped": skipped, "empty": progress.empty}
        progress.sources.append({**about, **counts})
        progress.source += 1
        progress.position, progress.source_tokens, progress.skipped, progress.empty = (0, 0), 0, 0, 0
        self._commit()

    def _commit(self) -> None:
        for writer in self._writers.values():
            writer.sync()
        self._seen.sync()
        self.progress.writers = {split: writer.state() for split, writer in self._writers.items()}
        write_json(self._record, asdict(self.progress))


class SeenDigests:
    """Digests of the documents taken: on disk in the order taken, in memory sorted; eight bytes each."""

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, 8 * count)
        self._sorted = np.sort(np.fromfile(path, dtype="<u8"))

    def first_seen(self, digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Indices into `digests` of those that were not met before, in order; of equal ones the first."""
        first: npt.NDArray[np.int64] = np.sort(np.unique(digests, return_index=True)[1])
        if not len(self._sorted):
            return first
        nearest = self._sorted[np.searchsorted(self._sorted[:-1], digests[first])]
        unseen: npt.NDArray[np.int64] = first[nearest != digests[first]]
        return unseen

    def add(self, digests: npt.NDArray[np.uint64]) -> None:
        with open(self._path, "ab") as file:
            file.write(digests.astype("<u8").tobytes())
        added = np.sort(digests)
        self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, added), added)

    def sync(self) -> None:
        with open(self._path, "rb+") as file:
            os.fsync(file.fileno())
