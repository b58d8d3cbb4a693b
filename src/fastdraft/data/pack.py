"""One corpus of a recipe: documents -> distinct documents -> token ids -> rows in shards.

Call `CorpusPacker(...).run(...)`. PackingProgress is written down after every block of text; a killed stage
repeats one block and ends with the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fastdraft.console import Console, format_count
from fastdraft.data.corpora import Block, blocks, parts, source_files
from fastdraft.data.files import NAMED
from fastdraft.data.shards import SPLITS, RowForm, RowWriter, Split
from fastdraft.data.tokenize import DocumentEncoder
from fastdraft.errors import DataError
from fastdraft.recipe.prepare import HubSource, SourceConfig
from fastdraft.run_folder import read_json, write_json
from fastdraft.workers import Job, Workers

T = TypeVar("T")

BATCH_CHARS = 1_000_000
# While the ids of one batch become an array under the interpreter's lock, the other has the cores.
ENCODERS = 2
LATEST_DIGESTS = 1 << 20
# Rows of validation that every corpus gets, however few of its documents are chosen by their hash.
VALIDATION_ROWS = 8


@dataclass
class PackingProgress:
    """How far a corpus has come."""

    source: int = 0  # number of the source that is read
    part: int = 0  # number of the part of it that is read
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


def made_ahead(stream: Iterator[T], thread: Executor) -> Iterator[T]:
    """The same, each made while the one before it is used."""
    coming = thread.submit(next, stream, None)
    try:
        while (found := coming.result()) is not None:
            coming = thread.submit(next, stream, None)
            yield found
    finally:
        wait([coming])


def encoded_batches(
    block: Block, chosen: Sequence[int] | npt.NDArray[np.int64], encoder: DocumentEncoder, pool: Executor
) -> Iterator[list[npt.NDArray[np.uint32]]]:
    """The ids of these pieces in order, some batches being encoded at a time."""
    texts = [block.pieces[i] for i in chosen]
    ends = zip(texts, accumulate(map(len, texts)), strict=True)
    groups = groupby(ends, lambda end: end[1] // BATCH_CHARS)
    return pool.map(encoder.encode, [[text for text, _ in group] for _, group in groups])


class TextReader:
    """A worker of prepare: reads the parts of sources, and encodes them where whoever asks does not."""

    def __init__(self, open_encoder: Callable[[], DocumentEncoder]) -> None:
        self._open_encoder = open_encoder

    @cached_property
    def encoder(self) -> DocumentEncoder:
        return self._open_encoder()

    def read(self, *what: Any) -> Iterator[Block]:
        """The blocks of a part; `what` as for `blocks`."""
        return blocks(*what)

    def encode(self, *what: Any) -> Iterator[Block]:
        """The same with ids instead of text; of equal pieces of a block the first alone has some."""
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(ENCODERS) as pool:
            for block in made_ahead(blocks(*what), reader):
                first = np.sort(np.unique(block.digests, return_index=True)[1])
                batches = encoded_batches(block, first, self.encoder, pool)
                yield block.with_ids(first, [ids for batch in batches for ids in batch])


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
        self,
        sources: Sequence[SourceConfig],
        workers: Workers,
        console: Console,
        advance: Callable[[float], None],
    ) -> dict[str, Any]:
        """Reads what is left, closes the shards, gives the manifest's part; `advance` hears of tokens."""
        # One thread reads: each thread that ever did would keep a block's memory for itself.
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(ENCODERS) as pool:
            for source in sources[self.progress.source :]:
                stream = self._blocks(source, workers, self.progress.part, self.progress.position)
                # The next block is read while this one is encoded.
                for part, block in made_ahead(stream, reader):
                    if self._is_full(source):
                        break
                    for taken in self._pack(block, source, pool):
                        advance(taken)
                        console.stop.check(self._folder)
                    self.progress.part = part
                    self._commit()
                workers.drop()
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

    def _blocks(
        self, source: SourceConfig, workers: Workers, first: int, position: tuple[int, int]
    ) -> Iterator[tuple[int, Block]]:
        """(number of its part, block) of what is left of a source, in order, whoever reads it."""
        cut, number = parts(source, self._seed), self.progress.source
        # Where others read, they encode too: reading alone is little work.
        method = "encode" if workers.count else "read"

        def job(part: int) -> Job:
            start = position if part == first else (0, 0)
            return Job((self.name, number, part), method, lambda: (source, self._seed, start, cut[part]))

        for part in range(first, len(cut)):
            for block in workers.stream(job(part), map(job, range(part + 1, len(cut)))):
                yield part, block

    def _is_full(self, source: SourceConfig) -> bool:
        return source.tokens is not None and self.progress.source_tokens >= source.tokens

    def _pack(self, block: Block, source: SourceConfig, pool: Executor) -> Iterator[int]:
        """Encodes what is new of a block and writes it, up to the source's budget; yields tokens taken."""
        progress, taken = self.progress, 0
        new = self._seen.first_seen(block.digests)
        for encoded in block.ids_of(new) if block.ids else encoded_batches(block, new, self._encoder, pool):
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
        progress.duplicates += (int(new[taken]) if taken < len(new) else len(block.digests)) - taken
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
        progress.part, progress.position = 0, (0, 0)
        progress.source_tokens, progress.skipped, progress.empty = 0, 0, 0
        self._commit()

    def _commit(self) -> None:
        for writer in self._writers.values():
            writer.sync()
        self._seen.sync()
        self.progress.writers = {split: writer.state() for split, writer in self._writers.items()}
        write_json(self._record, asdict(self.progress))
        for writer in self._writers.values():
            writer.forget()


class SeenDigests:
    """Digests of the documents taken: on disk in the order taken, in memory sorted; eight bytes each."""

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, 8 * count)
        # Merging a block's into all of them would cost more than reading it: the latest wait apart.
        self._sorted, self._latest = np.sort(np.fromfile(path, dtype="<u8")), np.empty(0, dtype="<u8")

    def first_seen(self, digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Indices into `digests` of those that were not met before, in order; of equal ones the first."""
        first: npt.NDArray[np.int64] = np.sort(np.unique(digests, return_index=True)[1])
        for known in (self._sorted, self._latest):
            if len(known):
                first = first[known[np.searchsorted(known[:-1], digests[first])] != digests[first]]
        return first

    def add(self, digests: npt.NDArray[np.uint64]) -> None:
        with open(self._path, "ab") as file:
            file.write(digests.astype("<u8").tobytes())
        self._latest = _merged(self._latest, np.sort(digests))
        if len(self._latest) > LATEST_DIGESTS:
            self._sorted, self._latest = _merged(self._sorted, self._latest), self._latest[:0]

    def sync(self) -> None:
        with open(self._path, "rb+") as file:
            os.fsync(file.fileno())


def _merged(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Two sorted arrays as one."""
    return np.insert(one, np.searchsorted(one, other), other)
