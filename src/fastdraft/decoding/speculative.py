"""Speculative decoding: the draft proposes, the target verifies, the text is the target's own.

Decides the conventions by which everything here is counted: batch 1, draft and target in one process with a cache each;
the first round drafts straight from the prompt (the target reads prompt and proposals in one pass); every round proposes
K tokens; what stands beyond the end of the text is discarded and not counted as accepted; the end-of-sequence token
counts as generated. Temperature, top-k and top-p shape both distributions. Ids that the tokenizer does not have are masked
for the draft, never for the target. All randomness comes from one seed. A round waits for the device once, when all is decided
there, and copies nothing that an earlier round wrote.

Shape suffixes: K proposals, E = K + 1, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdraft.decoding.cache import Reader
from fastdraft.errors import DataError, RecipeError
from fastdraft.functional.acceptance import Counts, add_counts
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.functional.sampling import draw, mask_ids, probabilities
from fastdraft.functional.verification import verify, verify_greedy
from fastdraft.modeling.vocabulary import Vocabulary


@dataclass(frozen=True)
class Round:
    """What one pass of the target added to the text."""

    tokens: list[int]
    """Accepted proposals, then the target's token unless the text ended before it."""
    logprobs: list[float]
    """Of each token under the target's sampling distribution."""
    num_accepted: int
    """How many of `tokens`, from the front, were proposals."""
    num_examined: int
    """Proposals inside the text that were decided on."""
    overlap_sum: float
    """Sum over the examined places of sum_v min(target_probs, draft_probs)."""
    num_speculative_tokens: int

    @property
    def counts(self) -> Counts:
        """This round alone, as counts."""
        k = self.num_speculative_tokens
        per_pos = tuple(float(j < self.num_accepted) for j in range(k))
        accepted, examined = float(self.num_accepted), float(self.num_examined)
        return Counts(
            1.0, float(k), accepted, per_pos, examined, float(len(self.tokens)), self.overlap_sum, examined
        )


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


def check_room(
    prompt_ids: list[int], max_new_tokens: int, context_length: int, where: str = "prompt"
) -> None:
    """Raises:
    DataError: when there is no prompt, or prompt and answer do not fit the context.
    """
    if not prompt_ids:
        raise DataError(where, "no tokens", "a prompt needs at least one token", "give some text")
    if len(prompt_ids) + max_new_tokens > context_length:
        found = f"{len(prompt_ids)} tokens and {max_new_tokens} new ones"
        raise DataError(
            where,
            found,
            f"the context holds {context_length} tokens",
            "shorten the prompt or lower max_new_tokens",
        )


@dataclass(frozen=True)
class _Text:
    """A text while it is being written: what both models have read of it, its ids, how it is drawn."""

    target: Reader
    draft: Reader
    ids: Tensor
    """[T], with room for the answer and a round beyond it."""
    sampling: Sampling
    generator: torch.Generator


class SpeculativeDecoder:
    """Writes text as the target does, with fewer passes of the target.

    Args:
        target: The model whose text is wanted, in evaluation mode.
        draft: The model that proposes; same vocabulary, same device.
        vocabulary: The shared vocabulary: which ids end a text, which are padding.
        num_speculative_tokens: K, proposals in each round.
        draft_temperature: The draft's own temperature where the target samples; None: the target's; 0: proposes greedily.
            Any value leaves the text's distribution unchanged. Where the target is greedy the draft always is.

    Raises:
        RecipeError: for a K below 1 or a negative draft temperature.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel,
        vocabulary: Vocabulary,
        num_speculative_tokens: int,
        draft_temperature: float | None = None,
    ) -> None:
        if num_speculative_tokens < 1:
            raise RecipeError(
                "num_speculative_tokens",
                num_speculative_tokens,
                "must be at least 1",
                "3 to 5 suits most drafts",
            )
        if draft_temperature is not None and draft_temperature < 0:
            raise RecipeError(
                "draft_temperature", draft_temperature, "must not be negative", "0 proposes greedily"
            )
        self.target, self.draft, self.vocabulary = target, draft, vocabulary
        self.num_speculative_tokens, self.draft_temperature = num_speculative_tokens, draft_temperature
        self._eos = frozenset(vocabulary.eos_token_ids)
        self._missing = (
            torch.tensor(vocabulary.missing_ids, dtype=torch.long, device=draft.device)
            if vocabulary.missing_ids
            else None
        )

    @property
    def context_length(self) -> int:
        """Tokens that both models can read: prompt and answer together."""
        models = (self.target, self.draft)
        return min(int(m.config.get_text_config(decoder=True).max_position_embeddings) for m in models)

    def generate(
        self, prompt_ids: list[int], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> SpeculativeResult:
        """One text, the same for the same arguments.

        Raises:
            DataError: when the prompt is empty or does not fit the context.
        """
        rounds = list(self.rounds(prompt_ids, sampling, max_new_tokens, seed))
        response = [token for r in rounds for token in r.tokens]
        logprobs = [value for r in rounds for value in r.logprobs]
        stopped = bool(response) and response[-1] in self._eos
        return SpeculativeResult(
            Generation(list(prompt_ids), response, logprobs, "stop" if stopped else "length"), rounds
        )

    def rounds(
        self, prompt_ids: list[int], sampling: Sampling, max_new_tokens: int, seed: int
    ) -> Iterator[Round]:
        """The text round by round, as it is written."""
        check_room(prompt_ids, max_new_tokens, self.context_length)
        k, device = self.num_speculative_tokens, self.target.device
        generator = torch.Generator(device=device).manual_seed(seed)
        capacity = len(prompt_ids) + max_new_tokens + k + 1
        ids_T = torch.zeros(capacity, dtype=torch.long, device=device)
        ids_T[: len(prompt_ids)] = torch.tensor(prompt_ids, device=device)
        text = _Text(Reader(self.target, capacity), Reader(self.draft, capacity), ids_T, sampling, generator)
        length, end = len(prompt_ids), len(prompt_ids) + max_new_tokens
        while length < end:
            with torch.inference_mode():
                found = self._round(text, length, end)
            yield found
            length += len(found.tokens)
            if found.tokens[-1] in self._eos:
                return

    def _round(self, text: _Text, length: int, end: int) -> Round:
        """One proposal and verification; writes the new tokens into `ids_T` and leaves both readers one token behind the text's end.

        After K acceptances the draft has not read its own last proposal; it reads it next time together with the bonus token.
        """
        ids_T, sampling = text.ids, text.sampling
        k = self._proposals(length)
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
        num_accepted, ids, logprobs, overlaps = _fetch(
            accepted_count, written_E, target_probs_EV, draft_probs_KV
        )
        tokens = self._inside(ids[: num_accepted + 1], end - length)
        text.target.take_back(length + num_accepted)
        text.draft.take_back(length + num_accepted)
        # The one refused stands at num_accepted; if the text ended before it, nobody asked.
        examined = min(num_accepted + 1, k, len(tokens))
        accepted = min(num_accepted, len(tokens))
        overlap = sum(overlaps[:examined]) if overlaps else float(accepted)
        return Round(
            tokens, logprobs[: len(tokens)], accepted, examined, overlap, self.num_speculative_tokens
        )

    def _proposals(self, length: int) -> int:
        """How many of the K proposals are really made: those beyond the models' context would be discarded, and some cannot be read."""
        return min(self.num_speculative_tokens, self.context_length - length)

    def _propose(self, text: _Text, length: int, num_proposals: int) -> Tensor:
        """Writes the proposals at `length` and after; the distributions that they were drawn from, [K, V] (empty rows when greedy)."""
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

    def _inside(self, tokens: list[int], room: int) -> list[int]:
        """`tokens` up to the end of the text: its first end-of-sequence token or its last place."""
        for place, token in enumerate(tokens[:room]):
            if token in self._eos:
                return tokens[: place + 1]
        return tokens[:room]


def _fetch(
    num_accepted: Tensor, ids_E: Tensor, target_probs_EV: Tensor | None, draft_probs_KV: Tensor
) -> tuple[int, list[int], list[float], list[float]]:
    """All that a round needs to know of the device, in the one transfer for which it waits.

    Returns:
        num_accepted; the ids of all E places; their log-probs (0 when greedy); overlap at each proposal (none when greedy).
    """
    if target_probs_EV is None:
        count, *ids = torch.cat([num_accepted[None], ids_E]).tolist()
        return count, ids, [0.0] * len(ids), []
    logprobs_E = target_probs_EV.gather(-1, ids_E[:, None]).squeeze(-1).log()
    overlap_K = torch.minimum(target_probs_EV[:-1], draft_probs_KV).sum(-1)
    # As float32, which holds every id below 2^24: vocabularies are a hundred times smaller.
    found = torch.cat([num_accepted[None].float(), ids_E.float(), logprobs_E, overlap_K]).tolist()
    places = len(ids_E)
    ids, logprobs, overlaps = (
        found[1 : places + 1],
        found[places + 1 : 2 * places + 1],
        found[2 * places + 1 :],
    )
    return int(found[0]), [int(i) for i in ids], logprobs, overlaps
