"""Plain generation, many prompts at a time: the target writes, one token per pass, with the log-prob of each.

    answers = generate_batch(model, prompts, Sampling(0.6), max_new_tokens=64, eos_ids={3},
    generator=generator)

Shape suffixes: B rows in the batch, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdraft.decoding.cache import grouped_attention, new_cache
from fastdraft.errors import Halving
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.functional.sampling import token_at, warp

# Finished rows leave the batch when they are at least this share of it: dropping copies the cache.
DROP_SHARE = 0.15
GIVE_UP_EVERY = 16  # tokens between two looks at whether an answer is worth going on with
PADDING_ID = 0


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: set[int] | frozenset[int],
    generator: torch.Generator,
    give_up: Callable[[list[int]], bool] | None = None,
    halving: Halving | None = None,
) -> list[Generation]:
    """One answer for each prompt; reproducible for equal prompts, order, generator state and threads.

    Where the model's logits are not finite the answer ends with that step's token and a NaN log-prob.
    `generator` lives on the CPU; `give_up` is asked now and then for each unfinished answer so far, True ends
    it there as if the limit was reached; `halving` writes the batch in pieces where memory runs out, every
    row from the same random numbers.
    """
    if not prompts:
        return []
    if max_new_tokens < 1 or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token, and max_new_tokens must be at least 1")
    answers: list[Generation] = []
    # By step, one for each row whether or not it still writes: dropped rows and pieces change no other row's
    # text.
    draws: list[Tensor] = []

    def write(piece: Sequence[int]) -> None:
        rows = torch.tensor(piece)

        def random(step: int, places_B: Tensor) -> Tensor:
            if step == len(draws):
                draws.append(torch.rand(len(prompts), generator=generator, dtype=torch.float64))
            return draws[step][rows[places_B]]

        chosen = [prompts[i] for i in piece]
        answers.extend(_write(model, chosen, sampling, max_new_tokens, frozenset(eos_ids), random, give_up))

    (halving or Halving("batch_rows"))(range(len(prompts)), write)
    return answers


@torch.inference_mode()
def _write(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    random: Callable[[int, Tensor], Tensor],
    give_up: Callable[[list[int]], bool] | None,
) -> list[Generation]:
    """The answers of one piece of a batch; `random(step, places)` gives the numbers of these prompts."""
    count, device = len(prompts), model.device
    ids_BT, mask_BT = (each.to(device) for each in pad_left(prompts, max_new_tokens))
    width = ids_BT.shape[1]
    positions_BT = (mask_BT[:, :width].cumsum(-1) - 1).clamp(min=0)
    cache = new_cache(width + max_new_tokens)
    # For each row of the batch its place among the prompts; again on the CPU, where the random numbers are
    # drawn.
    rows_B, places_B = torch.arange(count, device=device), torch.arange(count)
    done_B = torch.zeros(count, dtype=torch.bool, device=device)
    tokens_BT = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
    logprobs_BT = torch.zeros(count, max_new_tokens, device=device)
    lengths, eos = [max_new_tokens] * count, torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
    with grouped_attention(model):
        for step in range(max_new_tokens):
            logits_BTV = model(
                input_ids=ids_BT,
                attention_mask=mask_BT[:, :width],
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            random_B = random(step, places_B) if sampling.temperature > 0 else None
            token_B, logprob_B = draw_tokens(logits_BTV[:, -1], sampling, random_B)
            tokens_BT[rows_B, step], logprobs_BT[rows_B, step] = token_B, logprob_B
            done_B = done_B | torch.isin(token_B, eos) | logprob_B.isnan()
            if give_up and (step + 1) % GIVE_UP_EVERY == 0:
                texts, done = tokens_BT[rows_B, : step + 1].tolist(), done_B.tolist()
                ends = [not each and give_up(text) for each, text in zip(done, texts, strict=True)]
                for row in rows_B[torch.tensor(ends, device=device)].tolist():
                    lengths[row] = step + 1
                done_B = done_B | torch.tensor(ends, device=device)
            finished = int(done_B.sum())
            if finished == len(rows_B):
                break
            ids_BT, positions_BT, width = token_B[:, None], positions_BT[:, -1:] + 1, width + 1
            if finished >= DROP_SHARE * len(rows_B):
                keep_B = (~done_B).nonzero().squeeze(-1)
                cache.batch_select_indices(keep_B)
                rows_B, done_B, mask_BT = rows_B[keep_B], done_B[keep_B], mask_BT[keep_B]
                ids_BT, positions_BT, places_B = ids_BT[keep_B], positions_BT[keep_B], rows_B.cpu()
    answers = []
    written = zip(prompts, tokens_BT.tolist(), logprobs_BT.tolist(), lengths, strict=True)
    for prompt, tokens, logprobs, length in written:
        steps = zip(range(1, length + 1), tokens, logprobs, strict=False)
        end = next((n for n, token, logprob in steps if token in eos_ids or math.isnan(logprob)), length)
        reason: Any = "stop" if tokens[end - 1] in eos_ids else "length"
        answers.append(Generation(list(prompt), tokens[:end], logprobs[:end], reason))
    return answers


def pad_left(prompts: Sequence[Sequence[int]], extra: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] padded on the left, and their mask [B, T + extra] (1: a real token), both int64."""
    width = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), width), PADDING_ID, dtype=torch.long)
    mask_BT = torch.ones(len(prompts), width + extra, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask_BT[row, : width - len(prompt)] = 0
    return ids_BT, mask_BT


def draw_tokens(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Next token of each row and its log-prob under the distribution drawn from (0 when greedy).

    The token is the inverse of the cumulative distribution at `uniform_B`, float64 in [0, 1); the log-prob is
    NaN where the logits are not finite. Nothing is masked, the ids that the tokenizer lacks neither: the text
    is the model's own.
    """
    if sampling.temperature == 0 or uniform_B is None:
        best_B = logits_BV.max(-1)
        return best_B.indices, torch.where(best_B.values.isfinite(), 0.0, math.nan)
    probs_BV = warp(logits_BV, sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1)
    token_B = token_at(probs_BV, uniform_B)
    return token_B, probs_BV.gather(-1, token_B[:, None]).squeeze(-1).log()
