"""OpenVINO under the clock: a target alone, with a draft, with prompt lookup; its passes become our rounds.

`OpenVINOPair(target, draft)` is the `LoadedPair` that openvino_runtime.py opens for a benchmark, and what
tries an export.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastdraft.functional.generation import Sampling, check_prompts
from fastdraft.runtimes.openvino import (
    MODEL_FILE,
    Precision,
    answer_seed,
    as_tensor,
    check_exported,
    core,
    device_properties,
    generation_config,
    import_genai,
    load_pipeline,
    openvino_errors,
)
from fastdraft.runtimes.passes import Pass, cut_rounds, timed
from fastdraft.runtimes.runtime import Proposer, TimedText, TimeSpent
from fastdraft.target import Target

# Most of the last tokens that prompt lookup looks for; it takes fewer where these were not there before.
LOOKUP_NGRAM = 3


@dataclass(frozen=True)
class OpenVINOSettings:
    """How OpenVINO runs a pair."""

    device: str = "CPU"
    draft_device: str = ""  # "" is the target's
    precision: Precision = "fast"
    threads: int = 0  # of a CPU; 0 leaves OpenVINO's own choice
    rows: int = 16  # most answers at a time; further ones wait
    eos_ids: tuple[int, ...] = ()  # ids that end a text; none: always to the limit


@dataclass
class OpenVINOPair:
    """Exports of a target and a draft in continuous batching; each pipeline is loaded when first asked."""

    target: Path
    draft: Path
    settings: OpenVINOSettings = OpenVINOSettings()

    @cached_property
    def alone(self) -> Any:
        return self._load({})

    @cached_property
    def both(self) -> Any:
        """The pipeline with the draft; K goes into each request."""
        s = self.settings
        device = s.draft_device or s.device
        properties = device_properties(device, s.precision, s.threads)
        check_exported(self.draft)
        with openvino_errors(self.draft, f"OpenVINO could not load it on {device}", "export the draft again"):
            draft = import_genai().draft_model(str(self.draft), device, **properties)
        return self._load({"draft_model": draft})

    @cached_property
    def looking_up(self) -> Any:
        """The pipeline of the target with OpenVINO's own prompt lookup."""
        return self._load({"prompt_lookup": True})

    def _load(self, more: dict[str, Any]) -> Any:
        s = self.settings
        properties = device_properties(s.device, s.precision, s.threads) | more
        # Where several requests with a draft run at once and a prompt is read in pieces (by default if all
        # have more than 256 tokens), release 2026.4.1 writes wrong text, in float32 too.
        return load_pipeline(self.target, s.device, properties, s.rows, whole_prompts=True)

    @cached_property
    def judge(self) -> TieJudge:
        return TieJudge(self.target)

    def gap(self, prefix_ids: Sequence[int], first: int, second: int) -> float:
        """Distance of the log-probs of two next tokens, by the target in float32."""
        return self.judge.gap(prefix_ids, first, second)

    @cached_property
    def _rooms(self) -> tuple[int, int]:
        """Positions of the target, and of both."""
        target, draft = (Target.at(folder).context_length for folder in (self.target, self.draft))
        return target, min(target, draft)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        proposer: Proposer | None = None,
        *,
        exact_counts: bool = False,
    ) -> list[TimedText]:
        """With a proposer sampled text is not the target's own; its rounds are those of the text written."""
        asked, eos_ids = max_new_tokens, self.settings.eos_ids
        if proposer is None:
            found = self._passes(self.alone, prompts, self._configs(prompts, sampling, asked, seed))
            return [
                timed(passes, [token for each in passes for token in each.tokens], []) for passes in found
            ]
        # OpenVINO proposes min(K, tokens left - 1), so that the last token is always the target's, and where
        # it stops at an end-of-sequence token nobody can tell whether that was a proposal. Neither changes
        # rounds and generated tokens, but accepted proposals may be one too few for each text. For exact
        # counts it writes K + 1 tokens on, past any end, and the text is cut.
        k = proposer.num_speculative_tokens
        end = max_new_tokens if exact_counts else None
        configs = self._configs(prompts, sampling, asked + (k + 1 if exact_counts else 0), seed, proposer)
        for config in configs:
            config.ignore_eos |= exact_counts
        pipeline = self.both if proposer.kind == "draft" else self.looking_up
        found = self._passes(pipeline, prompts, configs, end)
        cut = [cut_rounds([each.tokens for each in passes], max_new_tokens, eos_ids, k) for passes in found]
        return [timed(passes, *parts) for passes, parts in zip(found, cut, strict=True)]

    def time_spent(
        self, prompt: Sequence[int], max_new_tokens: int, num_speculative_tokens: int
    ) -> TimeSpent:
        """Where the time of one greedy answer goes, by OpenVINO's metrics; it is written once before."""
        k, asked = num_speculative_tokens, ([prompt], Sampling(0.0), max_new_tokens, 0)
        drafting = Proposer("draft", k)
        [text] = self.write(*asked, drafting)
        configs = self._configs(*asked, drafting)
        with self._errors():
            [result] = self.both.generate([as_tensor(prompt)], configs)
        models = result.extended_perf_metrics
        target, draft = models.main_model_metrics.raw_metrics, models.draft_model_metrics.raw_metrics
        # The list of the draft's passes repeats one or two: continuous batching steps the draft with every
        # pass of the target, and lists a step in which it had nothing to do with the figures of its last
        # pass. The text says how many there were, one for each proposal (its prompt's pass proposes too).
        # What is repeated is taken off at the mean.
        proposed, written = 0, 1
        for each in text.rounds:
            proposed += min(k, max_new_tokens - written - 1)
            written += len(each.tokens)
        share = proposed / max(1, len(draft.m_batch_sizes))
        return TimeSpent(
            sum(target.inference_durations) / 1e6,
            min(share * sum(draft.inference_durations), sum(draft.m_durations)) / 1e6,
            sum(result.perf_metrics.raw_metrics.generate_durations) / 1e6,
        )

    def _configs(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        asked: int,
        seed: int,
        proposer: Proposer | None = None,
    ) -> list[Any]:
        """OpenVINO's settings for every answer."""
        configs, eos_ids = [], self.settings.eos_ids
        check_prompts(prompts, asked, self._rooms[proposer is not None and proposer.kind == "draft"])
        for index in range(len(prompts)):
            config = generation_config(sampling, asked, eos_ids, answer_seed(seed, index))
            config.ignore_eos = not eos_ids
            if proposer:
                config.num_assistant_tokens = proposer.num_speculative_tokens
                if proposer.kind == "draft":
                    config.assistant_confidence_threshold = 0.0
                else:
                    config.max_ngram_size = LOOKUP_NGRAM
            configs.append(config)
        return configs

    def _passes(
        self, pipeline: Any, prompts: Sequence[Sequence[int]], configs: Sequence[Any], end: int | None = None
    ) -> list[list[Pass]]:
        """The passes of every answer, all requests added before the first step.

        OpenVINO's own counters leave out the last round of every text, so the rounds are read off the tokens:
        by reading every request after every step. An answer is cancelled at `end` tokens, or at an
        end-of-sequence id before; None: OpenVINO stops by itself.
        """
        tensors, ends = [as_tensor(prompt) for prompt in prompts], set(self.settings.eos_ids)
        found: list[list[Pass]] = [[] for _ in prompts]
        with self._errors():
            start = time.perf_counter()
            asked = enumerate(zip(tensors, configs, strict=True))
            running = [(pipeline.add_request(i, *each), found[i]) for i, each in asked]
            while pipeline.has_non_finished_requests():
                pipeline.step()
                now = time.perf_counter() - start
                still = []
                for handle, passes in running:
                    if tokens := read_ids(handle):
                        passes.append(Pass(tokens, now))
                    if end and passes and (count(passes) >= end or not ends.isdisjoint(passes[-1].tokens)):
                        handle.cancel()
                    else:
                        still.append((handle, passes))
                running = still
            if not all(found):
                raise RuntimeError("a prompt was left without an answer, for want of memory")
        return found

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        fix = "ask for less text at a time, or use another device"
        return openvino_errors(f"device {self.settings.device}", "OpenVINO failed", fix)


def count(passes: Sequence[Pass]) -> int:
    """Tokens that these passes wrote."""
    return sum(len(each.tokens) for each in passes)


def read_ids(handle: Any) -> list[int]:
    """What OpenVINO wrote of an answer since the last time."""
    written: list[int] = []
    while handle.can_read():
        for output in handle.read().values():
            written += output.generated_ids
    return written


class TieJudge:
    """How far apart two next tokens are under the bare exported model, in float32 and so on the CPU."""

    def __init__(self, folder: Path) -> None:
        properties = device_properties("CPU", "exact")
        check_exported(folder)
        with openvino_errors(folder, "OpenVINO could not load it on CPU", "export the model again"):
            model = core().compile_model(folder / MODEL_FILE, "CPU", properties)
        self._inputs = {name for port in model.inputs for name in port.get_names()}
        self._request = model.create_infer_request()

    def logprobs(self, prefix_ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Log-probs [V] of the token behind a text of at least one token."""
        length = len(prefix_ids)
        values = {"input_ids": prefix_ids, "attention_mask": [1] * length, "position_ids": range(length)}
        inputs = {name: np.array([row], np.int64) for name, row in values.items() if name in self._inputs}
        if "beam_idx" in self._inputs:
            inputs["beam_idx"] = np.zeros(1, dtype=np.int32)
        self._request.reset_state()  # the KV cache of the text before
        logits_V = np.asarray(self._request.infer(inputs)["logits"], dtype=np.float64)[0, -1]
        shifted_V = logits_V - logits_V.max()
        return np.asarray(shifted_V - np.log(np.exp(shifted_V).sum()))

    def gap(self, prefix_ids: Sequence[int], first: int, second: int) -> float:
        logprobs_V = self.logprobs(prefix_ids)
        return float(abs(logprobs_V[first] - logprobs_V[second]))
