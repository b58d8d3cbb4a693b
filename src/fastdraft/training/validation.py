"""What is measured between steps: the loss of each prepared corpus, block efficiency on held-out responses.

Decides how much is read (the same first rows every time, a bounded number of tokens), that a loss is plain cross-entropy in nats per
token, whatever else the training objective adds, and that what does not fit into memory is done in smaller pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastdraft.data.shards import PackedCorpus, open_corpus
from fastdraft.decoding.replay import WrittenText
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.run_folder import StageFolder
from fastdraft.training.batches import (
    Batch,
    as_samples,
    cut_to_context,
    micro_batches,
    packed_batch,
    padded_batch,
    text_separator,
)
from fastdraft.training.memory import within_memory
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.step import TrainStep
from fastdraft.training.trainer import Validation, mean_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fastdraft.data.rows import SyntheticRow

VALIDATION_TOKENS = 65_536
"""Tokens read of each corpus."""
REPLAYED_TOKENS = 8192
"""Tokens of responses that go through the draft at once."""


def corpus_losses(
    step: TrainStep, prepare: StageFolder, rows_per_micro: int
) -> Callable[[], dict[str, float]]:
    """A function that gives the present loss on the validation rows of every prepared corpus by name.

    Corpora without validation rows are left out.
    """
    corpora = {name: open_corpus(prepare, name, "validation") for name in prepare.manifest()["corpora"]}
    plain = replace(step, objective=CrossEntropy())
    separator = text_separator(prepare.manifest())
    batches = {
        name: _validation_batches(corpus, rows_per_micro, separator) for name, corpus in corpora.items()
    }
    return lambda: {name: mean_loss(plain, held) for name, held in batches.items() if held}


def replayed_score(
    draft: PreTrainedModel, rows: Sequence[WrittenText], num_speculative_tokens: int, vocabulary: Vocabulary
) -> float:
    """Block efficiency over `rows` by replay (decoding/replay.py)."""
    from fastdraft.decoding.replay import block_efficiency

    def replayed(tokens: int) -> float:
        return block_efficiency(draft, rows, num_speculative_tokens, vocabulary, batch_tokens=tokens)

    return within_memory(replayed, REPLAYED_TOKENS, 1, "align")


class HeldOutResponses:
    """Cross-entropy and block efficiency on held-out responses, whatever the objective."""

    def __init__(  # noqa: PLR0917
        self,
        draft: PreTrainedModel,
        step: TrainStep,
        rows: Sequence[SyntheticRow],
        num_speculative_tokens: int,
        vocabulary: Vocabulary,
        micro_batch_tokens: int,
    ) -> None:
        """Reads `rows` cut to the draft's context for the loss, and for block efficiency those that fit into it whole.

        Args:
            draft: What is trained.
            step: Its step; its objective is not used.
            rows: Held-out responses.
            num_speculative_tokens: K of block efficiency.
            vocabulary: Says which ids end an answer.
            micro_batch_tokens: Tokens, padding included, that go through the draft at once.
        """
        self._draft, self._step = draft, replace(step, objective=CrossEntropy())
        context_length = int(draft.config.max_position_embeddings)
        self._rows = [
            row
            for row in rows
            if row.is_replayable and len(row.prompt_ids) + len(row.response_ids) <= context_length
        ]
        self._k, self._vocabulary = num_speculative_tokens, vocabulary
        samples, _, _ = cut_to_context(as_samples((row, None) for row in rows), context_length)
        self._batches = [padded_batch(group, 0) for group in micro_batches(samples, micro_batch_tokens)]

    def __call__(self) -> Validation:
        """The present measurement; block efficiency is its score."""
        metrics: dict[str, Any] = {
            "validation_loss": {"responses": mean_loss(self._step, self._batches)} if self._batches else {}
        }
        if not self._rows:
            return Validation(metrics)
        score = replayed_score(self._draft, self._rows, self._k, self._vocabulary)
        return Validation({**metrics, "validation_block_efficiency": score}, score)


def _validation_batches(corpus: PackedCorpus, rows_per_micro: int, separator: int | None) -> list[Batch]:
    rows = min(corpus.rows, max(1, VALIDATION_TOKENS // corpus.row_length))
    starts = range(0, rows, rows_per_micro)
    return [
        packed_batch(corpus.take(range(start, min(start + rows_per_micro, rows))), separator)
        for start in starts
    ]
