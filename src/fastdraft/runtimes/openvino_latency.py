"""What one pass of an exported model costs in OpenVINO on a CPU: the measured side of the forecast.

`measure_passes` times a pair for the benchmark; `LoadedModel` and `time_passes` serve `inspect --measure`,
with many drafts at once.
"""

# What GenAI adds around a pass is not in these figures: scheduling, choosing tokens, filling the inputs, and
# a draft pass over two tokens instead of one after a round in which all were accepted.

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from fastdraft.target import Target

WARM_TURNS = 2
REPEATS = 15  # turns whose median is taken
SPELL_SECONDS = (
    0.02  # for which equal rounds are made before, and again while, they are timed; or one of each
)
_PIECE = 256  # of the prefix, read at once: logits of a long one over a large vocabulary would take gigabytes
_NAMES = (("int4", ("u4", "i4")), ("int8", ("u8", "i8")), ("fp16", ("f16", "bf16")))


@dataclass(frozen=True)
class PassCosts:
    """Median seconds of one pass, batch 1."""

    target_seconds: dict[int, float]  # by the number of tokens that the target reads at once
    draft_seconds: list[float]  # of one token, for each draft: the mean over the tokens of a round
    spread: float  # interquartile range of the turns over their median, the largest of all kinds


class LoadedModel:
    """An exported model compiled as continuous batching compiles it, its cache filled with a prefix.

    The very graph is timed that OpenVINO GenAI runs: attention turned into paged attention, compiled with
    `device_properties` and nothing else, so that arithmetic (on a CPU bfloat16 where it has it), dynamic
    quantisation and the 8-bit KV cache are the same. The cache is in tensors of ours: every pass starts
    behind the same prefix, so it never grows and is never refilled. `room`: most tokens of a pass.
    """

    def __init__(
        self, folder: Path, prefix_tokens: int, room: int, precision: Precision = "fast", threads: int = 0
    ) -> None:
        from openvino._offline_transformations import paged_attention_transformation

        properties = device_properties("CPU", precision, threads)
        check_exported(folder)
        self.prefix_tokens = 0
        with openvino_errors(folder, "OpenVINO could not run it on CPU", "export the model again"):
            model = core().read_model(folder / MODEL_FILE)
            self.weights = weights_of(model)
            paged_attention_transformation(model)
            compiled = core().compile_model(model, "CPU", properties)
            self._request = compiled.create_infer_request()
            self._names = {port.get_any_name() for port in compiled.inputs}
            self._vocab_size = int(compiled.output("logits").partial_shape[-1].get_length())
            self._blocks = _set_caches(self._request, compiled, prefix_tokens + room)
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
        """The inputs of one sequence of `width` tokens behind `prefix_tokens`."""
        import openvino

        begin = self.prefix_tokens
        values: dict[str, tuple[Any, type]] = {
            "input_ids": (any_ids(begin, width, self._vocab_size), np.int64),
            "position_ids": (np.arange(begin, begin + width), np.int64),
            "max_context_len": (begin + width, np.int32),
            "past_lens": ([begin], np.int32),
            "subsequence_begins": ([0, width], np.int32),
            "block_indices_begins": ([0, self._blocks], np.int32),
            "block_indices": (np.arange(self._blocks), np.int32),
        }
        known = {name: each for name, each in values.items() if name in self._names}
        return {name: openvino.Tensor(np.asarray(value, dtype=kind)) for name, (value, kind) in known.items()}


def any_ids(begin: int, count: int, vocab_size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Token ids for positions whose content does not matter."""
    return np.arange(5 + begin, 5 + begin + count, dtype=np.int64) % vocab_size


def measure_passes(
    target: Path,
    draft: Path,
    widths: Sequence[int],
    prefix_tokens: int,
    precision: Precision = "fast",
    threads: int = 0,
    repeats: int = REPEATS,
) -> Latency:
    """Times single passes: the target over 1 token and `widths` (K + 1 verifies K), the draft over one.

    The prefix in the caches is lowered to fit the shorter context.
    """
    widths = sorted({1, *widths})
    prefix = fitting_prefix([target, draft], prefix_tokens, widths[-1])
    models = [LoadedModel(folder, prefix, widths[-1], precision, threads) for folder in (target, draft)]
    costs = time_passes(models[0], models[1:], widths, repeats)
    weights = models[1].weights, models[0].weights
    return Latency(costs.draft_seconds[0], costs.target_seconds, prefix, "CPU", *weights)


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
    """Turns of rounds in which every width and every draft comes at least once, and in the end all pairs.

    The order is that of decoding: a round is K draft tokens and then a target pass over K + 1; equal rounds
    go untimed before the timed ones, and target passes over one token before those timed alone. So each model
    finds the processor's caches as the other left them (a small model that has them to itself is twice as
    fast), and no pass pays for a change of shape that decoding does not make either. All kinds come in every
    turn, so that a slow moment of the machine hits all.
    """
    verifying = [width for width in widths if width > 1]
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(WARM_TURNS + repeats):
        found = {("target", 1): [_spell(lambda: (target.read(1),))[0]]}
        for place in range(max(len(drafts), len(verifying))):
            width, index = verifying[(place + turn) % len(verifying)], place % len(drafts)

            def one_round(draft: LoadedModel = drafts[index], width: int = width) -> tuple[float, float]:
                draft_seconds = statistics.fmean(draft.read(1) for _ in range(width - 1))
                return target.read(width), draft_seconds

            for key, seconds in zip((("target", width), ("draft", index)), _spell(one_round), strict=True):
                found.setdefault(key, []).append(seconds)
        if turn >= WARM_TURNS:
            for key, values in found.items():
                times.setdefault(key, []).extend(values)
        on_turn()
    return PassCosts(
        {width: statistics.median(times["target", width]) for width in widths},
        [statistics.median(times["draft", index]) for index in range(len(drafts))],
        max(map(_spread, times.values())),
    )


def _spread(times: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return (high - low) / statistics.median(times)


def _spell(work: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """Medians of what `work` returns: once, or as often as `SPELL_SECONDS` hold, after an untimed spell."""
    done: list[tuple[float, ...]] = []
    for _ in range(2):
        done = []
        start = time.perf_counter()
        while not done or time.perf_counter() - start < SPELL_SECONDS:
            done.append(work())
    return tuple(map(statistics.median, zip(*done, strict=True)))


def weights_of(model: Any) -> str:
    """int4, int8, fp16 or fp32: the narrowest type among the matrices of an IR."""
    matrices = [op for op in model.get_ops() if op.get_type_name() == "Constant" and len(op.shape) > 1]
    kinds = {op.get_element_type().get_type_name() for op in matrices}
    return next((name for name, types in _NAMES if not kinds.isdisjoint(types)), "fp32")


def _set_caches(request: Any, compiled: Any, positions: int) -> int:
    """Gives a request empty caches for so many positions; returns their number of blocks."""
    import openvino

    ports = {port.get_any_name(): port for port in compiled.inputs}
    block = int(ports["value_cache.0"].partial_shape[2].get_length())
    blocks = -(-positions // block)
    for name, port in ports.items():
        if name.startswith(("key_cache.", "value_cache.")):
            sizes = [size.get_length() for size in list(port.partial_shape)[1:]]
            tensor = openvino.Tensor(port.element_type, openvino.Shape([blocks, *sizes]))
            tensor.data[...] = 0
            request.set_tensor(name, tensor)
    return blocks
