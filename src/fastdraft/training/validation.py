"""What is measured between steps: the loss of each prepared corpus, block efficiency on held-out responses.

Decides how much is read (the same first rows every time, a bounded number of tokens), that a loss is plain cross-entropy in nats per
token, whatever else the training objective adds, and that what does not fit into memory is done in smaller pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fastdraft.artifacts import Artifact
from fastdraft.data.shards import PackedCorpus, open_lengths, row_lengths
from fastdraft.decoding.replay import WrittenText
from fastdraft.training.batches import Batch, packed_batch, text_separator
from fastdraft.training.memory import within_memory
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.step import TrainStep
from fastdraft.training.trainer import mean_loss
from fastdraft.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VALIDATION_TOKENS = 65_536
"""Tokens read of each corpus."""
REPLAYED_TOKENS = 8192
"""Tokens of responses that go through the draft at once."""


def corpus_losses(step: TrainStep, prepare: Artifact, rows_per_micro: int) -> Callable[[], dict[str, float]]:
    """A function that gives the present loss on the validation rows of every prepared corpus by name.

    Corpora without validation rows are left out. Rows longer than the shortest have a loss of their own, under names like `text@4096`.
    """
    longest = row_lengths(prepare.manifest())[-1]
    corpora = {
        f"{name}@{length}" if number else name: corpus
        for name in prepare.manifest()["corpora"]
        for number, (length, corpus) in enumerate(open_lengths(prepare, name, "validation").items())
    }
    plain = replace(step, objective=CrossEntropy())
    separator = text_separator(prepare.manifest())
    batches = {
        name: _validation_batches(corpus, rows_per_micro * longest // corpus.row_length, separator) for name, corpus in corpora.items()
    }
    return lambda: {name: mean_loss(plain, held) for name, held in batches.items() if held}


def replayed_score(draft: PreTrainedModel, rows: Sequence[WrittenText], num_speculative_tokens: int, vocabulary: Vocabulary) -> float:
    """Block efficiency over `rows` by replay (decoding/replay.py)."""
    from fastdraft.decoding.replay import block_efficiency

    def replayed(tokens: int) -> float:
        return block_efficiency(draft, rows, num_speculative_tokens, vocabulary, batch_tokens=tokens)

    return within_memory(replayed, REPLAYED_TOKENS, 1, "align")


def _validation_batches(corpus: PackedCorpus, rows_per_micro: int, separator: int | None) -> list[Batch]:
    rows = min(corpus.rows, max(1, VALIDATION_TOKENS // corpus.row_length))
    starts = range(0, rows, rows_per_micro)
    return [packed_batch(np.stack([corpus[i] for i in range(start, min(start + rows_per_micro, rows))]), separator) for start in starts]
