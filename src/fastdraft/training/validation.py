"""What is measured between steps: the loss of each prepared corpus, block efficiency on held-out responses.

Always the same first rows, a bounded number of tokens; losses are plain cross-entropy in nats per token, whatever the objective adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fastdraft.data.shards import PackedCorpus
from fastdraft.data.rows import SyntheticRow
from fastdraft.decoding.replay import block_efficiency
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.training.batches import (
    Batch,
    Sample,
    cut_to_context,
    micro_batches,
    packed_batch,
    padded_batch,
)
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.step import TrainStep
from fastdraft.training.trainer import Validation

VALIDATION_TOKENS = 65_536
"""Tokens read of each corpus."""
REPLAYED_TOKENS = 8192
"""Tokens of responses that go through the draft at once."""


@torch.no_grad()
def mean_loss(step: TrainStep, batches: Sequence[Batch]) -> float:
    """The objective's mean over all trained tokens, in nats, without touching gradients."""
    total = sum(float(step.loss_sum(batch)) for batch in batches)
    return total / max(1, sum(batch.num_trained for batch in batches))


def corpus_losses(
    step: TrainStep, corpora: Mapping[str, PackedCorpus], micro_batch_tokens: int, separator: int | None
) -> Callable[[], Validation]:
    """Measures the present loss on the first rows of every corpus, by name; a corpus without rows is left out."""
    plain = replace(step, objective=CrossEntropy(), replicas=None)
    batches: dict[str, list[Batch]] = {}
    for name, corpus in corpora.items():
        rows, count = (
            min(corpus.rows, max(1, VALIDATION_TOKENS // corpus.row_length)),
            max(1, micro_batch_tokens // corpus.row_length),
        )
        starts = range(0, rows, count)
        batches[name] = [
            packed_batch(corpus.take(np.arange(start, min(start + count, rows))), separator)
            for start in starts
        ]
    return lambda: Validation(
        {"validation_loss": {name: mean_loss(plain, held) for name, held in batches.items() if held}}
    )


def response_scores(
    step: TrainStep,
    draft: PreTrainedModel,
    rows: Sequence[SyntheticRow],
    num_speculative_tokens: int,
    vocabulary: Vocabulary,
    micro_batch_tokens: int,
) -> Callable[[], Validation]:
    """Measures cross-entropy and, as the score, block efficiency on held-out responses.

    The loss reads `rows` cut to the draft's context, block efficiency those that fit into it whole.
    """
    plain = replace(step, objective=CrossEntropy(), replicas=None)
    context_length = int(draft.config.max_position_embeddings)
    fitting = [
        row
        for row in rows
        if row.is_replayable and len(row.prompt_ids) + len(row.response_ids) <= context_length
    ]  # type: ignore[attr-defined]
    samples, _, _ = cut_to_context((Sample.of(row) for row in rows), context_length)
    batches = [padded_batch(group, 0) for group in micro_batches(samples, micro_batch_tokens)]

    def measure() -> Validation:
        metrics: dict[str, Any] = {
            "validation_loss": {"responses": mean_loss(plain, batches)} if batches else {}
        }
        if not fitting:
            return Validation(metrics)
        score = block_efficiency(
            draft, fitting, num_speculative_tokens, vocabulary, batch_tokens=REPLAYED_TOKENS
        )
        return Validation({**metrics, "validation_block_efficiency": score}, score)

    return measure
