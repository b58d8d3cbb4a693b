"""What proposes tokens while one text is written: prompt lookup, a draft model, or one behind the other.

Shape suffixes: T tokens, K proposals, V vocabulary, C the draft's columns of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastdraft.decoding.reader import Reader
from fastdraft.functional.generation import Sampling
from fastdraft.functional.lookup import PromptLookup
from fastdraft.functional.sampling import draw, likeliest, mask_ids, probabilities

# draft: a draft model; lookup: prompt lookup, which copies what stood behind the same last tokens before;
# lookup_draft: lookup, and the draft model in a round for which it finds nothing.
ProposerKind = Literal["draft", "lookup", "lookup_draft"]


@dataclass(frozen=True)
class Proposal:
    """What a round proposes."""

    proposer: str  # draft, lookup; empty: nothing
    num_proposed: int  # those without room in the context, which nobody wrote down, included
    probs: Tensor | None = None  # [K, V], from which they were drawn; None: each was certain


class ProposesTokens(Protocol):
    """Proposes in round after round of one text."""

    def propose(self, ids_T: Tensor, length: int, room: int) -> Proposal | None:
        """Writes at most `room` tokens behind the first `length`, which are the text; None: has nothing."""
        ...

    def go_on(self, length: int, tokens: list[int]) -> None:
        """The text of `length` tokens goes on with these, whoever proposed them."""
        ...


class LookupProposals:
    """Prompt lookup over prompt and answer; a proposal is short where the text that is known ends."""

    def __init__(self, prompt_ids: list[int], num_lookup_tokens: int) -> None:
        self.known, self.num_lookup_tokens = PromptLookup(prompt_ids), num_lookup_tokens

    def propose(self, ids_T: Tensor, length: int, room: int) -> Proposal | None:
        found = self.known.find(self.num_lookup_tokens)
        if not found:
            return None
        ids_T[length : length + room][: len(found)] = torch.tensor(found[:room], device=ids_T.device)
        return Proposal("lookup", len(found))

    def go_on(self, length: int, tokens: list[int]) -> None:
        self.known.append(tokens)


class DraftProposals:
    """A draft model; what others wrote since its last round it reads in the first pass of its next one.

    Of a draft that has logits of some ids alone (`columns`), only those are looked at.
    """

    def __init__(
        self,
        reader: Reader,
        num_speculative_tokens: int,
        sampling: Sampling,
        generator: torch.Generator,
        columns: Tensor | None,
        missing: Tensor | None,
        vocab_size: int,
    ) -> None:
        self.reader, self.num_speculative_tokens = reader, num_speculative_tokens
        self.sampling, self.generator, self.vocab_size = sampling, generator, vocab_size
        self.columns, self.missing = columns, missing  # the second: columns that are never proposed

    def propose(self, ids_T: Tensor, length: int, room: int) -> Proposal | None:
        reader, sampling, columns, drawn_from = self.reader, self.sampling, self.columns, list[Tensor]()
        unread_T = ids_T[reader.length : length]
        # Each place as a view of its own, cut at once: behind a pass each tensor operation takes 50 us.
        for place_1 in torch.split(ids_T[length : length + min(self.num_speculative_tokens, room)], 1):
            logits_1C = mask_ids(reader.read(unread_T), self.missing)
            if sampling.temperature == 0:
                chosen_1 = likeliest(logits_1C)
            else:
                probs_1C = probabilities(logits_1C, sampling.temperature, sampling.top_k, sampling.top_p)
                chosen_1 = draw(probs_1C, self.generator)
                drawn_from.append(probs_1C)
            if columns is None:
                place_1.copy_(chosen_1)
            else:
                torch.index_select(columns, 0, chosen_1, out=place_1)
            unread_T = place_1
        return Proposal("draft", self.num_speculative_tokens, self._widened(drawn_from))

    def _widened(self, drawn_from: list[Tensor]) -> Tensor | None:
        """[K, V]: what K proposals were drawn from, 0 for ids without a column; None: they are certain."""
        if not drawn_from or self.columns is None:
            return torch.cat(drawn_from) if drawn_from else None
        probs_KC = torch.cat(drawn_from)
        return probs_KC.new_zeros(len(probs_KC), self.vocab_size).index_copy_(1, self.columns, probs_KC)

    def go_on(self, length: int, tokens: list[int]) -> None:
        # The last token is the target's. After K acceptances the draft has not read its own last proposal
        # either, and nothing is taken back.
        self.reader.take_back(length + len(tokens) - 1)
