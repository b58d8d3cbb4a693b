"""Speculative decoding: the draft proposes, the target verifies, the text is the target's own.

Conventions by which everything here is counted: batch 1; the first round drafts straight from the prompt;
every round proposes K tokens; what stands beyond the end of the text is discarded and not counted as
accepted; the end token counts as generated. Shape suffixes: K proposals, E = K + 1, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdraft.decoding.reader import Readable, Reader
from fastdraft.errors import RecipeError
from fastdraft.functional.acceptance import Counts, add_counts
from fastdraft.functional.generation import Generation, Sampling, check_prompts
from fastdraft.functional.sampling import draw, mask_ids, probabilities
from fastdraft.functional.verification import verify, verify_greedy
from fastdraft.modeling.vocabulary import Vocabulary


@dataclass(frozen=True)
class Round:
    """What one pass of the target added to the text."""

    tokens: list[int]  # accepted proposals, then the target's token unless the text ended before it
    logprobs: list[float]  # of each token under the target's sampling distribution
    num_accepted: int  # how many of `tokens`, from the front, were proposals
    num_examined: int  # proposals inside the text that were decided on
    overlap_sum: float  # over the examined places, of sum_v min(target_probs, draft_probs)
    num_speculative_tokens: int

    @property
    def counts(self) -> Counts:
        """This round alone, as counts."""
        k, accepted, examined = self.num_speculative_tokens, self.num_accepted, float(self.num_examined)
        per_pos, written = tuple(float(j < accepted) for j in range(k)), float(len(self.tokens))
        return Counts(1.0, float(k), float(accepted), per_pos, examined, written, self.overlap_sum, examined)


@dataclass(frozen=True)
class SpeculativeResult:
    """One text, how it came about, and the counts."""

    generation: Generation
    rounds: list[Round]

    @property
    def counts(self) -> Counts:
        return add_counts(r.counts for r in self.rounds)

    @property
    def accepted(self) -> list[bool]:
        """For each response token, whether the draft proposed it."""
        return [place < r.num_accepted for r in self.rounds for place in range(len(r.tokens))]


@dataclass(frozen=True)
class _Text:
    """A text while it is being written."""

    target: Reader
    draft: Reader
    ids: Tensor  # [T], with room for the answer and a round beyond it
    sampling: Sampling
    generator: torch.Generator


class SpeculativeDecoder:
    """Writes text as the target does, with fewer passes of the target.

    Args:
        target: The model whose text is wanted.
        draft: The model that proposes; same vocabulary, same device.
        vocabulary: The shared vocabulary: which ids end a text, which are padding.
        num_speculative_tokens: K, proposals in each round; at least 1.
        draft_temperature: The draft's own where the target samples; None: the target's; 0: proposes
            greedily. Any value leaves the text's distribution unchanged. Where the target is greedy the draft
            always is.
    """

    def __init__(
        self,
        target: Readable,
        draft: Readable,
        vocabulary: Vocabulary,
        num_speculative_tokens: int,
        draft_temperature: float | None = None,
    ) -> None:
        if num_speculative_tokens < 1:
            raise RecipeError(f"num_speculative_tokens: {num_speculative_tokens}, must be at least 1")
        if draft_temperature is not None and draft_temperature < 0:
            raise RecipeError(f"draft_temperature: {draft_temperature}, must not be negative")
        self.target, self.draft, self.vocabulary = target, draft, vocabulary
        self.num_speculative_tokens, self.draft_temperature = num_speculative_tokens, draft_temperature
        self._eos = frozenset(vocabulary.eos_token_ids)
        missing = vocabulary.missing_ids
        self._missing = torch.tensor(missing, dtype=torch.long, device=draft.device) if missing else None

    @property
    def context_length(self) -> int:
        """Tokens that both models can read: prompt and answer together."""
        return min(self.target.context_length, self.draft.context_length)

    def generate(
        self, prompt_ids: list[int], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> SpeculativeResult:
        """One text, the same for the same arguments; DataError where the prompt does not fit."""
        rounds = list(self.rounds(prompt_ids, sampling, max_new_tokens, seed))
        response = [token for r in rounds for token in r.tokens]
        logprobs = [value for r in rounds for value in r.logprobs]
        reason: Any = "stop" if response and response[-1] in self._eos else "length"
        return SpeculativeResult(Generation(list(prompt_ids), response, logprobs, reason), rounds)

    def rounds(
        self, prompt_ids: list[int], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> Iterator[Round]:
        """The text round by round, as it is written."""
        check_prompts([prompt_ids], max_new_tokens, self.context_length)
        device, length = self.target.device, len(prompt_ids)
        end = length + max_new_tokens
        capacity = end + self.num_speculative_tokens + 1
        ids_T = torch.zeros(capacity, dtype=torch.long, device=device)
        ids_T[:length] = torch.tensor(prompt_ids, device=device)
        generator = torch.Generator(device=device).manual_seed(seed)
        text = _Text(self.target.reader(capacity), self.draft.reader(capacity), ids_T, sampling, generator)
        while length < end:
            with torch.inference_mode():
                found = self._round(text, length, end)
            yield found
            length += len(found.tokens)
            if found.tokens[-1] in self._eos:
                return

    def _round(self, text: _Text, length: int, end: int) -> Round:
        """One proposal and verification, written into `ids_T`; both readers stay one token behind the end.

        After K acceptances the draft has not read its own last proposal; it reads it next time, with the
        bonus token.
        """
        ids_T, sampling = text.ids, text.sampling
        # Proposals beyond the models' context would be discarded, and some cannot be read.
        k = min(self.num_speculative_tokens, self.context_length - length)
        draft_probs_KV = self._propose(text, length, k)
        logits_EV = text.target.read(ids_T[text.target.length : length + k], keep=k + 1)
        proposed_K = ids_T[length : length + k]
        if sampling.temperature == 0:
            target_probs_EV = None
            accepted_count, final_1 = verify_greedy(logits_EV.argmax(-1), proposed_K)
        else:
            target_probs_EV = probabilities(logits_EV, sampling.temperature, sampling.top_k, sampling.top_p)
            accepted_count, final_1 = verify(target_probs_EV, draft_probs_KV, proposed_K, text.generator)
        written_E = ids_T[length : length + k + 1]
        written_E.scatter_(0, accepted_count[None], final_1)
        fetched = _fetch(accepted_count, written_E, target_probs_EV, draft_probs_KV)
        num_accepted, ids, logprobs, overlaps = fetched
        tokens = ids[: min(num_accepted + 1, end - length)]
        tokens = tokens[: next((place for place, token in enumerate(tokens, 1) if token in self._eos), None)]
        text.target.take_back(length + num_accepted)
        text.draft.take_back(length + num_accepted)
        # The one refused stands at num_accepted; if the text ended before it, nobody asked.
        accepted, examined = min(num_accepted, len(tokens)), min(num_accepted + 1, k, len(tokens))
        overlap, logprobs = sum(overlaps[:examined]) if overlaps else float(accepted), logprobs[: len(tokens)]
        return Round(tokens, logprobs, accepted, examined, overlap, self.num_speculative_tokens)

    def _propose(self, text: _Text, length: int, num_proposals: int) -> Tensor:
        """Writes the proposals from `length` on; the distributions they were drawn from, [K, V], if any."""
        draft, ids_T, sampling = text.draft, text.ids, text.sampling
        temperature = sampling.temperature if self.draft_temperature is None else self.draft_temperature
        drawn_from: list[Tensor] = []
        for place in range(length, length + num_proposals):
            logits_1V = mask_ids(draft.read(ids_T[draft.length : place]), self._missing)
            if sampling.temperature == 0:
                ids_T[place] = logits_1V[0].argmax(-1)
                continue
            probs_1V = probabilities(logits_1V, temperature, sampling.top_k, sampling.top_p)
            ids_T[place] = draw(probs_1V, text.generator)[0]
            drawn_from.append(probs_1V)
        return torch.cat(drawn_from) if drawn_from else torch.empty(0)


def _fetch(
    num_accepted: Tensor, ids_E: Tensor, target_probs_EV: Tensor | None, draft_probs_KV: Tensor
) -> tuple[int, list[int], list[float], list[float]]:
    """In one transfer what a round needs: num_accepted, ids and log-probs of E places, overlaps of K."""
    if target_probs_EV is None:
        count, *ids = torch.cat([num_accepted[None], ids_E]).tolist()
        return count, ids, [0.0] * len(ids), []
    logprobs_E = target_probs_EV.gather(-1, ids_E[:, None]).squeeze(-1).log()
    overlap_K = torch.minimum(target_probs_EV[:-1], draft_probs_KV).sum(-1)
    # As float32, which holds every id below 2^24: vocabularies are a hundred times smaller.
    count, *found = torch.cat([num_accepted[None].float(), ids_E.float(), logprobs_E, overlap_K]).tolist()
    places = len(ids_E)
    return int(count), [int(i) for i in found[:places]], found[places : 2 * places], found[2 * places :]
