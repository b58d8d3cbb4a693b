"""Speculative decoding by OpenVINO GenAI with a draft model, counted as everything here is counted.

OpenVINO counts otherwise than we do (functional/acceptance.py); seen in release 2026.4 and converted so:

- Its first pass of the target reads the prompt and writes one token without any proposal. That pass is left out: the
  counts are those of a text that begins behind this token. `Counts.num_generated_tokens` is therefore one less than the
  tokens written, and prompt plus first token is the prompt for which our exact decoder and replay give equal counts.
- Every later pass writes its accepted proposals and one token of the target, so accepted = written - 1.
- It proposes min(K, tokens left - 1), so that the last token is always the target's. Rounds and generated tokens are not
  changed by that; accepted proposals may be one too few for each text. `beyond_end` removes it: the run is given K + 1
  tokens more than asked, and what stands beyond the end is discarded and not counted as accepted, as everywhere here.
- The same for the end-of-sequence token: when OpenVINO stops at it, nobody can tell whether it was a proposal.
  `beyond_end` lets it write on and cuts the text there.
- `extended_perf_metrics.get_num_accepted_tokens()` and `get_num_draft_tokens()` leave out the last round of every text;
  `main_model_metrics.raw_metrics.m_batch_sizes`, the tokens written in each pass, is complete, and `counts_from_metrics`
  reads that. When sampling it counts a token too many after each rejection, so `SpeculativePipeline` reads the rounds off
  the tokens as they come.
- It masks no ids of the draft; a draft that proposes ids without a token loses those proposals.

Greedy text is the target's own. SAMPLED text is not: release 2026.4 accepts a proposal by comparing the draft's
probability of it with the target's probability of another token, so that the text leans towards the draft and the
counted acceptance is far too high. `SpeculativeRun.lossless` says which; docs/openvino.md has the measurement.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft.decoding.speculative import Round, check_room
from fastdraft.errors import RecipeError
from fastdraft.functional.acceptance import Counts, add_counts
from fastdraft.interfaces import Generation, Sampling
from fastdraft.modeling.source import raw_config
from fastdraft.runtimes.openvino import Precision, as_tensor, device_properties, generation_config, import_genai, load_pipeline
from fastdraft.runtimes.openvino_pair import check_pair, context_length


@dataclass(frozen=True)
class SpeculativeRun:
    """One text that OpenVINO wrote with a draft."""

    generation: Generation
    """Log-probs are 0 when greedy and NaN when sampled: OpenVINO's are not of any distribution then."""
    rounds: list[Round]
    """Without the first pass, which has no proposals."""
    seconds: float
    """From handing over the prompt to the last token; with `beyond_end` including what was cut off."""
    lossless: bool
    """Whether the text follows the target alone."""

    @property
    def counts(self) -> Counts:
        """In our conventions, for the text behind its first token."""
        return add_counts(r.counts for r in self.rounds)


class SpeculativePipeline:
    """A target with a draft in OpenVINO GenAI, with K proposals in every round.

    Args:
        target: Exported target.
        draft: Exported draft.
        eos_ids: Ids that end a text; none: always to the limit.
        num_speculative_tokens: K; OpenVINO's adaptive stopping is off.
        device: OpenVINO's name of the target's device.
        draft_device: The draft's; "" is the target's.
        precision: fast, or exact: float32 weights, activations and caches.
        threads: CPU threads; 0 leaves OpenVINO's own choice.

    Raises:
        RecipeError: for a K below 1. VocabularyError: when the pair does not fit, before anything is loaded.
        ArtifactError, DeviceError, MissingExtraError: as for `OpenVINOEngine`.
    """

    def __init__(
        self,
        target: Path,
        draft: Path,
        eos_ids: Sequence[int],
        num_speculative_tokens: int,
        *,
        device: str = "CPU",
        draft_device: str = "",
        precision: Precision = "fast",
        threads: int = 0,
    ) -> None:
        if num_speculative_tokens < 1:
            raise RecipeError("num_speculative_tokens", num_speculative_tokens, "must be at least 1", "3 to 5 suits most drafts")
        check_pair(target, draft)
        self.eos_ids, self.num_speculative_tokens = tuple(eos_ids), num_speculative_tokens
        self.context_length = min(context_length(raw_config(str(folder))) for folder in (target, draft))
        draft_device = draft_device or device
        of_draft = import_genai().draft_model(str(draft), draft_device, **device_properties(draft_device, precision, threads))
        self.pipeline = load_pipeline(target, device, {**device_properties(device, precision, threads), "draft_model": of_draft})

    def generate(
        self, prompt_ids: list[int], sampling: Sampling, max_new_tokens: int, seed: int, *, beyond_end: bool = True
    ) -> SpeculativeRun:
        """One text and how it came about.

        Args:
            prompt_ids: At least one token.
            sampling: See the module's docstring on temperatures above 0.
            max_new_tokens: Most tokens of the text.
            seed: Of the sampling.
            beyond_end: Counts the round at the text's end exactly, at the cost of a round more; False stops where OpenVINO
                does, for timing.

        Raises:
            DataError: when the prompt is empty or does not fit the context.
        """
        asked = max_new_tokens + (self.num_speculative_tokens + 1 if beyond_end else 0)
        check_room(prompt_ids, asked, self.context_length)
        config = generation_config(sampling, asked, self.eos_ids, seed)
        config.num_assistant_tokens, config.assistant_confidence_threshold = self.num_speculative_tokens, 0.0
        config.ignore_eos = beyond_end or not self.eos_ids
        start = time.perf_counter()
        passes = self._passes(prompt_ids, config, max_new_tokens)
        seconds = time.perf_counter() - start
        greedy = sampling.temperature == 0
        text, rounds = cut_rounds(passes, max_new_tokens, self.eos_ids, self.num_speculative_tokens)
        reason = "stop" if text and text[-1] in self.eos_ids else "length"
        logprobs = [0.0 if greedy else float("nan")] * len(text)
        return SpeculativeRun(Generation(list(prompt_ids), text, logprobs, reason), rounds, seconds, greedy)  # type: ignore[arg-type]

    def _passes(self, prompt_ids: list[int], config: Any, max_new_tokens: int) -> list[list[int]]:
        """The tokens of each pass, in order; given up once the text has ended."""
        handle = self.pipeline.add_request(0, as_tensor(prompt_ids), config)
        passes: list[list[int]] = []
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            written: list[int] = []
            while handle.can_read():
                for output in handle.read().values():
                    written += output.generated_ids
            if written:
                passes.append(written)
            ended = sum(map(len, passes)) >= max_new_tokens or not self._ends().isdisjoint(written)
            if config.ignore_eos and ended and self.pipeline.has_non_finished_requests():
                handle.cancel()
                while self.pipeline.has_non_finished_requests():
                    self.pipeline.step()
        return passes

    def _ends(self) -> frozenset[int]:
        return frozenset(self.eos_ids)


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
        rounds.append(Round(inside, [0.0] * len(inside), accepted, examined, float(accepted), num_speculative_tokens))
    return text, rounds


def counts_from_metrics(metrics: Any, num_speculative_tokens: int) -> Counts:
    """Our counts of one greedy text from OpenVINO's `extended_perf_metrics`; see the module's docstring.

    Rounds, generated tokens and block efficiency are exact; accepted tokens may be one too few, because OpenVINO lets the
    target write a text's last token.

    Args:
        metrics: `extended_perf_metrics` of a result of `generate` with a draft model and batch 1.
        num_speculative_tokens: K of the run.
    """
    sizes = [int(size) for size in metrics.main_model_metrics.raw_metrics.m_batch_sizes][1:]
    k = num_speculative_tokens
    accepted = [min(size - 1, k) for size in sizes]
    per_pos = tuple(float(sum(place < a for a in accepted)) for place in range(k))
    examined = sum(min(size, k) for size in sizes)
    total = float(sum(accepted))
    return Counts(float(len(sizes)), float(k * len(sizes)), total, per_pos, float(examined), float(sum(sizes)), total, float(examined))
