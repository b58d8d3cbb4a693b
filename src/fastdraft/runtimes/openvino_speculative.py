"""How OpenVINO GenAI decodes with a draft model, and how what it does is counted as everything here is counted.

Decides how its passes become our rounds. OpenVINO counts otherwise than we do (functional/acceptance.py); seen in release 2026.4 and
converted so:

- Its first pass of the target reads the prompt and writes one token without any proposal. That pass is left out: the
  counts are those of a text that begins behind this token. `Counts.num_generated_tokens` is therefore one less than the
  tokens written, and prompt plus first token is the prompt for which our exact decoder and replay give equal counts.
- Every later pass writes its accepted proposals and one token of the target, so accepted = written - 1.
- It proposes min(K, tokens left - 1), so that the last token is always the target's. Rounds and generated tokens are not
  changed by that; accepted proposals may be one too few for each text. Exact counts remove it: the run is given K + 1
  tokens more than asked, and what stands beyond the end is discarded and not counted as accepted, as everywhere here.
- The same for the end-of-sequence token: when OpenVINO stops at it, nobody can tell whether it was a proposal. For exact
  counts it writes on and the text is cut there.
- `extended_perf_metrics.get_num_accepted_tokens()` and `get_num_draft_tokens()` leave out the last round of every text, and
  when sampling `raw_metrics.m_batch_sizes` of the target has one token too many after each rejection. So the rounds are read
  off the tokens as they come, pass by pass (openvino_passes.py).
- It masks no ids of the draft; a draft that proposes ids without a token loses those proposals.

Dynamic length. A confidence threshold replaces K, both at once are refused: the draft proposes until it proposes a token
that it gives a probability below the threshold (that token is proposed too), or, and this is the only other bound, to the
end of the text. Greedy, OpenVINO knows that probability only when asked for log-probs (`logprobs = 1`); without, every
round has a single proposal. How many were proposed in each round it does not tell; the passes of the draft, which its
metrics list, are the proposals of a text in all. See `ProposedRound`. On an NPU the length is dynamic in another way: K is
where it begins, two more follow a round whose proposals were all accepted (to 2 K), one less any other.

Greedy text is the target's own, provided that prompts are read whole: where several requests with a draft run at once and
a prompt is read in pieces (more than `max_num_batched_tokens`, 256 by default, in all), release 2026.4.1 writes wrong text,
in float32 too. `WHOLE_PROMPTS` avoids that. SAMPLED text is not the target's: the release accepts a proposal by comparing
the draft's probability of it with the target's probability of another token, so that the text leans towards the draft and
the counted acceptance is far too high; docs/openvino.md has the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdraft.decoding.speculative import Round
from fastdraft.functional.acceptance import Counts

DYNAMIC_PLACES = 32
"""Places of `num_accepted_tokens_per_pos` where the number of proposals varies; acceptances behind them are in the total only."""
_NAN = float("nan")


@dataclass(frozen=True)
class ProposedRound(Round):
    """A round of a text whose rounds propose differently many tokens, of which only the total is known.

    `num_speculative_tokens` is the common length of `num_accepted_tokens_per_pos`; `num_examined` and `overlap_sum` say nothing:
    whether a round ended with a rejection or with its last proposal is not known, so those counts are NaN.
    """

    num_proposed: float
    """A share of the text's proposals, so that its rounds add up to what was proposed; NaN: not known."""

    @property
    def counts(self) -> Counts:
        """This round alone, as counts."""
        accepted = float(self.num_accepted)
        per_pos = tuple(float(place < self.num_accepted) for place in range(self.num_speculative_tokens))
        return Counts(1.0, self.num_proposed, accepted, per_pos, _NAN, float(len(self.tokens)), _NAN, _NAN)


def set_speculation(config: Any, num_speculative_tokens: int, confidence_threshold: float = 0.0) -> None:
    """Tells a GenerationConfig how many tokens to propose.

    Args:
        config: openvino_genai's.
        num_speculative_tokens: K of every round.
        confidence_threshold: Above 0 it takes the place of K.
    """
    if confidence_threshold > 0:
        config.num_assistant_tokens, config.assistant_confidence_threshold, config.logprobs = (
            0,
            confidence_threshold,
            1,
        )
    else:
        config.num_assistant_tokens, config.assistant_confidence_threshold = num_speculative_tokens, 0.0


def cut_rounds(
    passes: Sequence[Sequence[int]], max_new_tokens: int, eos_ids: Sequence[int], num_speculative_tokens: int
) -> tuple[list[int], list[Round]]:
    """The text up to its end, and its rounds in our conventions.

    Args:
        passes: Tokens that each pass of the target added, the prompt's pass first.
        max_new_tokens: Where the text ends at the latest.
        eos_ids: Where it ends at the earliest.
        num_speculative_tokens: K.

    Returns:
        The text with its first token, and one round for each later pass that began inside it.
    """
    text: list[int] = []
    rounds: list[Round] = []
    for number, written in enumerate(passes):
        if len(text) >= max_new_tokens or (text and text[-1] in eos_ids):
            break
        room = max_new_tokens - len(text)
        end = next((place + 1 for place, token in enumerate(written[:room]) if token in eos_ids), room)
        inside = list(written[:end])
        text += inside
        if number == 0:
            continue
        accepted = min(len(written) - 1, len(inside))
        examined = min(len(written), num_speculative_tokens, len(inside))
        rounds.append(
            Round(inside, [0.0] * len(inside), accepted, examined, float(accepted), num_speculative_tokens)
        )
    return text, rounds


def with_proposals(rounds: Sequence[Round], num_proposed: int | None) -> list[Round]:
    """The rounds of one text with differently many proposals, given how many they had in all (None: not known)."""
    whole, rest = divmod(num_proposed or 0, max(1, len(rounds)))
    shares = [
        _NAN if num_proposed is None else float(whole + (number < rest)) for number in range(len(rounds))
    ]
    return [
        ProposedRound(
            r.tokens, r.logprobs, r.num_accepted, r.num_examined, r.overlap_sum, DYNAMIC_PLACES, share
        )
        for r, share in zip(rounds, shares, strict=True)
    ]
