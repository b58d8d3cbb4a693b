"""Log-probs of text that was already written: one teacher-forced pass of a model over prompt and response.

rescored = score(target, generations, Sampling(0.6))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from fastdraft.data.rows import SyntheticRow
from fastdraft.decoding.replay import pass_by_pass, response_hidden, token_logprobs
from fastdraft.functional.generation import Engine, Generation, Sampling
from fastdraft.modeling.heads import output_head

_Text = TypeVar("_Text", SyntheticRow, Generation)


@torch.inference_mode()
def score(
    model: PreTrainedModel, written: Sequence[_Text], sampling: Sampling, *, batch_tokens: int = 0
) -> list[_Text]:
    """The same texts, in order, with this model's log-probs, warped as when the text was drawn.

    A token that this model's own top-k or top-p would have removed has log-prob -inf, never a guess. Greedy
    text has log-prob 0 throughout and is returned as it is. The model is usually the target in full
    precision, where a runtime wrote with fewer bits; `batch_tokens` are positions in one pass, padding
    included (0 chooses by device).
    """
    scored = list(written)
    if sampling.temperature == 0:
        return scored
    decoder, head = output_head(model)

    def score_piece(chosen: Sequence[int]) -> None:
        hidden_ND = torch.cat(response_hidden(decoder, [written[i] for i in chosen], model.device))
        tokens = [token for i in chosen for token in written[i].response_ids]
        logprobs = iter(token_logprobs(head, hidden_ND, tokens, sampling).tolist())
        for i in chosen:
            scored[i] = replace(written[i], logprobs=list(islice(logprobs, len(written[i].response_ids))))

    pass_by_pass(written, model.device, score_piece, batch_tokens)
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
        return score(self.model, self.engine.generate(prompts, sampling, max_new_tokens, seed), sampling)
