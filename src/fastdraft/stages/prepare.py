"""prepare: corpora -> tokenised, packed shards in the target's vocabulary.

Decides what the result depends on (the vocabulary, the sources, this section and the seed; neither the target's weights nor the number
of workers) and what is left of work that bad data ended. How a corpus is read, cut, encoded and packed is data/build.py's.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastdraft import run_folder
from fastdraft.data.sources import describe
from fastdraft.errors import DataError
from fastdraft.provenance import describe_run
from fastdraft.recipe.base import format_count
from fastdraft.recipe.prepare import PrepareConfig
from fastdraft.stages.context import StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdraft.data.journal import Journal
    from fastdraft.modeling.vocabulary import Vocabulary

SHARD_TOKENS = 16_000_000
KEPT_TOKENS = 20_000_000
"""Unfinished work of fewer tokens is removed when a source turns out to be bad."""


def fingerprint(config: PrepareConfig, context: StageContext) -> dict[str, Any]:
    """What the shards depend on. Sources that are gone do not matter once the stage is complete.

    Raises:
        DataError: when a source of unfinished work is missing.
    """

    artifact = context.folder("prepare")
    stored = artifact.stored_fingerprint().get("corpora", []) if artifact.is_complete() else []
    corpora = []
    for number, entry in enumerate(config.corpora):
        try:
            corpora.append(describe(entry))
        except DataError as error:
            settings = entry.model_dump(exclude={"license"})
            if number < len(stored) and {key: stored[number].get(key) for key in settings} == settings:
                corpora.append(stored[number])
            else:
                raise DataError(f"prepare.corpora[{number}]: {error.message}", error.fix) from None
    sizes = config.model_dump(include={"row_length", "validation"})
    encoding = _encoding(context.target.tokenizer, context.target.vocabulary)
    return {**encoding, "seed": context.settings.seed, **sizes, **_masking(config), "corpora": corpora}


def _masking(config: PrepareConfig) -> dict[str, bool]:
    """Named only where it is on, so that shards made before there was such a key still fit."""
    return {"document_masking": True} if config.document_masking else {}


def _encoding(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> dict[str, Any]:
    """All that the ids depend on: ordinary tokens, added ones that are found in plain text, what parts documents, the ids' width.

    Other special tokens do not matter: they never come out of corpus text, so fine-tunes that differ in them share shards.
    """
    from fastdraft.data.shards import token_dtype
    from fastdraft.data.tokenize import added_words, separator_id

    return {
        "vocabulary": vocabulary.digest,
        "added_words": run_folder.digest(added_words(tokenizer)),
        "separator_id": separator_id(vocabulary.bos_token_id, vocabulary.eos_token_ids),
        "dtype": token_dtype(vocabulary.size),
    }


def run(config: PrepareConfig, context: StageContext) -> None:
    """Writes `CORPUS/SPLIT-NNNNN.bin` and the manifest; goes on from the last commit.

    Raises:
        DataError: for a missing, damaged or empty corpus, or one too small for a row in each split.
        TargetError: when the target's tokenizer does not fit its model.
    """
    from fastdraft.data.build import CorpusBuild, Layout, Tools
    from fastdraft.data.journal import Journal
    from fastdraft.data.tokenize import DocumentEncoder, parallel_tokenization

    artifact, console = context.folder("prepare"), context.console
    tokenizer, vocabulary = context.target.tokenizer, context.target.vocabulary
    encoding = _encoding(tokenizer, vocabulary)
    form = {"separator_id": encoding["separator_id"], "dtype": encoding["dtype"]}
    layout = Layout(config.row_length, {}, SHARD_TOKENS, config.validation, **form)
    journal_path = artifact.path / ".journal" / "journal.sqlite"
    with contextlib.closing(Journal(journal_path)) as journal, _tidy(context, journal):
        tools = Tools(DocumentEncoder(tokenizer, vocabulary.size), journal, console, context.settings.seed)
        builds = [
            CorpusBuild(name, entries, artifact.path / name, layout, tools)
            for name, entries in config.sources.items()
        ]
        done = sum(build.progress.tokens for build in builds)
        with (
            parallel_tokenization(context.settings.threads),
            console.progress("prepare", config.budget, "tokens", completed=done) as bar,
        ):
            for build in builds:
                build.run(bar.advance)
        corpora = {build.name: build.result() for build in builds}
    artifact.complete(
        row_length=config.row_length, **form, corpora=corpora, **_masking(config), provenance=describe_run()
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
            context.folder("prepare").discard()
        raise


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
    context.console.table(
        "", ["corpus", "train tokens", "rows", "validation rows", "documents", "duplicates"], rows
    )
