"""One corpus of a recipe: documents -> distinct documents -> token ids -> rows in shards.

Call `CorpusPacker(...).run(...)`. PackingProgress is written down after every block of text; a killed stage repeats one block and
ends with the same bytes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdraft.console import Console
from fastdraft.data.corpora import Block, blocks
from fastdraft.data.shards import SPLITS, RowForm, RowWriter, Split
from fastdraft.data.tokenize import DocumentEncoder
from fastdraft.errors import DataError
from fastdraft.recipe.base import format_count
from fastdraft.recipe.prepare import SourceConfig
from fastdraft.run_folder import read_json, write_json

BATCH_CHARS = 1_000_000
# While the ids of one batch become an array under the interpreter's lock, the other has the cores.
ENCODERS = 2
# Below this many rows a corpus gives a tenth of its documents to validation, whatever their hash.
VALIDATION_ROWS = 8


@dataclass
class PackingProgress:
    """How far a corpus has come."""

    source: int = 0
    """Number of the source that is read."""
    position: tuple[int, int] = (0, 0)
    """Behind which reading it goes on."""
    source_tokens: int = 0
    skipped: int = 0
    """Files of this source that were passed over."""
    seen: int = 0
    """Documents taken so far, of all sources."""
    duplicates: int = 0
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    sources: list[dict[str, Any]] = field(default_factory=list)
    """What each finished source gave."""
    writers: dict[str, Any] = field(default_factory=dict)


class CorpusPacker:
    """Everything between a corpus's sources (its entries in the recipe) and its part of the manifest.

    Shards go to `folder/name`, progress to `folder/.journal`, which is of no use once the stage is complete.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[SourceConfig],
        folder: Path,
        form: RowForm,
        validation: float,
        encoder: DocumentEncoder,
        seed: int,
    ) -> None:
        self.name, self._sources, self._form, self._encoder, self._seed = name, sources, form, encoder, seed
        self._threshold = int(validation * 2**64)
        self._folder, self._record = folder, folder / ".journal" / f"{name}.json"
        self.progress = PackingProgress(**read_json(self._record)) if self._record.exists() else PackingProgress()
        self._seen = SeenDigests(self._record.with_suffix(".seen"), self.progress.seen)
        self._writers = {
            split: RowWriter(folder / name, split, form, self.progress.writers.get(split)) for split in SPLITS
        }

    @property
    def tokens(self) -> int:
        return sum(self.progress.tokens.values())

    def run(self, console: Console, advance: Callable[[float], None]) -> dict[str, Any]:
        """Reads what is still to be read and closes the shards; gives the corpus's part of the manifest.

        `advance` hears of tokens.
        """
        # One thread reads: each thread that ever did would keep a block's memory for itself.
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(ENCODERS) as pool:
            for source in self._sources[self.progress.source :]:
                self._read(source, reader, pool, console, advance)
        for split, writer in self._writers.items():
            writer.close_shard()
            if not writer.rows:
                found = f"{self.progress.tokens[split]} tokens for {split}"
                rule = f"each split needs at least one row of {self._form.row_ids}"
                raise DataError(
                    f"prepare.corpora '{self.name}': {found}; {rule}",
                    "give it more text or lower prepare.row_length",
                )
        self._commit()
        parts = {
            split: {
                "rows": writer.rows,
                "tokens": writer.rows * self._form.row_ids,
                "documents": self.progress.documents[split],
                "shards": writer.shards,
            }
            for split, writer in self._writers.items()
        }
        return {**parts, "duplicates": self.progress.duplicates, "sources": self.progress.sources}

    def _read(
        self,
        source: SourceConfig,
        reader: Executor,
        pool: Executor,
        console: Console,
        advance: Callable[[float], None],
    ) -> None:
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

    def _is_full(self, source: SourceConfig) -> bool:
        return source.tokens is not None and self.progress.source_tokens >= source.tokens

    def _pack(self, block: Block, source: SourceConfig, pool: Executor) -> Iterator[int]:
        """Encodes what is new of a block and writes it, until the source's budget is used up; yields tokens taken."""
        progress = self.progress
        new = self._seen.first_seen(block.digests)
        digests = block.digests[new]
        taken = 0
        for encoded in self._encoded([block.pieces[i] for i in new], pool):
            routed: dict[Split, list[npt.NDArray[np.uint32]]] = {split: [] for split in SPLITS}
            before = self.tokens
            for ids in encoded:
                if self._is_full(source):
                    break
                split = self._split_of(int(digests[taken]))
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
        self._seen.add(digests[:taken])
        progress.duplicates += (int(new[taken]) if taken < len(new) else len(block.pieces)) - taken
        progress.seen += taken
        progress.skipped += block.skipped
        progress.position = block.end

    def _encoded(self, texts: Sequence[str], pool: Executor) -> Iterator[list[npt.NDArray[np.uint32]]]:
        """The ids of the texts in order, a batch at a time, while the next batches are being encoded."""
        waiting: deque[Future[list[npt.NDArray[np.uint32]]]] = deque()
        start = chars = 0
        for end, text in enumerate(texts, 1):
            chars += len(text)
            if chars >= BATCH_CHARS or end == len(texts):
                waiting.append(pool.submit(self._encoder.encode, texts[start:end]))
                start, chars = end, 0
            if len(waiting) > ENCODERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _split_of(self, digest: int) -> Split:
        """By the hash of the text, so that it is the same for every seed and budget."""
        if digest < self._threshold:
            return "validation"
        train, validation = self.progress.tokens["train"], self.progress.tokens["validation"]
        share = 3 if validation <= self._form.row_ids else 10
        small = validation < VALIDATION_ROWS * self._form.row_ids
        return "validation" if small and validation * share < train else "train"

    def _finish(self, source: SourceConfig, console: Console) -> None:
        progress = self.progress
        where = getattr(source, "path", getattr(source, "dataset", ""))
        if not progress.source_tokens:
            found = f"prepare.corpora '{self.name}': {where}: no new text"
            raise DataError(
                f"{found}; a source needs at least one document that is not empty",
                "correct the path or the field",
            )
        if source.tokens is not None and progress.source_tokens < source.tokens:
            ends, wanted = format_count(progress.source_tokens), format_count(source.tokens)
            console.warn(f"{self.name}: {where} ends at {ends} of {wanted} tokens")
        if progress.skipped:
            console.warn(
                f"{self.name}: {progress.skipped} files of {where} passed over (unreadable or not UTF-8)"
            )
        gave = {"tokens": progress.source_tokens, "files_skipped": progress.skipped}
        progress.sources.append({"kind": source.kind, "from": where, "license": source.license, **gave})
        self.progress = replace(
            progress, source=progress.source + 1, position=(0, 0), source_tokens=0, skipped=0
        )
        self._commit()

    def _commit(self) -> None:
        for writer in self._writers.values():
            writer.sync()
        self._seen.sync()
        self.progress.writers = {split: writer.state() for split, writer in self._writers.items()}
        write_json(self._record, asdict(self.progress))


class SeenDigests:
    """Digests of the documents taken so far: on disk in the order taken, in memory sorted; eight bytes a document."""

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, 8 * count)
        self._sorted = np.sort(np.fromfile(path, dtype="<u8"))

    def first_seen(self, digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Indices into `digests` of those that were not met before, in order; of equal ones the first."""
        first = np.sort(np.unique(digests, return_index=True)[1])
        if not len(self._sorted):
            return first
        nearest = self._sorted[np.searchsorted(self._sorted[:-1], digests[first])]
        return first[nearest != digests[first]]

    def add(self, digests: npt.NDArray[np.uint64]) -> None:
        with open(self._path, "ab") as file:
            file.write(digests.astype("<u8").tobytes())
        added = np.sort(digests)
        self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, added), added)

    def sync(self) -> None:
        with open(self._path, "rb+") as file:
            os.fsync(file.fileno())
