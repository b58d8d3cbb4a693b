"""The target in transformers: `HuggingFaceEngine` writes text in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from fastdraft.data.filters import is_looping
from fastdraft.decoding.autoregressive import generate_batch
from fastdraft.errors import Halving
from fastdraft.functional.generation import Generation, Sampling, check_prompts
from fastdraft.modeling.families import text_config
from fastdraft.modeling.vocabulary import Vocabulary


class HuggingFaceEngine:
    """The `Engine` protocol over a transformers model that is already loaded.

    `on_batch` hears of the answers finished since its last call; `halving` is how many rows fit into memory.
    """

    name = "huggingface"

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        batch_rows: int = 64,
        on_batch: Callable[[int], None] | None = None,
        *,
        end_loops: bool = False,
        halving: Halving | None = None,
    ) -> None:
        self.model, self.vocabulary, self.batch_rows = model, vocabulary, batch_rows
        self.on_batch, self.end_loops = on_batch, end_loops
        self.halving = halving or Halving("batch_rows")
        self.context_length = int(getattr(text_config(model.config), "max_position_embeddings", 2**31))

    def with_ends(self, eos_ids: Sequence[int]) -> HuggingFaceEngine:
        """The same loaded model, whose answers end at these ids or in a loop."""
        vocabulary = replace(self.vocabulary, eos_token_ids=tuple(eos_ids))
        return HuggingFaceEngine(
            self.model, vocabulary, self.batch_rows, end_loops=True, halving=self.halving
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        """One answer for each prompt, in order; the same for equal prompts, seed, batch_rows and threads."""
        check_prompts(prompts, max_new_tokens, self.context_length)
        generator = torch.Generator().manual_seed(seed)
        eos_ids, give_up = frozenset(self.vocabulary.eos_token_ids), is_looping if self.end_loops else None
        # By length, so that little is wasted on padding.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers: dict[int, Generation] = {}
        for start in range(0, len(order), self.batch_rows):
            chosen = order[start : start + self.batch_rows]
            batch = [prompts[i] for i in chosen]
            written = generate_batch(
                self.model, batch, sampling, max_new_tokens, eos_ids, generator, give_up, self.halving
            )
            answers.update(zip(chosen, written, strict=True))
            if self.on_batch:
                self.on_batch(len(chosen))
        return [answers[index] for index in range(len(prompts))]
