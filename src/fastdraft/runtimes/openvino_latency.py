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
import torch

from fastdraft.decoding.latency import Latency, seconds_more
from fastdraft.runtimes.openvino import Precision
from fastdraft.runtimes.openvino_reader import OpenVINOModel
from fastdraft.target import Target

WARM_TURNS = 2
REPEATS = 15  # turns whose median is taken
SPELL_SECONDS = (
    0.02  # for which equal rounds are made before, and again while, they are timed; or one of each
)


@dataclass(frozen=True)
class PassCosts:
    """Median seconds of one pass, batch 1."""

    target_seconds: dict[int, float]  # by the number of tokens that the target reads at once
    draft_seconds: list[float]  # of one token, for each draft: the mean over the tokens of a round
    spread: float  # interquartile range of the turns over their median, the largest of all kinds


class LoadedModel:
    """An exported model behind a prefix, as decoding reads it: the graph that OpenVINO GenAI runs.

    Attention is turned into paged attention, and the model compiled with `device_properties` and nothing
    else, so that arithmetic (on a CPU bfloat16 where it has it), dynamic quantisation and the KV cache are
    the same. Every pass starts behind the same prefix. `room`: most tokens of a pass; `narrow`: as our own
    decoder reads a draft with a trimmed head.
    """

    def __init__(
        self,
        folder: Path,
        prefix_tokens: int,
        room: int,
        precision: Precision = "fast",
        threads: int = 0,
        *,
        narrow: bool = False,
    ) -> None:
        model = OpenVINOModel(folder, precision, threads, narrow=narrow)
        self.prefix_tokens, self.weights, self._vocab_size = prefix_tokens, model.weights, model.vocab_size
        self._reader = model.reader(prefix_tokens + room)
        self._reader.read(torch.from_numpy(any_ids(0, prefix_tokens, model.vocab_size)))

    def read(self, width: int, keep: int | None = None) -> float:
        """Seconds of one pass over `width` tokens behind the prefix, with logits behind all or the last."""
        self._reader.take_back(self.prefix_tokens)
        ids = any_ids(self.prefix_tokens, width, self._vocab_size)
        self._reader.prepare(ids, width if keep is None else keep)
        start = time.perf_counter()
        self._reader.run()
        return time.perf_counter() - start

    def logits(self, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Of the last pass, over `width` tokens: [width, vocabulary]."""
        return self._reader.request.show("logits", width).copy()


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
    *,
    narrow: bool = False,
) -> Latency:
    """Times single passes: the target over 1 token and `widths` (K + 1 verifies K), the draft (`narrow`: with
    the rows of a trimmed head alone) over one and, as it reads what lookup wrote, over the widest.

    The prefix in the caches is lowered to fit the shorter context.
    """
    widths = sorted({1, *widths})
    prefix = fitting_prefix([target, draft], prefix_tokens, widths[-1])
    loaded = prefix, widths[-1], precision, threads
    models = [LoadedModel(target, *loaded), LoadedModel(draft, *loaded, narrow=narrow)]
    costs = time_passes(models[0], models[1:], widths, repeats)
    weights, drafting, widest = (models[1].weights, models[0].weights), models[1], widths[-1]
    # In turn: both kinds of pass find the processor's caches alike, and their difference is what is asked.
    turns = [_spell(lambda: (drafting.read(1), drafting.read(widest, keep=1))) for _ in range(repeats)]
    over_one, over_many = map(statistics.median, zip(*turns, strict=True))
    more = seconds_more(over_one, over_many, widest)
    return Latency(costs.draft_seconds[0], costs.target_seconds, prefix, "CPU", *weights, more)


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
