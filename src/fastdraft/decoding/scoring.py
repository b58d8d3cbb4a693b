"""Log-probs of text that was already written: one teacher-forced pass of a model over prompt and response.

Decides that the distribution is warped as when the text was drawn (temperature, top-k, top-p), so that the result can
stand where the writer's own log-probs would; that a token which the warping removed gets -inf, never a guess; and that
only response positions go through the output head, those of all texts of a batch together, as many at a time as fit.

Shape suffixes: N response positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdraft.decoding.replay import (
    batch_tokens_of,
    chosen_logprobs,
    held_slices,
    pass_by_pass,
    response_hidden,
)
from fastdraft.functional.generation import Engine, Generation, Sampling
from fastdraft.functional.sampling import warp
from fastdraft.modeling.head import OutputHead, output_head


@torch.inference_mode()
def score(
    model: PreTrainedModel, written: Sequence[Generation], sampling: Sampling, *, batch_tokens: int = 0
) -> list[Generation]:
    """The same texts with this model's log-probs.

    Args:
        model: In evaluation mode; usually the target in full precision, where a runtime wrote with fewer bits.
        written: Texts drawn with `sampling`, in any order.
        sampling: How they were drawn. Greedy text has log-prob 0 throughout and is returned as it is.
        batch_tokens: Positions in one pass, padding included; 0 chooses by device.

    Returns:
        Texts in the order given; a token that this model's own top-k or top-p would have removed has log-prob -inf.
    """
    if sampling.temperature == 0:
        return list(written)
    scored = list(written)
    decoder, head = output_head(model)

    def score_piece(chosen: Sequence[int]) -> None:
        hidden = response_hidden(decoder, [written[i] for i in chosen], model.device)
        logprobs = _logprobs(
            torch.cat(hidden), head, [token for i in chosen for token in written[i].response_ids], sampling
        )
        for index in chosen:
            scored[index] = replace(
                written[index], logprobs=list(islice(logprobs, len(written[index].response_ids)))
            )

    pass_by_pass(written, batch_tokens or batch_tokens_of(model.device), score_piece)
    return scored


def _logprobs(
    hidden_ND: Tensor, head: OutputHead, response_ids: list[int], sampling: Sampling
) -> Iterator[float]:
    """Of every response token of a batch, one row behind the other."""
    tokens_N = torch.tensor(response_ids, dtype=torch.long, device=hidden_ND.device)
    parts = [tokens_N.new_zeros(0, dtype=torch.float32)]
    for held in held_slices(tokens_N, head.vocab_size):
        logits_NV = warp(head.logits(hidden_ND[held]), sampling.temperature, sampling.top_k, sampling.top_p)
        parts.append(chosen_logprobs(logits_NV, tokens_N[held]))
    return iter(torch.cat(parts).tolist())


class ScoringEngine:
    """An engine whose log-probs are replaced by a model's own: the `Engine` protocol around another engine.

    Args:
        engine: Writes the text.
        model: Scores it.
    """

    def __init__(self, engine: Engine, model: PreTrainedModel) -> None:
        self.engine, self.model, self.name = engine, model, engine.name

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> list[Generation]:
        """The engine's answers with the model's log-probs; reproducible as the engine is."""
        return score(self.model, self.engine.generate(prompts, sampling, max_new_tokens, seed), sampling)
