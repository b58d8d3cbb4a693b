"""One corpus from its sources to closed shards: read, drop duplicates, encode, choose a split, pack, write, commit.

Decides what is a duplicate (the exact text, within one corpus), what is validation (by the hash of the text, so that it is the same
for every seed and budget), how much is under way at a time (a batch is encoded while the one before it is packed and the one after
it is read), and when progress is committed. Nothing of the result depends on how the work is cut into batches.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdraft.console import Console
from fastdraft.data.journal import Journal
from fastdraft.data.ordering import WINDOW_CHARS, PieceStream, piece_chars
from fastdraft.data.packing import RowPacker
from fastdraft.data.row_lengths import all_lengths, length_for
from fastdraft.data.shards import SPLITS, ShardWriter, Split, shard_prefix
from fastdraft.data.tokenize import DocumentEncoder
from fastdraft.errors import DataError, FastDraftError
from fastdraft.recipe.base import format_count

BATCH_CHARS, COMMIT_CHARS = 1_000_000, 16_000_000
"""Text encoded at a time; text after which a commit follows: about four million tokens, some seconds."""
ENCODERS = 2
"""Batches encoded at a time: while the ids of one become an array under the interpreter's lock, the other has the cores."""
VALIDATION_ROWS = 8
"""Below this many rows a corpus gives a tenth of its documents to validation, whatever their hash."""
SHORTFALL = 0.9
"""A length with less than this part of its share is warned of."""


@dataclass
class Progress:
    """All of a corpus's state between two commits; the writers' and packers' state is kept beside it."""

    entry: int = 0
    """Which of the corpus's entries is being read."""
    stream: dict[str, Any] | None = None
    """Where that entry's stream stands."""
    entry_tokens: int = 0
    tokens: int = 0
    duplicates: int = 0
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    length_tokens: dict[str, dict[str, int]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    """Tokens of each split that went to rows of each length."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """What each finished entry gave."""
    done: bool = False

    def split_tokens(self, split: str) -> int:
        return sum(self.length_tokens[split].values())


@dataclass(frozen=True)
class Layout:
    """The form of the rows on disk."""

    row_length: int
    long_rows: dict[int, float]
    """Share of the tokens by length, for rows longer than `row_length`."""
    shard_tokens: int
    validation: float
    separator_id: int
    dtype: str

    @property
    def lengths(self) -> list[int]:
        return all_lengths(self.row_length, self.long_rows)

    def writer(self, folder: Path, split: Split, length: int) -> ShardWriter:
        """The writer of one split's rows of one length."""
        prefix = shard_prefix(split, None if length == self.row_length else length)
        return ShardWriter(folder, prefix, length + 1, self.dtype, max(1, self.shard_tokens // (length + 1)))


@dataclass(frozen=True)
class _Batch:
    """Pieces on their way through the tokenizer."""

    texts: list[str]
    digests: list[bytes]
    duplicates: list[int]
    """Before each text, and at the end, how many duplicates came in this batch."""
    stream: dict[str, Any]
    """Where the source's stream stands behind the batch."""
    skipped: int
    chars: int
    last: bool


@dataclass(frozen=True)
class Tools:
    """What all corpora of a run have in common."""

    encoder: DocumentEncoder
    journal: Journal
    """Holds the progress and the digests of what was seen."""
    console: Console
    """For warnings, and for the wish to stop."""
    seed: int
    """Of every order."""


class CorpusBuild:
    """Everything between a corpus's entries and its part of the manifest.

    Args:
        name: The corpus.
        entries: Its sources, in order.
        folder: Where its shards go.
        layout: Their form.
        tools: Of the run.

    Raises:
        FastDraftError: when unfinished work is not what the journal says.
    """

    def __init__(self, name: str, entries: Sequence[Any], folder: Path, layout: Layout, tools: Tools) -> None:
        self.name, self._entries, self._folder, self._layout = name, entries, folder, layout
        self._encoder, self._journal, self._console, self._seed = (
            tools.encoder,
            tools.journal,
            tools.console,
            tools.seed,
        )
        self._threshold = int(layout.validation * 2**64)
        self._under_way: set[bytes] = set()
        self._places = [(split, length) for split in SPLITS for length in layout.lengths]
        state = self._journal.read(name) or {}
        self.progress = _restored(state.get("progress", {}), folder)
        self._writers = {
            (split, length): layout.writer(folder, split, length) for split, length in self._places
        }
        self._packers = {
            place: RowPacker(place[1] + 1, layout.separator_id, layout.dtype) for place in self._places
        }
        for place, writer in self._writers.items():
            writer.restore(**state.get("writers", {}).get(writer.prefix, {"shards": [], "open_rows": 0}))
            self._packers[place].carry = np.array(
                state.get("carry", {}).get(writer.prefix, []), dtype=layout.dtype
            )

    def run(self, advance: Callable[[float], None]) -> None:
        """Reads what is still to be read of each entry, then closes the shards; `advance` hears of tokens.

        Raises:
            DataError: for a missing, damaged or empty source, or a corpus too small for a row in each split.
            Interrupted: after a commit, when a stop was asked for.
        """
        if not self.progress.done:
            for number in range(self.progress.entry, len(self._entries)):
                self._read_entry(self._entries[number], advance)
        for writer in self._writers.values():
            writer.close_shard()  # of a finished corpus it only removes the empty file that `restore` made
        if not self.progress.done:
            self._check_rows()
            self.progress.done = True
            self._commit(forget=True)

    def result(self) -> dict[str, Any]:
        """The corpus's part of the manifest."""
        return {
            **{split: self._split_result(split) for split in SPLITS},
            "duplicates": self.progress.duplicates,
            "sources": self.progress.sources,
        }

    def _split_result(self, split: Split) -> dict[str, Any]:
        shards = []
        for length in self._layout.lengths:
            about = {} if length == self._layout.row_length else {"row_length": length}
            shards += [{**shard, **about} for shard in self._writers[split, length].shards]
        rows = {length: self._rows(split, length) for length in self._layout.lengths}
        return {
            "rows": sum(rows.values()),
            "tokens": sum(count * (length + 1) for length, count in rows.items()),
            "documents": self.progress.documents[split],
            "shards": shards,
        }

    def _rows(self, split: Split, length: int) -> int:
        return sum(shard["rows"] for shard in self._writers[split, length].shards)

    def _read_entry(self, entry: Any, advance: Callable[[float], None]) -> None:
        source = PieceStream(
            entry, self._seed, self.progress.stream, WINDOW_CHARS, piece_chars(self._layout.lengths[-1])
        )
        self._under_way.clear()
        waiting: deque[tuple[_Batch, Future[list[npt.NDArray[np.uint32]]]]] = deque()
        uncommitted = skipped = 0
        with ThreadPoolExecutor(ENCODERS) as pool:
            for batch in self._batches(source):
                waiting.append((batch, pool.submit(self._encoder.encode, batch.texts)))
                while waiting and not self._is_full(entry) and (len(waiting) > ENCODERS or batch.last):
                    ready, task = waiting.popleft()
                    self._pack(ready, task.result(), entry.tokens, advance)
                    uncommitted, skipped = uncommitted + ready.chars, ready.skipped
                if self._is_full(entry):
                    break
                if uncommitted >= COMMIT_CHARS or self._console.stop.requested:
                    self._commit()
                    uncommitted = 0
                    self._console.stop.check(self._folder)
        self._finish_entry(entry, skipped)

    def _is_full(self, entry: Any) -> bool:
        return entry.tokens is not None and self.progress.entry_tokens >= entry.tokens

    def _batches(self, source: PieceStream) -> Iterator[_Batch]:
        """New pieces, about BATCH_CHARS at a time; the last batch may be empty."""
        last = False
        while not last:
            pieces: list[tuple[str, bytes]] = []
            chars, last = 0, True
            for piece in source:
                text, content = _valid(piece)
                pieces.append((text, hashlib.blake2b(content, digest_size=16).digest()))
                chars += len(piece)
                if chars >= BATCH_CHARS:
                    last = False
                    break
            yield self._new_ones(pieces, source, chars, last)

    def _new_ones(
        self, pieces: list[tuple[str, bytes]], source: PieceStream, chars: int, last: bool
    ) -> _Batch:
        """The batch without what was seen before."""
        seen = self._journal.known([digest for _, digest in pieces])
        texts: list[str] = []
        digests: list[bytes] = []
        duplicates = [0]
        for text, digest in pieces:
            if digest in seen or digest in self._under_way:
                duplicates[-1] += 1
                continue
            self._under_way.add(digest)
            texts.append(text)
            digests.append(digest)
            duplicates.append(duplicates[-1])
        return _Batch(texts, digests, duplicates, source.state(), source.skipped, chars, last)

    def _pack(
        self,
        batch: _Batch,
        encoded: list[npt.NDArray[np.uint32]],
        budget: int | None,
        advance: Callable[[float], None],
    ) -> None:
        """Routes a batch's documents to their splits and lengths until the entry's budget is used up."""
        progress, before = self.progress, self.progress.tokens
        routed: dict[tuple[Split, int], list[npt.NDArray[np.uint32]]] = {place: [] for place in self._places}
        taken = 0
        for digest, ids in zip(batch.digests, encoded, strict=True):
            if budget is not None and progress.entry_tokens >= budget:
                break
            split, size = self._split_of(digest), len(ids) + 1
            length = self._length_of(split, size)
            routed[split, length].append(ids)
            counts = progress.length_tokens[split]
            counts[str(length)] = counts.get(str(length), 0) + size
            progress.documents[split] += 1
            progress.entry_tokens += size
            progress.tokens += size
            taken += 1
        for place, documents in routed.items():
            self._writers[place].write(self._packers[place].add(documents))
        self._journal.add(batch.digests[:taken])
        self._under_way.difference_update(batch.digests)
        progress.stream = batch.stream
        progress.duplicates += batch.duplicates[taken]
        advance(progress.tokens - before)

    def _length_of(self, split: Split, num_tokens: int) -> int:
        layout = self._layout
        if not layout.long_rows:
            return layout.row_length
        so_far = {int(length): count for length, count in self.progress.length_tokens[split].items()}
        return length_for(num_tokens, layout.row_length, layout.long_rows, so_far)

    def _split_of(self, digest: bytes) -> Split:
        if int.from_bytes(digest[:8], "big") < self._threshold:
            return "validation"
        shortest, longest = self._layout.lengths[0] + 1, self._layout.lengths[-1] + 1
        train, validation = self.progress.split_tokens("train"), self.progress.split_tokens("validation")
        share = 3 if validation <= shortest else 10
        return (
            "validation" if validation < VALIDATION_ROWS * longest and validation * share < train else "train"
        )

    def _commit(self, forget: bool = False) -> None:
        for writer in self._writers.values():
            writer.flush()
        writers = {writer.prefix: writer.state() for writer in self._writers.values()}
        carry = {
            self._writers[place].prefix: packer.carry.tolist() for place, packer in self._packers.items()
        }
        self._journal.commit(
            self.name, {"progress": asdict(self.progress), "carry": carry, "writers": writers}, forget
        )

    def _finish_entry(self, entry: Any, skipped: int) -> None:
        progress, console = self.progress, self._console
        where = getattr(entry, "path", getattr(entry, "dataset", ""))
        if not progress.entry_tokens:
            rule = "a source needs at least one document that is not empty"
            raise DataError(
                f"prepare.corpora '{self.name}' {where}", "no new text", rule, "correct the path or the field"
            )
        if entry.tokens is not None and progress.entry_tokens < entry.tokens:
            console.warn(
                f"{self.name}: {where} ends at {format_count(progress.entry_tokens)} of {format_count(entry.tokens)} tokens"
            )
        if skipped:
            console.warn(f"{self.name}: {skipped} files of {where} passed over (unreadable or not UTF-8)")
        progress.sources.append(
            {
                "kind": entry.kind,
                "from": where,
                "license": entry.license,
                "tokens": progress.entry_tokens,
                "files_skipped": skipped,
            }
        )
        progress.entry, progress.stream, progress.entry_tokens = progress.entry + 1, None, 0
        self._commit()

    def _check_rows(self) -> None:
        """Every split has a row; a length without its share is warned of."""
        for split in SPLITS:
            if not any(self._rows(split, length) for length in self._layout.lengths):
                found = f"{self.progress.split_tokens(split)} tokens for {split}"
                rule = f"each split needs at least one row of {self._layout.row_length + 1}"
                remedy = "give it more text or lower prepare.row_length"
                raise DataError(f"prepare.corpora '{self.name}'", found, rule, remedy)
        total = sum(self._rows("train", length) * length for length in self._layout.lengths)
        for length, share in self._layout.long_rows.items():
            reached = self._rows("train", length) * length / max(total, 1)
            if reached < SHORTFALL * share:
                self._console.warn(
                    f"{self.name}: {reached:.1%} of the tokens are in rows of {length}, {share:.1%} were asked for: "
                    f"too few documents of {length // 2} tokens or more"
                )


def _restored(state: dict[str, Any], where: Path) -> Progress:
    try:
        return Progress(**state)
    except TypeError:
        rule, remedy = (
            "unfinished work must be of the same version to go on from it",
            "redo it with --redo prepare",
        )
        raise FastDraftError(where, "begun by another version", rule, remedy) from None


def _valid(piece: str) -> tuple[str, bytes]:
    """The piece without what UTF-8 cannot hold (lone surrogates become question marks), and its bytes."""
    try:
        return piece, piece.encode("utf-8")
    except UnicodeEncodeError:
        content = piece.encode("utf-8", "replace")
        return content.decode("utf-8"), content
