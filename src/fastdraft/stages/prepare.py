"""prepare: corpora -> tokenised, packed shards in the target's vocabulary.

Decides what is a duplicate (the exact text, within one corpus), what is validation (by the hash of the text, so that it
is the same for every seed and budget), when progress is committed, and what the result depends on: the vocabulary, the
sources, this section and the seed; neither the target's weights nor the number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from fastdraft import artifacts
from fastdraft.artifacts import FINGERPRINT, MANIFEST
from fastdraft.config import Config, Count, format_count
from fastdraft.data.sources import SourceConfig
from fastdraft.errors import DataError
from fastdraft.interfaces import StageContext, TargetConfig
from fastdraft.provenance import describe_run

if TYPE_CHECKING:
    from fastdraft.data.journal import Journal
    from fastdraft.data.packing import RowPacker
    from fastdraft.data.shards import ShardWriter
    from fastdraft.data.tokenize import DocumentEncoder

BATCH_CHARS, BATCHES_PER_COMMIT = 1_000_000, 4
"""Text encoded at a time; a commit follows about every million tokens."""
VALIDATION_ROWS = 8
"""Below this many rows a corpus gives a tenth of its documents to validation, whatever their hash."""

KEPT_TOKENS = 20_000_000
"""Unfinished work of fewer tokens is removed when a source turns out to be bad."""


class PrepareConfig(Config):
    """`prepare:` — the corpora and their form on disk."""

    row_length: int = Field(default=2048, ge=8)
    """Tokens in a training row; the draft's training context."""
    validation: float = Field(default=0.005, ge=0, le=0.5)
    """Share of the documents kept for validation; small corpora keep a few rows anyway."""
    workers: int = Field(default=0, ge=0)
    """Tokenisation threads; 0 is all cores. The result does not depend on it."""
    shard_tokens: Count = Field(default=64_000_000, ge=1)
    """Tokens in a shard file."""
    document_masking: bool = False
    """Texts that share a training row do not see each other: each is trained as if it stood alone, from position 0."""
    corpora: list[SourceConfig] = Field(min_length=1)
    """What to read; entries of one name make one corpus, in the shares of their `tokens`."""

    @field_validator("corpora")
    @classmethod
    def _names_make_folders(cls, entries: list[Any]) -> list[Any]:
        names = {entry.name for entry in entries}
        if bad := {name for name in names if name.endswith(".") or name.casefold() in (MANIFEST, FINGERPRINT)}:
            raise ValueError(f"a corpus cannot be called '{min(bad)}'")
        if len({name.casefold() for name in names}) < len(names):
            raise ValueError("names of corpora must differ by more than capitals: each is a folder")
        return entries

    @property
    def names(self) -> list[str]:
        """The corpora, in order of their first entry."""
        return list(dict.fromkeys(entry.name for entry in self.corpora))


def fingerprint(config: PrepareConfig, context: StageContext) -> dict[str, Any]:
    """What the shards depend on. Sources that are gone do not matter once the stage is complete.

    Raises:
        DataError: when a source of unfinished work is missing.
    """
    artifact = context.artifact("prepare")
    stored = artifact.stored_fingerprint().get("corpora", []) if artifact.is_complete() else []
    corpora = []
    for number, entry in enumerate(config.corpora):
        try:
            corpora.append(entry.describe())
        except DataError as error:
            settings = entry.model_dump(exclude={"license"})
            if number < len(stored) and {key: stored[number].get(key) for key in settings} == settings:
                corpora.append(stored[number])
            else:
                raise DataError(f"prepare.corpora[{number}] {error.where}", error.found, error.rule, error.remedy) from None
    sizes = config.model_dump(include={"row_length", "validation", "shard_tokens"})
    return {**_encoding(context.target), "seed": context.settings.seed, **sizes, **_masking(config), "corpora": corpora}


def _masking(config: PrepareConfig) -> dict[str, bool]:
    """Named only where it is on, so that shards made before there was such a key still fit."""
    return {"document_masking": True} if config.document_masking else {}


def _encoding(target: TargetConfig) -> dict[str, Any]:
    """All that the ids depend on: ordinary tokens, added ones that are found in plain text, what parts documents, the ids' width.

    Other special tokens do not matter: they never come out of corpus text, so fine-tunes that differ in them share shards.
    """
    from fastdraft.data.shards import token_dtype
    from fastdraft.data.tokenize import added_words, separator_id
    from fastdraft.modeling.loading import load_config, load_generation_config, load_tokenizer, vocabulary_of

    tokenizer = load_tokenizer(target.location, target.revision, target.trust_remote_code)
    config = load_config(target.location, target.revision, target.trust_remote_code)
    vocabulary = vocabulary_of(tokenizer, config, load_generation_config(target.location, target.revision), target.location)
    return {
        "vocabulary": vocabulary.digest,
        "added_words": artifacts.digest(added_words(tokenizer)),
        "separator_id": separator_id(vocabulary.bos_token_id, vocabulary.eos_token_ids),
        "dtype": token_dtype(vocabulary.size),
    }


def run(config: PrepareConfig, context: StageContext) -> None:
    """Writes `CORPUS/SPLIT-NNNNN.bin` and the manifest; goes on from the last commit.

    Raises:
        DataError: for a missing, damaged or empty corpus, or one too small for a row in each split.
        VocabularyError: when the target's tokenizer does not fit its model.
    """
    from fastdraft.data.journal import Journal
    from fastdraft.data.shards import token_dtype
    from fastdraft.data.tokenize import DocumentEncoder, parallel_tokenization, separator_id
    from fastdraft.modeling.loading import load_tokenizer, load_vocabulary

    target, artifact = context.target, context.artifact("prepare")
    vocabulary = load_vocabulary(target)
    encoder = DocumentEncoder(load_tokenizer(target.location, target.revision, target.trust_remote_code), vocabulary.size)
    separator = separator_id(vocabulary.bos_token_id, vocabulary.eos_token_ids)
    dtype = token_dtype(vocabulary.size)
    journal_path = artifact.path / ".journal" / "journal.sqlite"
    budgets = [entry.tokens for entry in config.corpora]
    total = sum(budget or 0 for budget in budgets) if all(budgets) else None
    with contextlib.closing(Journal(journal_path)) as journal, _tidy(context, journal):
        shared = _Shared(encoder, journal, separator, dtype)
        builds = [_CorpusBuild(config, context, name, shared) for name in config.names]
        done = sum(build.progress.tokens for build in builds)
        with parallel_tokenization(config.workers), context.console.progress("prepare", total, "tokens", completed=done) as bar:
            for build in builds:
                build.run(bar.advance)
        corpora = {build.name: build.result() for build in builds}
    artifact.complete(
        row_length=config.row_length, dtype=dtype, separator_id=separator, corpora=corpora, **_masking(config), provenance=describe_run()
    )
    shutil.rmtree(journal_path.parent, ignore_errors=True)
    _summarize(context, corpora)


@contextlib.contextmanager
def _tidy(context: StageContext, journal: Journal) -> Iterator[None]:
    """Leaves nothing of a little work that bad data ended, so that a mended corpus can simply be run again.

    More work than that stays: the fault may have been a disk's or the network's.
    """
    try:
        yield
    except DataError:
        if sum(state["progress"]["tokens"] for state in journal.states()) < KEPT_TOKENS:
            journal.close()
            context.artifact("prepare").discard()
        raise


@dataclass
class _Progress:
    """All of a corpus's state between two commits; the writers' and packers' state is kept beside it."""

    entry: int = 0
    """Which of the corpus's entries is being read."""
    taken: int = 0
    """Pieces already taken from that entry's stream."""
    entry_tokens: int = 0
    tokens: int = 0
    duplicates: int = 0
    documents: dict[str, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    split_tokens: dict[str, int] = field(default_factory=lambda: {"train": 0, "validation": 0})
    sources: list[dict[str, Any]] = field(default_factory=list)
    """What each finished entry gave."""
    done: bool = False


@dataclass(frozen=True)
class _Batch:
    """Pieces on their way through the tokenizer."""

    texts: list[str]
    digests: list[bytes]
    taken: int
    duplicates: int
    last: bool


@dataclass(frozen=True)
class _Shared:
    """What all corpora of a run have in common."""

    encoder: DocumentEncoder
    journal: Journal
    separator: int
    dtype: str


class _CorpusBuild:
    """One corpus from its sources to closed shards."""

    def __init__(self, config: PrepareConfig, context: StageContext, name: str, shared: _Shared) -> None:
        self.name, self._context, self._encoder, self._journal = name, context, shared.encoder, shared.journal
        self._entries = [entry for entry in config.corpora if entry.name == name]
        self._row_ids, self._threshold = config.row_length + 1, int(config.validation * 2**64)
        self._folder = context.artifact("prepare").path / name
        rows_per_shard = max(1, config.shard_tokens // self._row_ids)
        self._writers, self._packers = self._restore(rows_per_shard, shared.separator, shared.dtype)

    def _restore(self, rows_per_shard: int, separator: int, dtype: str) -> tuple[dict[str, ShardWriter], dict[str, RowPacker]]:
        import numpy as np

        from fastdraft.data.packing import RowPacker
        from fastdraft.data.shards import SPLITS, ShardWriter

        state = self._journal.read(self.name) or {}
        self.progress = _Progress(**state.get("progress", {}))
        writers: dict[str, ShardWriter] = {}
        packers: dict[str, RowPacker] = {}
        for split in SPLITS:
            writers[split] = ShardWriter(self._folder, split, self._row_ids, dtype, rows_per_shard)
            writers[split].restore(**state.get(split, {"shards": [], "open_rows": 0}))
            packers[split] = RowPacker(self._row_ids, separator, dtype)
            packers[split].carry = np.array(state.get("carry", {}).get(split, []), dtype=dtype)
        return writers, packers

    def run(self, advance: Callable[[float], None]) -> None:
        """Reads what is still to be read of each entry, then closes the shards."""
        if self.progress.done:
            for writer in self._writers.values():
                writer.close_shard()  # nothing is open: removes the empty file that `restore` made
            return
        for number in range(self.progress.entry, len(self._entries)):
            self._read_entry(self._entries[number], advance)
        for writer in self._writers.values():
            writer.close_shard()
        self._check_rows()
        self.progress.done = True
        self._commit(forget=True)

    def _read_entry(self, entry: Any, advance: Callable[[float], None]) -> None:
        from fastdraft.data.ordering import stream

        skipped: list[str] = []
        seed = self._context.settings.seed
        pieces = itertools.islice(stream(entry, seed, skipped.append), self.progress.taken, None)
        with ThreadPoolExecutor(1) as pool:  # text is read and hashed while the batch before is encoded
            waiting: tuple[_Batch, Future[Any]] | None = None
            since_commit = 0
            for batch in self._batches(pieces):
                task = pool.submit(self._encoder.encode, batch.texts)
                if waiting:
                    self._pack(*waiting, entry.tokens, advance)
                waiting, since_commit = (batch, task), since_commit + 1
                if since_commit == BATCHES_PER_COMMIT or batch.last or self._is_full(entry):
                    self._pack(*waiting, entry.tokens, advance)
                    waiting, since_commit = None, 0
                    if batch.last or self._is_full(entry):
                        break
                    self._commit()
                    self._context.console.stop.check(self._folder)
        self._finish_entry(entry, len(skipped))

    def _is_full(self, entry: Any) -> bool:
        return entry.tokens is not None and self.progress.entry_tokens >= entry.tokens

    def _batches(self, pieces: Iterator[str]) -> Iterator[_Batch]:
        """New pieces, about BATCH_CHARS at a time; the last batch may be empty."""
        while True:
            texts: list[str] = []
            digests: list[bytes] = []
            chars = taken = duplicates = 0
            for piece in pieces:
                taken += 1
                content = piece.encode("utf-8", "replace")
                digest = hashlib.blake2b(content, digest_size=16).digest()
                if not self._journal.add(digest):
                    duplicates += 1
                    continue
                texts.append(content.decode("utf-8"))
                digests.append(digest)
                chars += len(piece)
                if chars >= BATCH_CHARS:
                    break
            last = chars < BATCH_CHARS
            yield _Batch(texts, digests, taken, duplicates, last)
            if last:
                return

    def _pack(self, batch: _Batch, task: Future[Any], budget: int | None, advance: Callable[[float], None]) -> None:
        """Routes a batch's documents to their splits until the entry's budget is used up."""
        progress, before = self.progress, self.progress.tokens
        routed: dict[str, list[Any]] = {"train": [], "validation": []}
        for number, (digest, ids) in enumerate(zip(batch.digests, task.result(), strict=True)):
            if budget is not None and progress.entry_tokens >= budget:
                self._journal.remove(batch.digests[number:])
                break
            split = self._split_of(digest)
            routed[split].append(ids)
            progress.documents[split] += 1
            progress.split_tokens[split] += len(ids) + 1
            progress.entry_tokens += len(ids) + 1
            progress.tokens += len(ids) + 1
        for split, documents in routed.items():
            self._writers[split].write(self._packers[split].add(documents))
        progress.taken += batch.taken
        progress.duplicates += batch.duplicates
        advance(progress.tokens - before)

    def _split_of(self, digest: bytes) -> str:
        if int.from_bytes(digest[:8], "big") < self._threshold:
            return "validation"
        train, validation = self.progress.split_tokens["train"], self.progress.split_tokens["validation"]
        share = 3 if validation <= self._row_ids else 10
        return "validation" if validation < VALIDATION_ROWS * self._row_ids and validation * share < train else "train"

    def _commit(self, forget: bool = False) -> None:
        for writer in self._writers.values():
            writer.flush()
        state = {split: writer.state() for split, writer in self._writers.items()}
        carry = {split: packer.carry.tolist() for split, packer in self._packers.items()}
        self._journal.commit(self.name, {"progress": asdict(self.progress), "carry": carry, **state}, forget)

    def _finish_entry(self, entry: Any, skipped: int) -> None:
        progress, console = self.progress, self._context.console
        where = getattr(entry, "path", getattr(entry, "dataset", ""))
        if not progress.entry_tokens:
            raise DataError(
                f"prepare.corpora '{self.name}' {where}",
                "no new text",
                "a source needs at least one document that is not empty",
                "correct the path or the field",
            )
        if entry.tokens is not None and progress.entry_tokens < entry.tokens:
            console.warn(f"{self.name}: {where} ends at {format_count(progress.entry_tokens)} of {format_count(entry.tokens)} tokens")
        if skipped:
            console.warn(f"{self.name}: {skipped} files of {where} passed over (unreadable or not UTF-8)")
        progress.sources.append(
            {"kind": entry.kind, "from": where, "license": entry.license, "tokens": progress.entry_tokens, "files_skipped": skipped}
        )
        progress.entry, progress.taken, progress.entry_tokens = progress.entry + 1, 0, 0
        self._commit()

    def _check_rows(self) -> None:
        for split, writer in self._writers.items():
            if not writer.shards:
                found = f"{self.progress.split_tokens[split]} tokens for {split}"
                raise DataError(
                    f"prepare.corpora '{self.name}'",
                    found,
                    f"each split needs at least one row of {self._row_ids}",
                    "give it more text or lower prepare.row_length",
                )

    def result(self) -> dict[str, Any]:
        """The corpus's part of the manifest."""
        splits = {
            split: {
                "rows": sum(shard["rows"] for shard in writer.shards),
                "tokens": sum(shard["rows"] for shard in writer.shards) * self._row_ids,
                "documents": self.progress.documents[split],
                "shards": writer.shards,
            }
            for split, writer in self._writers.items()
        }
        return {**splits, "duplicates": self.progress.duplicates, "sources": self.progress.sources}


def _summarize(context: StageContext, corpora: dict[str, Any]) -> None:
    rows = [
        [
            name,
            format_count(c["train"]["tokens"]),
            f"{c['train']['rows']}",
            f"{c['validation']['rows']}",
            f"{c['train']['documents'] + c['validation']['documents']}",
            f"{c['duplicates']}",
        ]
        for name, c in corpora.items()
    ]
    context.console.table("", ["corpus", "train tokens", "rows", "validation rows", "documents", "duplicates"], rows)
