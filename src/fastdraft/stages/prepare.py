"""prepare: corpora -> tokenised, packed shards in the target's vocabulary.

The shards depend on the vocabulary, the sources, this section and the seed; neither on the target's weights
nor on the number of workers. How a corpus is read, cut, encoded and packed: data/corpora.py,
data/tokenize.py, data/pack.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from fastdraft.console import format_count
from fastdraft.data.corpora import describe
from fastdraft.data.pack import CorpusPacker, TextReader
from fastdraft.data.shards import RowForm, token_dtype
from fastdraft.data.tokenize import DocumentEncoder, added_words, separator_id, set_tokenizer_threads
from fastdraft.errors import DataError
from fastdraft.provenance import describe_run
from fastdraft.recipe.prepare import PrepareConfig
from fastdraft.run_folder import StageFolder, digest
from fastdraft.stages.context import StageContext

SHARD_TOKENS = 64_000_000
# Unfinished work of fewer tokens is removed when a source turns out to be bad, so that a mended corpus can
# simply be run again; more stays, for the fault may have been the network's.
KEPT_TOKENS = 20_000_000


def fingerprint(config: PrepareConfig, context: StageContext) -> dict[str, Any]:
    """What the shards depend on."""
    tokenizer, vocabulary = context.target.tokenizer, context.target.vocabulary
    return {
        "vocabulary": vocabulary.digest,
        # Other special tokens never come out of corpus text: fine-tunes that differ in them share shards.
        "added_words": digest(added_words(tokenizer)),
        "separator_id": separator_id(vocabulary.bos_token_id, vocabulary.eos_token_ids),
        "dtype": token_dtype(vocabulary.size),
        "seed": context.settings.seed,
        **config.model_dump(include={"row_length", "validation", "document_masking"}),
        "corpora": _described(config, context.folder("prepare")),
    }


def _described(config: PrepareConfig, folder: StageFolder) -> list[dict[str, Any]]:
    """Every source; one that is gone does not matter once the stage is complete."""
    stored = folder.stored_fingerprint().get("corpora", []) if folder.is_complete() else []
    found = []
    for number, source in enumerate(config.corpora):
        try:
            found.append(describe(source))
        except DataError as error:
            settings = source.model_dump(exclude={"license"})
            before = stored[number] if number < len(stored) else {}
            if {key: before.get(key) for key in settings} != settings:
                raise DataError(f"prepare.corpora[{number}]: {error.message}", error.fix) from None
            found.append(before)
    return found


def _open_encoder(context: StageContext) -> DocumentEncoder:
    set_tokenizer_threads(context.settings.threads)
    return DocumentEncoder(context.target.tokenizer, context.target.vocabulary.size)


def run(config: PrepareConfig, context: StageContext) -> None:
    """Writes `CORPUS/SPLIT-NNNNN.bin` and the manifest; goes on from the last block that was finished."""
    folder, console = context.folder("prepare"), context.console
    vocabulary = context.target.vocabulary
    separator = separator_id(vocabulary.bos_token_id, vocabulary.eos_token_ids)
    dtype, seed = token_dtype(vocabulary.size), context.settings.seed
    form = RowForm(config.row_length, separator, dtype, SHARD_TOKENS, config.validation, config.store)
    encoder = _open_encoder(context)
    packers = {name: CorpusPacker(name, folder.path, form, encoder, seed) for name in config.sources}
    done = sum(packer.tokens for packer in packers.values())
    with (
        context.workers("prepare", partial(TextReader, partial(_open_encoder, context)), "cpu") as workers,
        console.progress("prepare", config.budget, "tokens", completed=done) as bar,
    ):
        try:
            corpora = {
                name: one.run(config.sources[name], workers, console, bar.advance)
                for name, one in packers.items()
            }
        except DataError:
            if sum(packer.tokens for packer in packers.values()) < KEPT_TOKENS:
                folder.discard()
            raise
    folder.complete(
        row_length=config.row_length,
        separator_id=separator,
        dtype=dtype,
        corpora=corpora,
        document_masking=config.document_masking,
        store=config.store,
        provenance=describe_run(),
    )
    folder.remove_scratch()
    rows = []
    for name, corpus in corpora.items():
        train, validation = corpus["train"], corpus["validation"]
        documents = train["documents"] + validation["documents"]
        counts = [format_count(train["tokens"]), train["rows"], validation["rows"], documents]
        rows.append([name, *counts, corpus["duplicates"]])
    columns = ["corpus", "train tokens", "rows", "validation rows", "documents", "duplicates"]
    console.table("", columns, rows)
