"""Validation loss of each prepared corpus.

Decides how much is read (the same first rows every time, a bounded number of tokens) and that it is plain cross-entropy in nats per
token, whatever else the training objective adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fastdraft.artifacts import Artifact
from fastdraft.data.shards import PackedCorpus, open_lengths, row_lengths
from fastdraft.training.batches import Batch, packed_batch
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.step import TrainStep
from fastdraft.training.trainer import mean_loss

VALIDATION_TOKENS = 65_536
"""Tokens read of each corpus."""


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
    batches = {name: _validation_batches(corpus, rows_per_micro * longest // corpus.row_length) for name, corpus in corpora.items()}
    return lambda: {name: mean_loss(plain, held) for name, held in batches.items() if held}


def _validation_batches(corpus: PackedCorpus, rows_per_micro: int) -> list[Batch]:
    rows = min(corpus.rows, max(1, VALIDATION_TOKENS // corpus.row_length))
    starts = range(0, rows, rows_per_micro)
    return [packed_batch(np.stack([corpus[i] for i in range(start, min(start + rows_per_micro, rows))])) for start in starts]
