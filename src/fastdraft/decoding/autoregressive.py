"""Plain generation, many prompts at a time: the target writes, one token per pass, with the log-prob of each.

    answers = generate_batch(model, prompts, Sampling(0.6), max_new_tokens=64, eos_ids={3}, generator=generator)

Shape suffixes: B rows in the batch, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdraft.decoding.cache import grouped_attention, new_cache
from fastdraft.errors import Halving
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.functional.sampling import token_at, warp

DROP_SHARE = 0.15
"""Finished rows are taken out of the batch when they are at least this share of it: dropping copies the cache."""
GIVE_UP_EVERY = 16
"""Tokens between two looks at whether an answer is worth going on with."""
PADDING_ID = 0


class _Batch:
    """The rows that still write: what the next pass needs of them, and where their text goes."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        ids_BT, mask_BT = pad_left(prompts, max_new_tokens)
        self.model, self.width = model, ids_BT.shape[1]
        self.ids_BT, self.mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
        self.positions_BT = (self.mask_BT[:, : self.width].cumsum(-1) - 1).clamp(min=0)
        self.rows_B = torch.arange(len(prompts), device=model.device)
        """For each row of the batch its place among the prompts."""
        self.places_B = torch.arange(len(prompts))
        """The same on the CPU, where the random numbers are drawn."""
        self.done_B = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
        self.cache = new_cache(self.width + max_new_tokens)

    def logits(self) -> Tensor:
        """One pass: logits [B, V] behind the last position; only that position goes through the output head."""
        logits_BTV: Tensor = self.model(
            input_ids=self.ids_BT,
            attention_mask=self.mask_BT[:, : self.width],
            position_ids=self.positions_BT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits_BTV[:, -1]

    def append(self, token_B: Tensor, done_B: Tensor) -> bool:
        """Makes `token_B` the next input and drops finished rows when they are many; False when no row is left."""
        self.done_B = self.done_B | done_B
        finished = int(self.done_B.sum())
        if finished == len(self.rows_B):
            return False
        self.ids_BT, self.positions_BT = token_B[:, None], self.positions_BT[:, -1:] + 1
        self.width += 1
        if finished >= DROP_SHARE * len(self.rows_B):
            keep_B = (~self.done_B).nonzero().squeeze(-1)
            self.cache.batch_select_indices(keep_B)
            for name in ("rows_B", "done_B", "mask_BT", "ids_BT", "positions_BT"):
                setattr(self, name, getattr(self, name)[keep_B])
            self.places_B = self.rows_B.cpu()
        return True


class _Draws:
    """A batch's random numbers, one for each row and step, from which a piece of the batch takes those of its own rows.

    They are drawn whether or not a row still writes, so that dropping finished rows, or writing the batch in pieces where
    memory is short, leaves every row's random numbers alone.
    """

    def __init__(self, generator: torch.Generator, rows: int) -> None:
        self.generator, self.rows = generator, rows
        self._begin = self._end = generator.get_state()
        self._most = 0

    def begin(self) -> None:
        """Goes back to the first step, for the next piece."""
        self.generator.set_state(self._begin)

    def step(self, piece: range) -> Tensor:
        """Float64 in [0, 1), one for each row of the piece."""
        return torch.rand(self.rows, generator=self.generator, dtype=torch.float64)[piece.start : piece.stop]

    def end(self, steps: int) -> None:
        """Leaves the generator as the longest piece left it, as the whole batch would have."""
        if steps > self._most:
            self._most, self._end = steps, self.generator.get_state()
        self.generator.set_state(self._end)


def generate_batch(  # noqa: PLR0917
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: set[int] | frozenset[int],
    generator: torch.Generator,
    give_up: Callable[[list[int]], bool] | None = None,
    halving: Halving | None = None,
) -> list[Generation]:
    """One answer for each prompt, in order; reproducible for equal prompts, order, generator state and threads.

    Where the model's logits are not finite the answer ends with that step's token and a NaN log-prob. `generator` lives on the
    CPU; `give_up` is asked now and then for each unfinished answer so far, True ends it there as if the limit was reached; `halving`
    writes the batch in pieces where memory runs out, every row from the same random numbers.
    """
    if not prompts:
        return []
    if max_new_tokens < 1 or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token, and max_new_tokens must be at least 1")
    answers: list[Generation] = []
    draws, eos = _Draws(generator, len(prompts)), frozenset(eos_ids)

    def write(piece: Sequence[int]) -> None:
        draws.begin()
        place = range(piece[0], piece[-1] + 1)
        chosen = [prompts[i] for i in piece]
        answers.extend(_write(model, chosen, sampling, max_new_tokens, eos, draws, place, give_up))

    (halving or Halving("batch_rows"))(range(len(prompts)), write)
    return answers


@torch.inference_mode()
def _write(  # noqa: PLR0917
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    draws: _Draws,
    place: range,
    give_up: Callable[[list[int]], bool] | None,
) -> list[Generation]:
    """The answers of one piece of a batch; `place` is where the piece stands in it."""
    count, device, steps = len(prompts), model.device, 0
    eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
    tokens_BT = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
    logprobs_BT = torch.zeros(count, max_new_tokens, device=device)
    lengths = [max_new_tokens] * count
    batch = _Batch(model, prompts, max_new_tokens)
    with grouped_attention(model):
        for step in range(max_new_tokens):
            random_B = draws.step(place)[batch.places_B] if sampling.temperature > 0 else None
            steps += 1
            token_B, logprob_B = draw_tokens(batch.logits(), sampling, random_B)
            tokens_BT[batch.rows_B, step], logprobs_BT[batch.rows_B, step] = token_B, logprob_B
            done_B = torch.isin(token_B, eos) | logprob_B.isnan()
            if give_up and (step + 1) % GIVE_UP_EVERY == 0:
                done_B = done_B | _given_up(batch, tokens_BT[:, : step + 1], give_up, lengths).to(device)
            if not batch.append(token_B, done_B):
                break
    draws.end(steps)
    answers = zip(prompts, tokens_BT.tolist(), logprobs_BT.tolist(), lengths, strict=True)
    return [
        _generation(prompt, tokens[:length], logprobs[:length], eos_ids)
        for prompt, tokens, logprobs, length in answers
    ]


def _given_up(
    batch: _Batch, tokens_BT: Tensor, give_up: Callable[[list[int]], bool], lengths: list[int]
) -> Tensor:
    """Which rows of the batch end here although nothing in them says so; notes their lengths."""
    rows, done = batch.rows_B.tolist(), batch.done_B.tolist()
    texts = tokens_BT[batch.rows_B].tolist()
    ends = [not finished and give_up(text) for finished, text in zip(done, texts, strict=True)]
    for row, end, text in zip(rows, ends, texts, strict=True):
        if end:
            lengths[row] = len(text)
    return torch.tensor(ends)


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
    """Next token of each row and the natural log of its probability under the distribution drawn from (0 when greedy).

    The token is the inverse of the cumulative distribution at `uniform_B`, float64 in [0, 1); the log-prob is NaN where the logits
    are not finite. Nothing is masked, the ids that the tokenizer lacks neither: the text is the model's own.
    """
    if sampling.temperature == 0 or uniform_B is None:
        best_B = logits_BV.max(-1)
        return best_B.indices, torch.where(best_B.values.isfinite(), 0.0, math.nan)
    probs_BV = warp(logits_BV, sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1)
    token_B = token_at(probs_BV, uniform_B)
    return token_B, probs_BV.gather(-1, token_B[:, None]).squeeze(-1).log()


def _generation(
    prompt: Sequence[int], tokens: list[int], logprobs: list[float], eos_ids: frozenset[int]
) -> Generation:
    for length, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True), 1):
        if token in eos_ids or math.isnan(logprob):
            reason = "stop" if token in eos_ids else "length"
            return Generation(list(prompt), tokens[:length], logprobs[:length], reason)
    return Generation(list(prompt), tokens, logprobs, "length")
