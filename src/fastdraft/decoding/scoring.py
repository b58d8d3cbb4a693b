"""Log-probs of text that was already written: one teacher-forced pass of a model over prompt and response.

Decides that the distribution is warped as when the text was drawn (temperature, top-k, top-p), so that the result can
stand where the writer's own log-probs would; that a token which the warping removed gets -inf, never a guess; and that
only response positions go through the output head, a few rows of logits at a time.

Shape suffixes: N response positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdraft.decoding.replay import LOGITS_HELD, pass_by_pass, response_hidden
from fastdraft.functional.sampling import warp
from fastdraft.interfaces import Engine, Generation, Sampling
from fastdraft.modeling.head import OutputHead, output_head


@torch.inference_mode()
def score(model: PreTrainedModel, written: Sequence[Generation], sampling: Sampling, *, batch_tokens: int = 8192) -> list[Generation]:
    """The same texts with this model's log-probs.

    Args:
        model: In evaluation mode; usually the target in full precision, where a runtime wrote with fewer bits.
        written: Texts drawn with `sampling`, in any order.
        sampling: How they were drawn. Greedy text has log-prob 0 throughout and is returned as it is.
        batch_tokens: Positions in one pass, padding included.

    Returns:
        Texts in the order given; a token that this model's own top-k or top-p would have removed has log-prob -inf.
    """
    if sampling.temperature == 0:
        return list(written)
    scored = list(written)
    decoder, head = output_head(model)

    def score_piece(chosen: Sequence[int]) -> None:
        hidden = response_hidden(decoder, [written[i] for i in chosen], model.device)
        for index, hidden_ND in zip(chosen, hidden, strict=True):
            scored[index] = replace(written[index], logprobs=_logprobs(hidden_ND, head, written[index].response_ids, sampling))

    pass_by_pass(written, batch_tokens, score_piece)
    return scored


def _logprobs(hidden_ND: Tensor, head: OutputHead, response_ids: list[int], sampling: Sampling) -> list[float]:
    tokens_N = torch.tensor(response_ids, dtype=torch.long, device=hidden_ND.device)
    step = max(1, LOGITS_HELD // head.vocab_size)
    found: list[float] = []
    for start in range(0, len(response_ids), step):
        logits_NV = warp(head.logits(hidden_ND[start : start + step]), sampling.temperature, sampling.top_k, sampling.top_p)
        chosen_N = logits_NV.gather(-1, tokens_N[start : start + step, None]).squeeze(-1)
        found += (chosen_N - logits_NV.logsumexp(-1)).tolist()
    return found


class ScoringEngine:
    """An engine whose log-probs are replaced by a model's own: the `Engine` protocol around another engine.

    Args:
        engine: Writes the text.
        model: Scores it.
    """

    def __init__(self, engine: Engine, model: PreTrainedModel) -> None:
        self.engine, self.model, self.name = engine, model, engine.name

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_new_tokens: int, seed: int) -> list[Generation]:
        """The engine's answers with the model's log-probs; reproducible as the engine is."""
        return score(self.model, self.engine.generate(prompts, sampling, max_new_tokens, seed), sampling)
