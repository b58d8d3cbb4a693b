"""Passes of a target, as runtimes tell them, -> texts with moments, and rounds as we count them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastdraft.decoding.speculative import Round
from fastdraft.runtimes.runtime import TimedText


@dataclass(frozen=True)
class Pass:
    """What one pass of the target added to one answer."""

    tokens: list[int]
    seconds: float  # from handing over the batch


def cut_rounds(
    passes: Sequence[Sequence[int]], max_new_tokens: int, eos_ids: Sequence[int], num_speculative_tokens: int
) -> tuple[list[int], list[Round]]:
    """The text up to its end, and its rounds in our conventions (functional/acceptance.py).

    The first pass of a runtime reads the prompt and writes one token without any proposal. That pass
    is left out: prompt plus first token is the prompt for which our decoder and replay give equal counts, and
    `Counts.num_generated_tokens` is one less than the tokens written. Every later pass writes its accepted
    proposals and one token of the target, so accepted = written - 1; what stands beyond the text's end is
    discarded and not counted as accepted.
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
        if number:
            accepted = min(len(written) - 1, len(inside))
            examined = min(len(written), num_speculative_tokens, len(inside))
            zeros = [0.0] * len(inside)
            rounds.append(Round(inside, zeros, accepted, examined, float(accepted), num_speculative_tokens))
    return text, rounds


def timed(passes: Sequence[Pass], text: list[int], rounds: list[Round]) -> TimedText:
    """The text of some passes with the moments of its first and last token."""
    written, last = 0, passes[0]
    for each in passes:
        if written >= len(text):
            break
        written, last = written + len(each.tokens), each
    return TimedText(text, last.seconds, passes[0].seconds, rounds)
