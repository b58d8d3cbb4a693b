"""What is measured between steps: the loss of each prepared corpus, block efficiency on held-out responses.

Always the same first rows; losses are plain cross-entropy in nats per token, whatever the objective adds; of
a trimmed head over the tokens that it has. In block efficiency others are never accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from fastdraft.data.rows import SyntheticRow
from fastdraft.data.shards import PackedCorpus
from fastdraft.decoding.replay import replay
from fastdraft.functional.acceptance import add_counts
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.training.batches import (
    Batch,
    Sample,
    cut_to_context,
    micro_batches,
    packed_batches,
    padded_batch,
)
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.step import TrainStep
from fastdraft.training.trainer import Validation

VALIDATION_TOKENS = 65_536  # read of each corpus
REPLAYED_TOKENS = 8192  # of responses that go through the draft at once


@torch.no_grad()
def mean_loss(step: TrainStep, batches: Sequence[Batch]) -> float:
    """The objective's mean over all trained tokens, in nats, without touching gradients."""
    total = sum(float(step.loss_sum(batch)) for batch in batches)
    return total / max(1, sum(batch.num_trained for batch in batches))


def corpus_losses(
    step: TrainStep, corpora: Mapping[str, PackedCorpus], micro_batch_tokens: int, separator: int | None
) -> Callable[[], Validation]:
    """Measures the present loss on the first rows of every corpus that has any, by name."""
    plain, batches = replace(step, objective=CrossEntropy()), dict[str, list[Batch]]()
    for name, corpus in corpora.items():
        count = min(corpus.rows, max(1, VALIDATION_TOKENS // corpus.row_length))
        if count:
            rows = packed_batches(corpus.take(np.arange(count)), micro_batch_tokens, separator)
            batches[name] = [plain.on_head(batch) for batch in rows]
    return lambda: Validation({"validation_loss": {n: mean_loss(plain, held) for n, held in batches.items()}})


def response_scores(
    step: TrainStep,
    draft: PreTrainedModel,
    rows: Sequence[SyntheticRow],
    k: int,
    vocabulary: Vocabulary,
    micro: int,
) -> Callable[[], Validation]:
    """Measures cross-entropy on responses cut to the context, block efficiency at `k` on whole ones."""
    plain, context_length = replace(step, objective=CrossEntropy()), int(draft.config.max_position_embeddings)
    whole = [row for row in rows if len(row.prompt_ids) + len(row.response_ids) <= context_length]
    replayable = [row for row in whole if row.is_replayable]
    samples, _, _ = cut_to_context((Sample.of(row) for row in rows), context_length)
    batches = [plain.on_head(padded_batch(group)) for group in micro_batches(samples, micro)]

    def measure() -> Validation:
        losses = {"responses": mean_loss(plain, batches)} if batches else {}
        if not replayable:
            return Validation({"validation_loss": losses})
        counted = replay(draft, replayable, [k], vocabulary, batch_tokens=REPLAYED_TOKENS)
        score = add_counts(counts[k] for counts in counted).block_efficiency
        return Validation({"validation_loss": losses, "validation_block_efficiency": score}, score)

    return measure
