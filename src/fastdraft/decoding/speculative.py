"""Speculative decoding: a draft or prompt lookup proposes, the target verifies, the text is the target's own.

Conventions by which everything here is counted: batch 1; the first round proposes straight from the prompt;
a round of the draft proposes K tokens, one of lookup what it finds, one without a find nothing; what stands
beyond the end of the text is discarded and not counted as accepted; the end token counts as generated. Shape
suffixes: K proposals, E = K + 1, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdraft.decoding.proposers import (
    DraftProposals,
    LookupProposals,
    Proposal,
    ProposerKind,
    ProposesTokens,
)
from fastdraft.decoding.reader import Readable, Reader
from fastdraft.errors import RecipeError
from fastdraft.functional.acceptance import Counts, add_counts
from fastdraft.functional.generation import Generation, Sampling, check_prompts
from fastdraft.functional.sampling import likeliest, precise, probabilities, token_at
from fastdraft.functional.verification import verify, verify_certain
from fastdraft.modeling.vocabulary import Vocabulary

_NOTHING = Proposal("", 0)


@dataclass(frozen=True)
class Round:
    """What one pass of the target added to the text."""

    tokens: list[int]  # accepted proposals, then the target's token unless the text ended before it
    logprobs: list[float]  # of each token under the target's sampling distribution
    num_accepted: int  # how many of `tokens`, from the front, were proposals
    num_examined: int  # proposals inside the text that were decided on
    # Over the examined places, of sum_v min(target_probs, draft_probs); the same in expectation where
    # proposals are certain: how many were accepted.
    overlap_sum: float
    num_speculative_tokens: int  # the most that a round of this text may propose
    num_proposed: int | None = None  # None: all of these
    proposer: str = "draft"  # or lookup; empty: nothing was proposed

    @property
    def counts(self) -> Counts:
        """This round alone, as counts."""
        k, accepted, examined = self.num_speculative_tokens, self.num_accepted, float(self.num_examined)
        proposed = float(k if self.num_proposed is None else self.num_proposed)
        per_pos, written = tuple(float(j < accepted) for j in range(k)), float(len(self.tokens))
        return Counts(1.0, proposed, float(accepted), per_pos, examined, written, self.overlap_sum, examined)


@dataclass(frozen=True)
class SpeculativeResult:
    """One text, how it came about, and the counts."""

    generation: Generation
    rounds: list[Round]

    @property
    def counts(self) -> Counts:
        return add_counts(r.counts for r in self.rounds)

    @property
    def accepted(self) -> list[str]:
        """For each response token, what proposed it, draft or lookup; empty for the target's own."""
        return [by for r in self.rounds for by in proposers(r)]

    @property
    def num_caught_up(self) -> int:
        """Tokens of lookup's rounds that the draft reads in the first pass of a later round of its own."""
        drafted = [place for place, r in enumerate(self.rounds) if r.proposer == "draft"]
        before = self.rounds[: drafted[-1]] if drafted else []
        return sum(len(r.tokens) for r in before if r.proposer != "draft")


def proposers(found: Round) -> list[str]:
    """For each token of a round, what proposed it, draft or lookup; empty for the target's own."""
    own = len(found.tokens) - found.num_accepted
    return [found.proposer] * found.num_accepted + [""] * own


@dataclass(frozen=True)
class _Text:
    """A text while it is being written."""

    target: Reader
    proposers: Sequence[ProposesTokens]  # the first that has something makes the round
    ids: Tensor  # [T], with room for the answer and a round beyond it
    sampling: Sampling
    generator: torch.Generator
    uniform: Tensor  # [T], for the target's token at every place, whatever is proposed there


class SpeculativeDecoder:
    """Writes text as the target does, with fewer passes of the target.

    Args:
        target: The model whose text is wanted.
        draft: The model that proposes; same vocabulary, same device. Not used by lookup alone.
        vocabulary: The shared vocabulary: which ids end a text, which are padding.
        num_speculative_tokens: K, proposals in each round; at least 1.
        draft_temperature: The draft's own where the target samples; None: the target's; 0: proposes
            greedily. Any value leaves the text's distribution unchanged. Where the target is greedy the draft
            always is.
        proposer: What proposes; None: nothing, and the target writes alone.
        num_lookup_tokens: The most that a round of lookup proposes; None: K.

    Where proposals are certain (lookup, a greedy draft) and where there are none, a seed gives the same text,
    sampled or greedy, as far as the passes' rounding goes.
    """

    def __init__(
        self,
        target: Readable,
        draft: Readable | None,
        vocabulary: Vocabulary,
        num_speculative_tokens: int,
        draft_temperature: float | None = None,
        *,
        proposer: ProposerKind | None = "draft",
        num_lookup_tokens: int | None = None,
    ) -> None:
        num_lookup_tokens = num_speculative_tokens if num_lookup_tokens is None else num_lookup_tokens
        if proposer and num_speculative_tokens < 1:
            raise RecipeError(f"num_speculative_tokens: {num_speculative_tokens}, must be at least 1")
        if proposer and num_lookup_tokens < 1:
            raise RecipeError(f"num_lookup_tokens: {num_lookup_tokens}, must be at least 1")
        if draft_temperature is not None and draft_temperature < 0:
            raise RecipeError(f"draft_temperature: {draft_temperature}, must not be negative")
        self.drafts, self.looks_up = (
            proposer in ("draft", "lookup_draft"),
            proposer in ("lookup", "lookup_draft"),
        )
        if self.drafts and draft is None:
            raise RecipeError(f"draft: missing; the proposer {proposer} must have one")
        self.target, self.draft, self.vocabulary = target, draft if self.drafts else None, vocabulary
        self.num_speculative_tokens, self.draft_temperature = num_speculative_tokens, draft_temperature
        self.num_lookup_tokens = num_lookup_tokens
        self.most_proposed = max(self.drafts * num_speculative_tokens, self.looks_up * num_lookup_tokens)
        self._eos = frozenset(vocabulary.eos_token_ids)
        self._columns = None if self.draft is None else self.draft.columns
        missing = torch.tensor(vocabulary.missing_ids, dtype=torch.long, device=target.device)
        if self._columns is not None:
            missing = torch.isin(self._columns, missing).nonzero().squeeze(-1)
        self._missing = missing if len(missing) else None

    @property
    def context_length(self) -> int:
        """Tokens that the models can read: prompt and answer together."""
        return min(model.context_length for model in (self.target, self.draft) if model is not None)

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
        length, end = len(prompt_ids), len(prompt_ids) + max_new_tokens
        text = self._begin(prompt_ids, sampling, end + self.most_proposed + 1, seed)
        while length < end:
            with torch.inference_mode():
                found = self._round(text, length, end)
            yield found
            length += len(found.tokens)
            if found.tokens[-1] in self._eos:
                return

    def _begin(self, prompt_ids: list[int], sampling: Sampling, capacity: int, seed: int) -> _Text:
        """A text of its prompt alone, with fresh readers."""
        device, proposers = self.target.device, list[ProposesTokens]()
        ids_T = torch.zeros(capacity, dtype=torch.long, device=device)
        ids_T[: len(prompt_ids)] = torch.tensor(prompt_ids, device=device)
        generator = torch.Generator(device=device).manual_seed(seed)
        uniform_T = torch.rand(capacity, dtype=precise(device), device=device, generator=generator)
        if self.looks_up:
            proposers.append(LookupProposals(prompt_ids, self.num_lookup_tokens))
        if self.draft is not None:
            drawing, temperature = sampling, self.draft_temperature
            if temperature is not None and sampling.temperature > 0:
                drawing = replace(sampling, temperature=temperature)
            reader, k = self.draft.reader(capacity), self.num_speculative_tokens
            of_vocabulary = self._columns, self._missing, self.vocabulary.size
            proposers.append(DraftProposals(reader, k, drawing, generator, *of_vocabulary))
        return _Text(self.target.reader(capacity), proposers, ids_T, sampling, generator, uniform_T)

    def _round(self, text: _Text, length: int, end: int) -> Round:
        """One proposal and verification, written into `ids_T`; the target stays one token behind the end."""
        ids_T, sampling = text.ids, text.sampling
        # Proposals beyond the models' context would be discarded, and some cannot be read.
        room = min(self.most_proposed, self.context_length - length)
        proposals = (each.propose(ids_T, length, room) for each in text.proposers)
        proposal = next(filter(None, proposals), _NOTHING)
        k, draft_probs_KV = min(proposal.num_proposed, room), proposal.probs
        logits_EV = text.target.read(ids_T[text.target.length : length + k], keep=k + 1)
        proposed_K, target_probs_EV = ids_T[length : length + k], None
        if sampling.temperature > 0:
            target_probs_EV = probabilities(logits_EV, sampling.temperature, sampling.top_k, sampling.top_p)
        if target_probs_EV is None:
            accepted_count, written_E = verify_certain(likeliest(logits_EV), proposed_K)
        elif draft_probs_KV is None:
            drawn_E = token_at(target_probs_EV, text.uniform[length : length + k + 1])
            accepted_count, written_E = verify_certain(drawn_E, proposed_K)
        else:
            accepted_count, written_E = verify(target_probs_EV, draft_probs_KV, proposed_K, text.generator)
        ids_T[length : length + k + 1] = written_E
        fetched = _fetch(accepted_count, written_E, target_probs_EV, draft_probs_KV)
        num_accepted, ids, logprobs, overlaps = fetched
        tokens = ids[: min(num_accepted + 1, end - length)]
        tokens = tokens[: next((place for place, token in enumerate(tokens, 1) if token in self._eos), None)]
        text.target.take_back(length + num_accepted)
        for each in text.proposers:
            each.go_on(length, tokens)
        # The one refused stands at num_accepted; if the text ended before it, nobody asked.
        accepted, examined = min(num_accepted, len(tokens)), min(num_accepted + 1, k, len(tokens))
        overlap, logprobs = sum(overlaps[:examined]) if overlaps else float(accepted), logprobs[: len(tokens)]
        counted = self.most_proposed, proposal.num_proposed, proposal.proposer
        return Round(tokens, logprobs, accepted, examined, overlap, *counted)


def _fetch(
    num_accepted: Tensor, ids_E: Tensor, target_probs_EV: Tensor | None, draft_probs_KV: Tensor | None
) -> tuple[int, list[int], list[float], list[float]]:
    """In one transfer what a round needs: num_accepted, ids and log-probs of E places, overlaps of K."""
    if target_probs_EV is None:
        count, *ids = torch.cat([num_accepted[None], ids_E]).tolist()
        return count, ids, [0.0] * len(ids), []
    logprobs_E = target_probs_EV.gather(-1, ids_E[:, None]).squeeze(-1).log()
    # As float32, which holds every id below 2^24: vocabularies are a hundred times smaller.
    parts = [num_accepted[None].float(), ids_E.float(), logprobs_E]
    if draft_probs_KV is not None:
        parts.append(torch.minimum(target_probs_EV[:-1], draft_probs_KV).sum(-1))
    count, *found = torch.cat(parts).tolist()
    places = len(ids_E)
    return int(count), [int(i) for i in found[:places]], found[places : 2 * places], found[2 * places :]
