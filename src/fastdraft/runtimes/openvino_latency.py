"""What one pass of an exported model costs in OpenVINO: the measured side of the forecast.

`measure_passes` times a pair for the benchmark; `LoadedModel` and `time_passes` serve `inspect --measure`, with many drafts at once.
"""

# What GenAI adds around a pass is not in these figures: scheduling, choosing tokens, filling the inputs, and a draft pass over two tokens
# instead of one after a round in which all were accepted. docs/openvino.md has how much that is.

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastdraft.decoding.latency import Latency
from fastdraft.runtimes.openvino import (
    MODEL_FILE,
    Precision,
    check_exported,
    core,
    device_properties,
    openvino_errors,
)
from fastdraft.runtimes.openvino_speculative import OpenVINOSettings
from fastdraft.target import Target

WARM_TURNS = 2
REPEATS = 15
"""Turns whose median is taken."""
SPELL_SECONDS = 0.02
"""How long equal rounds are made before, and again while, they are timed; a slower model makes one of each."""
_PIECE = 256  # of the prefix, read at once: logits of a long one over a large vocabulary would take gigabytes
_NAMES = (("int4", ("u4", "i4")), ("int8", ("u8", "i8")), ("fp16", ("f16", "bf16")))


@dataclass(frozen=True)
class PassCosts:
    """Median seconds of one pass, batch 1."""

    target_seconds: dict[int, float]
    """By the number of tokens that the target reads at once."""
    draft_seconds: list[float]
    """Of one token, for each draft: the mean over the tokens of a round."""
    spread: float
    """How far the middle half of the turns lies apart, over the median: the largest of all kinds. Above 0.3 something else ran."""


class LoadedModel:
    """An exported model compiled as continuous batching compiles it, its cache filled with a prefix.

    The very graph is timed that OpenVINO GenAI runs: attention turned into paged attention, compiled with `device_properties` and nothing
    else, so that arithmetic (on a CPU bfloat16 where it has it), dynamic quantisation and the 8-bit KV cache are the same. The cache is in
    tensors of ours: every pass starts behind the same prefix, whatever was written before, so it never grows and is never refilled.

    Args:
        folder: An export.
        prefix_tokens: Positions filled once; every pass begins behind them.
        room: Most tokens that a pass reads.
    """

    def __init__(
        self,
        folder: Path,
        prefix_tokens: int,
        room: int,
        *,
        device: str = "CPU",
        precision: Precision = "fast",
        threads: int = 0,
    ) -> None:
        from openvino._offline_transformations import paged_attention_transformation

        properties = device_properties(device, precision, threads)
        check_exported(folder)
        self.prefix_tokens = 0
        self._inputs: dict[tuple[int, int], dict[str, Any]] = {}
        with openvino_errors(folder, f"OpenVINO could not run it on {device}", "export the model again"):
            model = core().read_model(folder / MODEL_FILE)
            self.weights = weights_of(model)
            paged_attention_transformation(model)
            compiled = core().compile_model(model, device, properties)
            self._request = compiled.create_infer_request()
            self._names = {port.get_any_name() for port in compiled.inputs}
            self._vocab_size = int(compiled.output("logits").partial_shape[-1].get_length())
            self._blocks = _set_caches(self._request, compiled, prefix_tokens + room, device)
            while self.prefix_tokens < prefix_tokens:
                piece = min(_PIECE, prefix_tokens - self.prefix_tokens)
                self.read(piece)
                self.prefix_tokens += piece

    def read(self, width: int) -> float:
        """Seconds of one pass over `width` tokens behind the prefix."""
        for name, tensor in self._tensors(width).items():
            self._request.set_tensor(name, tensor)
        start = time.perf_counter()
        self._request.infer(share_inputs=True, share_outputs=True)
        return time.perf_counter() - start

    def logits(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Of the last pass, [width, vocabulary]."""
        logits = np.array(self._request.get_tensor("logits").data, dtype=np.float32)
        return logits.reshape(-1, self._vocab_size)

    def _tensors(self, width: int) -> dict[str, Any]:
        """The inputs of one sequence of `width` tokens behind `prefix_tokens`, made once."""
        import openvino

        begin = self.prefix_tokens
        if (begin, width) not in self._inputs:
            values: dict[str, tuple[Any, type]] = {
                "input_ids": (any_ids(begin, width, self._vocab_size), np.int64),
                "position_ids": (np.arange(begin, begin + width), np.int64),
                "max_context_len": (begin + width, np.int32),
                "past_lens": ([begin], np.int32),
                "subsequence_begins": ([0, width], np.int32),
                "block_indices_begins": ([0, self._blocks], np.int32),
                "block_indices": (np.arange(self._blocks), np.int32),
            }
            self._inputs[begin, width] = {
                name: openvino.Tensor(np.asarray(value, dtype=kind))
                for name, (value, kind) in values.items()
                if name in self._names
            }
        return self._inputs[begin, width]


def any_ids(begin: int, count: int, vocab_size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Token ids for positions whose content does not matter."""
    return np.arange(5 + begin, 5 + begin + count, dtype=np.int64) % vocab_size


def measure_passes(
    target: Path,
    draft: Path,
    widths: Sequence[int],
    prefix_tokens: int,
    settings: OpenVINOSettings,
    repeats: int = REPEATS,
) -> Latency:
    """Times single passes of two exports in the order of decoding: of the target over 1 token and each of `widths`, of the draft over one.

    K proposals are verified by a pass over K + 1. The prefix in the caches is lowered to fit the shorter context.
    """
    widths = sorted({1, *widths})
    room = max(widths)
    prefix = fitting_prefix([target, draft], prefix_tokens, room)
    draft_device = settings.draft_device or settings.device
    how: Any = {"precision": settings.precision, "threads": settings.threads}
    loaded = LoadedModel(target, prefix, room, device=settings.device, **how)
    of_draft = LoadedModel(draft, prefix, room, device=draft_device, **how)
    costs = time_passes(loaded, [of_draft], widths, repeats)
    return Latency(
        costs.draft_seconds[0],
        costs.target_seconds,
        prefix,
        settings.device,
        of_draft.weights,
        loaded.weights,
    )


def fitting_prefix(folders: Sequence[Path], prefix_tokens: int, room: int) -> int:
    """The prefix lowered so that `room` more tokens fit the shortest context."""
    context = min(Target.at(folder).context_length for folder in folders)
    return max(1, min(prefix_tokens, context - room))


def time_passes(
    target: LoadedModel,
    drafts: Sequence[LoadedModel],
    widths: Sequence[int],
    repeats: int,
    on_turn: Callable[[], None] = lambda: None,
) -> PassCosts:
    """Turns of rounds in which every width and every draft comes at least once, all pairs of them over the turns.

    The order is that of decoding: a round is K draft tokens and then a target pass over K + 1; equal rounds go untimed before the timed
    ones, and target passes over one token before those timed alone. So each model finds the processor's caches as the other left them
    (a small model that has them to itself is twice as fast), and no pass pays for a change of shape that decoding does not make either.
    All kinds come in every turn, so that a slow moment of the machine hits all.
    """
    verifying = [width for width in widths if width > 1]
    of_target: dict[int, list[float]] = {width: [] for width in widths}
    of_drafts: list[list[float]] = [[] for _ in drafts]
    for turn in range(WARM_TURNS + repeats):
        (alone,) = _spell(lambda: (target.read(1),))
        rounds = []
        for place in range(max(len(drafts), len(verifying))):
            width = verifying[(place + turn) % len(verifying)] if verifying else 1
            index = place % len(drafts)
            rounds.append((width, index, _spell(partial(_round, target, drafts[index], width))))
        if turn >= WARM_TURNS:
            of_target[1].append(alone)
            for width, index, (target_seconds, draft_seconds) in rounds:
                of_drafts[index].append(draft_seconds)
                if width > 1:
                    of_target[width].append(target_seconds)
        on_turn()
    return PassCosts(
        {width: statistics.median(times) for width, times in of_target.items()},
        list(map(statistics.median, of_drafts)),
        max(map(_spread, [*of_target.values(), *of_drafts])),
    )


def _round(target: LoadedModel, draft: LoadedModel, width: int) -> tuple[float, float]:
    """Seconds of a target pass over `width` tokens and of one of the draft tokens before it."""
    draft_seconds = statistics.fmean(draft.read(1) for _ in range(max(1, width - 1)))
    return target.read(width), draft_seconds


def _spread(times: Sequence[float]) -> float:
    """Interquartile range over the median."""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return (high - low) / statistics.median(times)


def _spell(work: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """Medians of what `work` returns over a spell of it, after an untimed one; a spell is once, or more within `SPELL_SECONDS`."""
    done: list[tuple[float, ...]] = []
    for _ in range(2):
        done = []
        start = time.perf_counter()
        while not done or time.perf_counter() - start < SPELL_SECONDS:
            done.append(work())
    return tuple(map(statistics.median, zip(*done, strict=True)))


def weights_of(model: Any) -> str:
    """int4, int8, fp16 or fp32: the narrowest type among the matrices of an IR."""
    kinds = {
        op.get_element_type().get_type_name()
        for op in model.get_ops()
        if op.get_type_name() == "Constant" and len(op.shape) > 1
    }
    return next((name for name, types in _NAMES if not kinds.isdisjoint(types)), "fp32")


def _set_caches(request: Any, compiled: Any, positions: int, device: str) -> int:
    """Gives a request empty caches for so many positions, on its device; returns their number of blocks."""
    import openvino

    ports = {port.get_any_name(): port for port in compiled.inputs}
    block = int(ports["value_cache.0"].partial_shape[2].get_length())
    blocks = -(-positions // block)
    for name, port in ports.items():
        if not name.startswith(("key_cache.", "value_cache.")):
            continue
        shape = openvino.Shape([blocks, *(size.get_length() for size in list(port.partial_shape)[1:])])
        if device.startswith("CPU"):
            tensor = openvino.Tensor(port.element_type, shape)
            tensor.data[...] = 0
        else:
            tensor = core().get_default_context(device).create_tensor(port.element_type, shape, {})
        request.set_tensor(name, tensor)
    return blocks
