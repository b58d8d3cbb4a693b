"""Log-probs of text that was already written: one teacher-forced pass of a model over prompt and response.

    rescored = score(target, generations, Sampling(0.6))

Shape suffixes: N response positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from fastdraft.data.rows import SyntheticRow
from fastdraft.decoding.replay import (
    batch_tokens_of,
    chosen_logprobs,
    held_slices,
    pass_by_pass,
    response_hidden,
)
from fastdraft.functional.generation import Engine, Generation, Sampling
from fastdraft.functional.sampling import warp
from fastdraft.modeling.heads import output_head

_Text = TypeVar("_Text", SyntheticRow, Generation)


@torch.inference_mode()
def score(
    model: PreTrainedModel, written: Sequence[_Text], sampling: Sampling, *, batch_tokens: int = 0
) -> list[_Text]:
    """The same texts, in order, with this model's log-probs, warped as when the text was drawn.

    A token that this model's own top-k or top-p would have removed has log-prob -inf, never a guess.
    Greedy text has log-prob 0 throughout and is returned as it is. The model is usually the target in full precision, where a
    runtime wrote with fewer bits; `batch_tokens` are positions in one pass, padding included (0 chooses by device).
    """
    if sampling.temperature == 0:
        return list(written)
    scored = list(written)
    decoder, head = output_head(model)

    def score_piece(chosen: Sequence[int]) -> None:
        hidden_ND = torch.cat(response_hidden(decoder, [written[i] for i in chosen], model.device))
        tokens = [token for i in chosen for token in written[i].response_ids]
        tokens_N = torch.tensor(tokens, dtype=torch.long, device=hidden_ND.device)
        parts = [tokens_N.new_zeros(0, dtype=torch.float32)]
        for held in held_slices(tokens_N, head.vocab_size):
            logits_NV = warp(
                head.logits(hidden_ND[held]), sampling.temperature, sampling.top_k, sampling.top_p
            )
            parts.append(chosen_logprobs(logits_NV, tokens_N[held]))
        logprobs = iter(torch.cat(parts).tolist())
        for i in chosen:
            scored[i] = replace(written[i], logprobs=list(islice(logprobs, len(written[i].response_ids))))

    pass_by_pass(written, batch_tokens or batch_tokens_of(model.device), score_piece)
    return scored


class ScoringEngine:
    """An engine whose log-probs are replaced by a model's own."""

    def __init__(self, engine: Engine, model: PreTrainedModel) -> None:
        self.engine, self.model, self.name = engine, model, engine.name

    def with_ends(self, eos_ids: Sequence[int]) -> Engine:
        return self.engine.with_ends(eos_ids)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        """The engine's answers with the model's log-probs; reproducible as the engine is."""
        return score(self.model, self.engine.generate(prompts, sampling, max_new_tokens, seed), sampling)
