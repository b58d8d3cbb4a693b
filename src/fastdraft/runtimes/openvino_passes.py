"""OpenVINO's two pipelines, watched pass by pass: which tokens each pass of the target added to each answer, and when.

Decides how the moment of a token is taken: with continuous batching (CPU, GPU) by reading every request after every step,
so that several answers grow at the same time; with the pipeline for NPUs, which answers one prompt after the other, by a
streamer, which it calls once for each pass. Which pipeline runs is a matter of the device (`open_pipeline`).

Batching reads prompts whole (see openvino_speculative.py) and keeps none of them for the next run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.runtimes.openvino import (
    WHOLE_PROMPTS,
    Precision,
    as_tensor,
    check_exported,
    device_properties,
    import_genai,
    load_pipeline,
    short,
)
from fastdraft.runtimes.openvino_signals import keeping_signal_stack

NPU_PROMPT_TOKENS, NPU_NEW_TOKENS = 1024, 1024
"""An NPU's pipeline is compiled for a fixed longest prompt and answer."""


@dataclass(frozen=True)
class Pass:
    """What one pass of the target added to one answer."""

    tokens: list[int]
    seconds: float
    """From handing over the batch."""


@dataclass(frozen=True)
class Measured:
    """One answer with OpenVINO's metrics of it."""

    passes: list[Pass]
    result: Any
    """Has `perf_metrics` and `extended_perf_metrics`."""
    num_proposed: int
    """Tokens that the draft proposed: one in each of its passes."""
    num_idle: int = 0
    """Passes of the draft that the metrics list, with their times, without any having been made."""


@dataclass(frozen=True)
class Ending:
    """Where an answer ends that OpenVINO is told to write beyond its end."""

    max_new_tokens: int
    eos_ids: frozenset[int]

    def reached(self, passes: Sequence[Pass]) -> bool:
        """Whether the last pass, or one before it, holds the answer's end."""
        return sum(len(p.tokens) for p in passes) >= self.max_new_tokens or not self.eos_ids.isdisjoint(
            passes[-1].tokens
        )


class WatchedPipeline(Protocol):
    """A loaded target, alone or with a draft."""

    adapts: bool
    """Whether the number of proposals follows their fate, K being only where it begins."""

    def write(
        self, prompts: Sequence[Sequence[int]], configs: Sequence[Any], ending: Ending | None
    ) -> list[list[Pass]]:
        """The passes of every answer; without an ending to look for, OpenVINO stops by itself."""
        ...

    def measure(self, prompt: Sequence[int], config: Any) -> Measured:
        """One answer and its metrics."""
        ...


def open_pipeline(
    target: Path,
    draft: Path | None,
    *,
    device: str,
    draft_device: str,
    precision: Precision,
    threads: int,
    rows: int,
    one_by_one: bool,
) -> WatchedPipeline:
    """Loads a target, alone or with a draft.

    Args:
        target: Export.
        draft: Export; None: the target alone.
        device: OpenVINO's name of the target's device.
        draft_device: The draft's; "" is the target's.
        precision: fast or exact.
        threads: CPU threads; 0 leaves OpenVINO's own choice.
        rows: Most answers at a time.
        one_by_one: The pipeline that NPUs need, on any device.

    Raises:
        MissingExtra, RecipeError, FastDraftError: as for `OpenVINOEngine`.
    """
    draft_device = draft_device or device
    properties = _properties(device, precision, threads)
    if draft is not None:
        check_exported(draft)
        of_draft = _properties(draft_device, precision, threads)
        try:
            properties["draft_model"] = import_genai().draft_model(str(draft), draft_device, **of_draft)
        except RuntimeError as error:
            raise FastDraftError(
                draft, short(error), f"OpenVINO must load it on {draft_device}", "export the draft again"
            ) from error
    if one_by_one or is_npu(device) or is_npu(draft_device):
        return OneByOne(target, device, properties, on_npu=is_npu(device) or is_npu(draft_device))
    return Batched(load_pipeline(target, device, properties, rows, WHOLE_PROMPTS))


def is_npu(device: str) -> bool:
    """Whether OpenVINO's name means an NPU."""
    return device.partition(".")[0] == "NPU"


def _properties(device: str, precision: Precision, threads: int) -> dict[str, Any]:
    properties = device_properties(device, precision, threads)
    return (
        {**properties, "MAX_PROMPT_LEN": NPU_PROMPT_TOKENS, "MIN_RESPONSE_LEN": NPU_NEW_TOKENS}
        if is_npu(device)
        else properties
    )


class Batched:
    """Continuous batching: all answers grow at the same time.

    Args:
        pipeline: A ContinuousBatchingPipeline.
    """

    adapts = False

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._has_drafted = False

    def write(
        self, prompts: Sequence[Sequence[int]], configs: Sequence[Any], ending: Ending | None
    ) -> list[list[Pass]]:
        """The passes of every answer, all requests added before the first step."""
        tensors = [as_tensor(prompt) for prompt in prompts]
        start = time.perf_counter()
        pipeline = self.pipeline
        handles = [
            pipeline.add_request(i, *asked) for i, asked in enumerate(zip(tensors, configs, strict=True))
        ]
        found: list[list[Pass]] = [[] for _ in handles]
        running = list(zip(handles, found, strict=True))
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter() - start
            for handle, passes in running:
                written = _read(handle)
                if written:
                    passes.append(Pass(written, now))
            if ending:
                ended = [handle for handle, passes in running if passes and ending.reached(passes)]
                for handle in ended:
                    handle.cancel()
                running = [one for one in running if one[0] not in ended]
        self._note(configs, found)
        return found

    def measure(self, prompt: Sequence[int], config: Any) -> Measured:
        """One answer by OpenVINO's own loop, for its metrics."""
        listener, passes = _listener(time.perf_counter(), None)
        result = self.pipeline.generate([as_tensor(prompt)], [config], listener)[0]
        idle = _idle_passes(passes, config.max_new_tokens, has_drafted=self._has_drafted)
        self._note([config], [passes])
        return Measured(passes, result, _draft_passes(result) - idle, idle)

    def _note(self, configs: Sequence[Any], found: Sequence[Sequence[Pass]]) -> None:
        self._has_drafted |= any(
            _has_proposals(passes, config.max_new_tokens)
            for config, passes in zip(configs, found, strict=True)
        )


class OneByOne:
    """The pipeline for NPUs: one prompt after the other. With a draft it is greedy.

    Args:
        target: Export.
        device: OpenVINO's name.
        properties: Of the device, and `draft_model` where there is one.
        on_npu: Whether target or draft are on an NPU; elsewhere OpenVINO runs continuous batching behind the same calls.

    Raises:
        FastDraftError: when OpenVINO cannot load the files.
    """

    def __init__(self, target: Path, device: str, properties: Mapping[str, Any], *, on_npu: bool) -> None:
        check_exported(target)
        try:
            with keeping_signal_stack():
                self.pipeline = import_genai().LLMPipeline(str(target), device, dict(properties))
        except RuntimeError as error:
            raise FastDraftError(
                target, short(error), f"OpenVINO must load it on {device}", "export the model again"
            ) from error
        self.adapts = on_npu
        self._has_drafted, self._listed = False, 0

    def write(
        self, prompts: Sequence[Sequence[int]], configs: Sequence[Any], ending: Ending | None
    ) -> list[list[Pass]]:
        """The passes of every answer; the clock runs from the first prompt on."""
        start = time.perf_counter()
        return [
            self._answer(prompt, config, start, ending).passes
            for prompt, config in zip(prompts, configs, strict=True)
        ]

    def measure(self, prompt: Sequence[int], config: Any) -> Measured:
        """One answer and its metrics."""
        return self._answer(prompt, config, time.perf_counter(), None)

    def _answer(self, prompt: Sequence[int], config: Any, start: float, ending: Ending | None) -> Measured:
        listener, passes = _listener(start, ending)
        result = self.pipeline.generate(as_tensor(prompt), config, listener)
        listed = _draft_passes(result)
        if self.adapts:  # lists the passes of all answers so far, one of the prompt in each
            proposed, self._listed = listed - self._listed - 1, listed
            return Measured(passes, result, proposed)
        idle = _idle_passes(passes, config.max_new_tokens, has_drafted=self._has_drafted)
        self._has_drafted |= _has_proposals(passes, config.max_new_tokens)
        return Measured(passes, result, listed - idle, idle)


def _read(handle: Any) -> list[int]:
    written: list[int] = []
    while handle.can_read():
        for output in handle.read().values():
            written += output.generated_ids
    return written


def _listener(start: float, ending: Ending | None) -> tuple[Any, list[Pass]]:
    """A streamer and the list that it fills: one entry for each of its calls, that is for each pass of the target."""
    genai = import_genai()
    passes: list[Pass] = []

    class Listener(genai.StreamerBase):  # type: ignore[misc, name-defined]
        def write(self, tokens: Any) -> Any:
            now = time.perf_counter() - start
            passes.append(
                Pass([int(t) for t in tokens] if isinstance(tokens, Sequence) else [int(tokens)], now)
            )
            return (
                genai.StreamingStatus.CANCEL
                if ending and ending.reached(passes)
                else genai.StreamingStatus.RUNNING
            )

        def end(self) -> None:
            pass

    return Listener(), passes


def _draft_passes(result: Any) -> int:
    """Passes of the draft as the metrics list them."""
    of_draft = getattr(result.extended_perf_metrics, "draft_model_metrics", None)
    return len(of_draft.raw_metrics.m_batch_sizes) if of_draft is not None else 0


def _has_proposals(passes: Sequence[Pass], max_new_tokens: int) -> bool:
    """Whether the draft proposed anything: the first round has min(K, tokens left - 1) proposals."""
    return len(passes) > 1 and max_new_tokens > 2


def _idle_passes(passes: Sequence[Pass], max_new_tokens: int, *, has_drafted: bool) -> int:
    """Listed passes of the draft in which it did nothing.

    Continuous batching steps the draft with every pass of the target. Where the draft has nothing to do, beside the prompt's
    pass and a last one that is to write a single token, the step is listed again with the size of the draft's last pass, if the
    pipeline (`has_drafted`) or this answer ever had one.
    """
    begun_with = sum(len(p.tokens) for p in passes[:-1])
    last_is_single = len(passes) > 1 and begun_with == max_new_tokens - 1
    return int(has_drafted) + int(last_is_single and (has_drafted or _has_proposals(passes, max_new_tokens)))


def failed(device: str, error: RuntimeError) -> RecipeError:
    """What OpenVINO could not do while it wrote, as an error of ours."""
    return RecipeError(
        "device",
        device,
        f"OpenVINO failed: {short(error)}",
        "ask for less text at a time, or use another device",
    )
