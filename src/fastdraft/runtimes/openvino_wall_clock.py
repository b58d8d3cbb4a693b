"""OpenVINO under the clock: a target alone or with a draft answers prompts, and says when each token came.

Decides that one loaded pair serves every K and confidence threshold (they go into each request); what is counted in a timed
run and what in an exact one; and that on an NPU, where continuous batching does not run, the pipeline made for it is used,
one prompt after the other. How OpenVINO decodes and how its rounds become our counts is in openvino_speculative.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft.decoding.speculative import Round, check_room
from fastdraft.errors import RecipeError
from fastdraft.functional.generation import Sampling
from fastdraft.runtimes.openvino import Precision, answer_seed, generation_config
from fastdraft.runtimes.openvino_pair import check_pair
from fastdraft.runtimes.openvino_passes import (
    NPU_NEW_TOKENS,
    NPU_PROMPT_TOKENS,
    Ending,
    Measured,
    Pass,
    WatchedPipeline,
    failed,
    open_pipeline,
)
from fastdraft.runtimes.openvino_speculative import (
    DYNAMIC_PLACES,
    cut_rounds,
    set_speculation,
    with_proposals,
)
from fastdraft.runtimes.wall_clock import TimedBatch, TimedText
from fastdraft.target import Target

NPU_MOST = 5
"""An NPU's target is compiled for passes of at most 2 * 5 + 1 tokens, twice OpenVINO's default K and the token before."""


@dataclass(frozen=True)
class PassBreakdown:
    """Where the time of one answer went, by OpenVINO's own clocks. What is left of the whole is scheduling, sampling and moving tokens."""

    target_seconds: float
    """Inside the target's inference, the prompt's pass included."""
    draft_seconds: float
    """Inside the draft's inference. OpenVINO adds one or two passes twice; that much, at their mean, is taken off again."""
    total_seconds: float
    """From the call of `generate` to its return."""
    target_passes: int
    """The prompt's pass and one for each round."""
    draft_passes: int
    """One for each proposed token."""


@dataclass(frozen=True)
class _Loaded:
    """What both contenders share: the pipeline and what it may be asked."""

    pipeline: WatchedPipeline
    eos_ids: tuple[int, ...]
    context_length: int
    device: str

    def configs(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, asked: int, seed: int
    ) -> list[Any]:
        """OpenVINO's settings for every answer.

        Raises:
            DataError: when a prompt is empty or does not fit the context with `asked` tokens behind it.
        """
        for number, prompt in enumerate(prompts):
            check_room(list(prompt), asked, self.context_length, f"prompt {number}")
            if self.pipeline.adapts:
                check_room(list(prompt), 0, NPU_PROMPT_TOKENS, f"prompt {number} on an NPU")
        made = []
        for index in range(len(prompts)):
            config = generation_config(sampling, asked, self.eos_ids, answer_seed(seed, index))
            config.ignore_eos = not self.eos_ids
            made.append(config)
        return made

    def passes(
        self, prompts: Sequence[Sequence[int]], configs: Sequence[Any], ending: Ending | None = None
    ) -> list[list[Pass]]:
        """Raises:
        RecipeError: when OpenVINO fails or leaves a prompt without an answer.
        """
        try:
            found = self.pipeline.write(prompts, configs, ending)
        except RuntimeError as error:
            raise failed(self.device, error) from error
        if not all(found):
            raise failed(self.device, RuntimeError("a prompt was left without an answer, for want of memory"))
        return found

    def measure(self, prompt: Sequence[int], config: Any) -> Measured:
        """Raises:
        RecipeError: when OpenVINO fails.
        """
        try:
            return self.pipeline.measure(prompt, config)
        except RuntimeError as error:
            raise failed(self.device, error) from error


class OpenVINOTarget:
    """A `Contender`: the target alone.

    Args:
        folder: Its export.
        eos_ids: Ids that end a text; none: always to the limit.
        device: OpenVINO's name: CPU, GPU, GPU.1, NPU.
        precision: fast, or exact: float32 weights, activations and caches.
        threads: CPU threads; 0 leaves OpenVINO's own choice.
        rows: Most answers at a time; further ones wait.
        one_by_one: Runs the pipeline that an NPU needs on this device too.

    Raises:
        FastDraftError, RecipeError, MissingExtra: as for `OpenVINOEngine`.
    """

    lossless_sampling = True

    def __init__(
        self,
        folder: Path,
        eos_ids: Sequence[int],
        *,
        device: str = "CPU",
        precision: Precision = "fast",
        threads: int = 0,
        rows: int = 16,
        one_by_one: bool = False,
    ) -> None:
        pipeline = open_pipeline(
            folder,
            None,
            device=device,
            draft_device="",
            precision=precision,
            threads=threads,
            rows=rows,
            one_by_one=one_by_one,
        )
        self._loaded = _Loaded(pipeline, tuple(eos_ids), _context(pipeline, folder), device)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        *,
        exact_counts: bool = False,
    ) -> TimedBatch:
        """See `Contender.write`; there is nothing to count.

        Raises:
            DataError: when a prompt is empty or does not fit. RecipeError: when OpenVINO fails.
        """
        loaded = self._loaded
        found = loaded.passes(prompts, loaded.configs(prompts, sampling, max_new_tokens, seed))
        return _batch([_timed(passes, [token for p in passes for token in p.tokens], []) for passes in found])


class OpenVINOPair:
    """A target with a draft, loaded once for every K and confidence threshold.

    Args:
        target: Exported target.
        draft: Exported draft.
        eos_ids: Ids that end a text; none: always to the limit.
        device: OpenVINO's name of the target's device.
        draft_device: The draft's; "" is the target's.
        precision: fast, or exact: float32 weights, activations and caches.
        threads: CPU threads; 0 leaves OpenVINO's own choice.
        rows: Most answers at a time; further ones wait.
        one_by_one: Runs the pipeline that an NPU needs on this device too.

    Raises:
        TargetError: when the pair does not fit, before anything is loaded.
        FastDraftError, RecipeError, MissingExtra: as for `OpenVINOEngine`.
    """

    def __init__(
        self,
        target: Path,
        draft: Path,
        eos_ids: Sequence[int],
        *,
        device: str = "CPU",
        draft_device: str = "",
        precision: Precision = "fast",
        threads: int = 0,
        rows: int = 16,
        one_by_one: bool = False,
    ) -> None:
        check_pair(target, draft)
        pipeline = open_pipeline(
            target,
            draft,
            device=device,
            draft_device=draft_device,
            precision=precision,
            threads=threads,
            rows=rows,
            one_by_one=one_by_one,
        )
        self._loaded = _Loaded(pipeline, tuple(eos_ids), _context(pipeline, target, draft), device)

    def at(self, num_speculative_tokens: int, confidence_threshold: float = 0.0) -> OpenVINOSpeculation:
        """The pair at a K, as a `Contender`; nothing is loaded for it.

        Args:
            num_speculative_tokens: K. On an NPU the K to begin with, which OpenVINO then adapts.
            confidence_threshold: Above 0 the draft proposes until it is less sure of a token than this, and OpenVINO takes no K.

        Raises:
            RecipeError: for a K below 1, a threshold outside [0, 1), or one of them that an NPU does not take.
        """
        if num_speculative_tokens < 1:
            raise RecipeError(
                "num_speculative_tokens",
                num_speculative_tokens,
                "must be at least 1",
                "3 to 5 suits most drafts",
            )
        if not 0 <= confidence_threshold < 1:
            raise RecipeError(
                "confidence_threshold",
                confidence_threshold,
                "must be at least 0 and below 1",
                "0 always proposes K tokens",
            )
        if self._loaded.pipeline.adapts and num_speculative_tokens > NPU_MOST:
            rule = f"OpenVINO's pipeline for NPUs begins with at most {NPU_MOST}"
            raise RecipeError("num_speculative_tokens", num_speculative_tokens, rule, "lower it")
        if self._loaded.pipeline.adapts and confidence_threshold:
            rule = "OpenVINO's pipeline for NPUs knows no threshold"
            raise RecipeError(
                "confidence_threshold",
                confidence_threshold,
                rule,
                "leave it out: there the number adapts by itself",
            )
        return OpenVINOSpeculation(self._loaded, num_speculative_tokens, confidence_threshold)

    def breakdown(
        self, prompt: Sequence[int], max_new_tokens: int, num_speculative_tokens: int
    ) -> PassBreakdown:
        """Where the time of one greedy answer goes, by OpenVINO's metrics: `inference_durations` of both models, `generate_durations`.

        Run it once before, to warm up; add several up for a good figure.

        Raises:
            DataError: when the prompt does not fit. RecipeError: as for `at`. RecipeError: when OpenVINO fails.
        """
        self.at(num_speculative_tokens)
        config = self._loaded.configs([prompt], Sampling(0.0), max_new_tokens, 0)[0]
        set_speculation(config, num_speculative_tokens)
        measured = self._loaded.measure(prompt, config)
        models = measured.result.extended_perf_metrics
        target, draft = (
            model.raw_metrics for model in (models.main_model_metrics, models.draft_model_metrics)
        )
        # The times of idle passes are those of real ones, once more; no sum of inferences is longer than that of the steps around them.
        real = measured.num_proposed / max(1, measured.num_proposed + measured.num_idle)
        in_draft = min(real * _inference(draft, measured.num_proposed + 1), sum(draft.m_durations))
        return PassBreakdown(
            _inference(target, len(measured.passes)) / 1e6,
            in_draft / 1e6,
            sum(measured.result.perf_metrics.raw_metrics.generate_durations) / 1e6,
            len(measured.passes),
            measured.num_proposed,
        )


class OpenVINOSpeculation:
    """A `Contender`: a loaded pair at one K or one confidence threshold; made by `OpenVINOPair.at`.

    Rounds of a fixed K are counted as everywhere here. Where the number of proposals varies (a threshold, an NPU), rounds, tokens
    and accepted tokens are counted (the accepted as OpenVINO stops: at most one too few for each text); proposals only by exact
    counts, as the total of each text by OpenVINO's metrics, in which case prompts are answered one by one; else they are NaN.
    `num_examined_tokens` and the overlap are NaN. `num_accepted_tokens_per_pos` has `DYNAMIC_PLACES` places then.

    Args:
        loaded: The pair.
        num_speculative_tokens: K.
        confidence_threshold: 0 or the threshold that takes K's place.
    """

    lossless_sampling = False

    def __init__(self, loaded: _Loaded, num_speculative_tokens: int, confidence_threshold: float) -> None:
        self._loaded, self.num_speculative_tokens, self.confidence_threshold = (
            loaded,
            num_speculative_tokens,
            confidence_threshold,
        )

    @property
    def is_dynamic(self) -> bool:
        """Whether rounds propose differently many tokens."""
        return self.confidence_threshold > 0 or self._loaded.pipeline.adapts

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        *,
        exact_counts: bool = False,
    ) -> TimedBatch:
        """See `Contender.write`. Sampled text is not the target's own; its rounds are those of the text that was written.

        Raises:
            DataError: when a prompt is empty or does not fit (exact counts of a fixed K need room for K + 1 tokens more).
            RecipeError: for sampling on an NPU. RecipeError: when OpenVINO fails.
        """
        if sampling.temperature > 0 and self._loaded.pipeline.adapts:
            raise RecipeError(
                "temperature",
                sampling.temperature,
                "with a draft OpenVINO's pipeline for NPUs is greedy",
                "use 0",
            )
        if self.is_dynamic:
            return self._write_dynamic(prompts, sampling, max_new_tokens, seed, exact_counts=exact_counts)
        k, loaded = self.num_speculative_tokens, self._loaded
        configs = loaded.configs(prompts, sampling, max_new_tokens + (k + 1 if exact_counts else 0), seed)
        for config in configs:
            set_speculation(config, k)
            config.ignore_eos |= exact_counts
        ending = Ending(max_new_tokens, frozenset(loaded.eos_ids)) if exact_counts else None
        return _batch(
            [self._text(passes, max_new_tokens) for passes in loaded.passes(prompts, configs, ending)]
        )

    def _text(self, passes: Sequence[Pass], max_new_tokens: int) -> TimedText:
        return _timed(
            passes,
            *cut_rounds(
                [p.tokens for p in passes], max_new_tokens, self._loaded.eos_ids, self.num_speculative_tokens
            ),
        )

    def _write_dynamic(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        *,
        exact_counts: bool,
    ) -> TimedBatch:
        loaded = self._loaded
        configs = loaded.configs(prompts, sampling, max_new_tokens, seed)
        for config in configs:
            set_speculation(config, self.num_speculative_tokens, self.confidence_threshold)
        found: list[tuple[list[Pass], int | None]]
        if exact_counts:
            found = [(each.passes, each.num_proposed) for each in map(loaded.measure, prompts, configs)]
        else:
            found = [(passes, None) for passes in loaded.passes(prompts, configs)]
        texts = []
        for passes, num_proposed in found:
            text, rounds = cut_rounds(
                [p.tokens for p in passes], max_new_tokens, loaded.eos_ids, DYNAMIC_PLACES
            )
            texts.append(_timed(passes, text, with_proposals(rounds, num_proposed)))
        return _batch(texts)


def _inference(metrics: Any, num_passes: int) -> float:
    """Microseconds inside a model's inference; on an NPU, where that is lost, of its last passes as a whole."""
    return float(sum(metrics.inference_durations) or sum(metrics.m_durations[-num_passes:]))


def _context(pipeline: WatchedPipeline, *folders: Path) -> int:
    """Most tokens of prompt and answer that all of them can read."""
    room = min(Target.at(folder).context_length for folder in folders)
    # An NPU's cache also holds the widest pass.
    return min(room, NPU_PROMPT_TOKENS + NPU_NEW_TOKENS - 2 * NPU_MOST - 1) if pipeline.adapts else room


def _timed(passes: Sequence[Pass], text: list[int], rounds: Sequence[Round]) -> TimedText:
    """The text of some passes with the moments of its first and last token."""
    written, last = 0, passes[0]
    for each in passes:
        if written >= len(text):
            break
        written, last = written + len(each.tokens), each
    return TimedText(text, last.seconds, passes[0].seconds, list(rounds))


def _batch(texts: list[TimedText]) -> TimedBatch:
    return TimedBatch(texts, max((text.seconds for text in texts), default=0.0))
