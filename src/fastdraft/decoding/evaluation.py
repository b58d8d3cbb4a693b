"""Evaluates one draft against one target: the target's own texts, replay over them, exact runs, and the check between.

Decides what the two ways of evaluation share: the target's texts are written once and every draft is replayed over the
same ones; an exact run has one seed for each prompt; a greedy exact run must give the target's own text, and where it does
not, how near the two tokens were in the target's eyes is reported (in low precision, batching alone may flip a tie).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fastdraft.data.filters import is_looping
from fastdraft.data.rows import SyntheticRow, ids_hash
from fastdraft.decoding.figures import CountsTable, counts_table
from fastdraft.decoding.replay import accept_probabilities, counts_of_accepts
from fastdraft.decoding.speculative import SpeculativeDecoder, SpeculativeResult
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.functional.positions import counts_by_bucket
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.run_folder import digest

HEADLINE_K = 3
NEAR_TIE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}
"""Gap in log-prob below which two tokens count as tied, by the target's precision."""


def derive_seed(*parts: object) -> int:
    """A seed that follows from its parts alone, so that the order of work does not matter."""
    return int(digest(list(parts)), 16) % 2**31


def as_row(generation: Generation, sampling: Sampling, source: str) -> SyntheticRow:
    """A generation in the form in which it is kept and replayed."""
    key, row_id = ids_hash(generation.prompt_ids), ids_hash(generation.prompt_ids, generation.response_ids)
    return SyntheticRow(
        row_id=row_id,
        source=source,
        prompt_key=key,
        prompt_ids=generation.prompt_ids,
        response_ids=generation.response_ids,
        logprobs=generation.logprobs,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        finish_reason=generation.finish_reason,
    )


@dataclass(frozen=True)
class Replayed:
    """What replay found over some texts."""

    by_k: dict[int, CountsTable]
    """Counts of every text, for each K."""
    by_position: np.ndarray[Any, np.dtype[np.float64]]
    """Of every text in every bucket of positions (functional/positions.py) at the headline K: [texts, buckets, columns]."""


def replay_tables(
    draft: PreTrainedModel,
    rows: Sequence[SyntheticRow],
    num_speculative_tokens: Sequence[int],
    vocabulary: Vocabulary,
    draft_temperature: float | None = None,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Replayed:
    """The expected counts of every row, by replay."""
    accepts = accept_probabilities(draft, rows, vocabulary, draft_temperature, on_batch=on_batch)
    counts = counts_of_accepts(accepts, num_speculative_tokens)
    by_position = counts_by_bucket(
        accepts, [len(row.prompt_ids) for row in rows], nearest(num_speculative_tokens)
    )
    return Replayed(
        {k: counts_table([by_k[k] for by_k in counts]) for k in num_speculative_tokens}, by_position
    )


def nearest(num_speculative_tokens: Sequence[int]) -> int:
    """The headline K: 3, or the one nearest to it."""
    return min(num_speculative_tokens, key=lambda k: (abs(k - HEADLINE_K), k))


def exact_runs(
    decoder: SpeculativeDecoder,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
    seed: int,
    *,
    on_prompt: Callable[[int], None] | None = None,
) -> list[SpeculativeResult]:
    """Real speculative decoding of each prompt, one after the other."""
    results = []
    for index, prompt in enumerate(prompts):
        results.append(decoder.generate(prompt, sampling, max_new_tokens, derive_seed(seed, index)))
        if on_prompt:
            on_prompt(1)
    return results


@dataclass(frozen=True)
class Difference:
    """A greedy exact run that left the target's own text."""

    place: int
    """The first response token that differs."""
    gap: float
    """How much more likely, in log-prob, the target finds its favourite of the two tokens when asked again in one pass."""
    near_tie: bool


def greedy_difference(
    target: PreTrainedModel, own: SyntheticRow, response_ids: Sequence[int]
) -> Difference | None:
    """None when `response_ids` is the target's own greedy text."""
    pairs = list(zip(own.response_ids, response_ids, strict=False))
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None:
        return (
            None
            if len(own.response_ids) == len(response_ids)
            else Difference(len(pairs), float("inf"), False)
        )
    ids = torch.tensor([own.prompt_ids + own.response_ids[:place]], device=target.device)
    with torch.inference_mode():
        logprobs_V = (
            target(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
        )
    gap = abs(float(logprobs_V[own.response_ids[place]] - logprobs_V[response_ids[place]]))
    return Difference(place, gap, gap < NEAR_TIE.get(target.dtype, NEAR_TIE[torch.bfloat16]))


def looping_flags(rows: Sequence[SyntheticRow]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """For each row, whether its text ran into a loop."""
    return np.array([is_looping(row.response_ids) for row in rows], dtype=bool)
