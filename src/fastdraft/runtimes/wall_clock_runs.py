"""The runs of a benchmark: the target alone and with a draft in turn, kept in units as they end.

Decides what makes two times comparable: a baseline is never taken from another time. All settings of a measurement (the
target alone, then each K) answer a prompt one after the other before the next prompt comes, and every second repeat goes
through them from the other end, so that a slow spell of the machine, a warm cache or a falling clock hits all alike. Before
that an untimed run with exact counts warms up, gives the counts and the texts, and compares each text with the target's own.

Decides also what is kept: NAME.counts.json and one NAME.repeat-N.json for each repeat, each written whole when it is done. A
killed benchmark repeats at most one of them, and no repeat is ever made of runs from two processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft.errors import FastDraftError
from fastdraft.functional.acceptance import counts_to_array
from fastdraft.functional.generation import Sampling
from fastdraft.run_folder import digest, read_json, write_json
from fastdraft.runtimes.wall_clock import Contender, TimedBatch, TimedText
from fastdraft.runtimes.wall_clock_prompts import PromptSet

ALONE = "alone"
WARM_UP_TOKENS = 8
Judge = Callable[[list[int], int, int], float]
"""The gap in log-prob between two next tokens of a text, in the target's eyes."""


@dataclass(frozen=True)
class Setting:
    """How a draft is used."""

    num_speculative_tokens: int
    """K; of no meaning beside a confidence threshold."""
    confidence_threshold: float = 0.0
    """A round proposes until the draft is less sure of a token than this; 0: always K proposals."""

    @property
    def label(self) -> str:
        """`k3`, or `c0.4`."""
        return (
            f"c{self.confidence_threshold:g}"
            if self.confidence_threshold
            else f"k{self.num_speculative_tokens}"
        )


@dataclass(frozen=True)
class Measurement:
    """Prompts on which a target alone and with its draft are timed in turn."""

    part: str
    """`tasks`, or the factor that is swept."""
    prompts: PromptSet
    target_weights: str
    draft_weights: str
    temperature: float
    settings: list[Setting]
    repeats: int
    seed: int
    concurrency: int = 1
    value: int = 0
    """Of the swept factor; 0: none is swept."""

    @property
    def name(self) -> str:
        """Of its units."""
        weights = f"{self.target_weights}-{self.draft_weights}-t{self.temperature:g}"
        swept = f"-{self.value}-{self.settings[0].label}" if self.value else ""
        return f"{self.part}-{self.prompts.task}-{weights}{swept}"

    @property
    def labels(self) -> list[str]:
        """The target alone first."""
        return [ALONE, *(setting.label for setting in self.settings)]

    @property
    def batches(self) -> list[range]:
        """Places of the prompts that are asked together."""
        count = len(self.prompts.prompt_ids)
        return [
            range(begin, min(begin + self.concurrency, count)) for begin in range(0, count, self.concurrency)
        ]

    @property
    def planned_tokens(self) -> int:
        """Most tokens that one unit writes."""
        return len(self.prompts.prompt_ids) * self.prompts.max_new_tokens * len(self.labels)

    def describe(self) -> dict[str, Any]:
        """What its units depend on, kept in each of them."""
        return {
            "part": self.part,
            "task": self.prompts.task,
            "target_weights": self.target_weights,
            "draft_weights": self.draft_weights,
            "temperature": self.temperature,
            "concurrency": self.concurrency,
            "max_new_tokens": self.prompts.max_new_tokens,
            "seed": self.seed,
            "labels": self.labels,
            "prompts": digest(self.prompts.prompt_ids),
        }


@dataclass(frozen=True)
class Measured:
    """A measurement and what its units hold."""

    measurement: Measurement
    counts: dict[str, Any]
    repeats: list[dict[str, Any]]


class Units:
    """The folder of finished units.

    Args:
        folder: Made when the first unit is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self, work: Measurement) -> list[str]:
        """Of all units of a measurement, in the order in which they are made."""
        return [
            f"{work.name}.counts",
            *(f"{work.name}.repeat-{number}" for number in range(1, work.repeats + 1)),
        ]

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def has(self, name: str) -> bool:
        return self.path(name).is_file()

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Under a temporary name, then renamed."""
        write_json(self.path(name), value)

    def read(self, name: str, measurement: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A finished unit.

        Raises:
            FastDraftError: when it is damaged, or about something else than `measurement`.
        """
        path = self.path(name)
        unit = read_json(path)
        if not isinstance(unit, dict) or (measurement is not None and unit.get("measurement") != measurement):
            raise FastDraftError(
                path,
                "about another measurement",
                "must be this one's",
                "delete this file and run the same command again",
            )
        return unit


def measure(
    work: Measurement,
    contenders: Mapping[str, Contender],
    units: Units,
    judge: Judge,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Measured:
    """Makes what is missing of a measurement's units and returns them all.

    Args:
        work: What is measured.
        contenders: One for each of its labels.
        units: Where they are kept.
        judge: Asked about the first difference of a greedy text from the target's own.
        on_batch: Called with the planned tokens that are done, after every batch of every setting has been answered; may raise.

    Raises:
        FastDraftError: for a unit that is damaged or about something else.
    """
    about, (first, *rest) = work.describe(), units.names(work)
    warm = not units.has(first)
    if warm:
        units.write(first, {"measurement": about, **_counted(work, contenders, judge, on_batch)})
    for number, name in enumerate(rest):
        if not units.has(name):
            if not warm:
                _warm_up(work, contenders)
            warm = True
            units.write(name, {"measurement": about, **_timed(work, contenders, number, on_batch)})
    return stored(work, units)


def stored(work: Measurement, units: Units) -> Measured:
    """A finished measurement, from its units alone.

    Raises:
        FastDraftError: when one is missing, damaged or about something else.
    """
    counts, *repeats = (units.read(name, work.describe()) for name in units.names(work))
    return Measured(work, counts, repeats)


def is_finished(work: Measurement, units: Units) -> bool:
    """Whether nothing of a measurement is missing."""
    return all(units.has(name) for name in units.names(work))


def _answers(
    work: Measurement, contender: Contender, places: Sequence[int], *, exact_counts: bool = False
) -> TimedBatch:
    seed = int(digest([work.seed, work.name, places[0]]), 16) % 2**31
    prompts = [work.prompts.prompt_ids[place] for place in places]
    return contender.write(
        prompts, Sampling(work.temperature), work.prompts.max_new_tokens, seed, exact_counts=exact_counts
    )


def _warm_up(work: Measurement, contenders: Mapping[str, Contender]) -> None:
    """A few tokens of every contender, for a process that goes on with timing."""
    prompts = [work.prompts.prompt_ids[place] for place in work.batches[0]]
    for label in work.labels:
        contenders[label].write(
            prompts, Sampling(work.temperature), min(WARM_UP_TOKENS, work.prompts.max_new_tokens), work.seed
        )


def _counted(
    work: Measurement, contenders: Mapping[str, Contender], judge: Judge, on_batch: Callable[[int], None]
) -> dict[str, Any]:
    """Texts, counts and comparisons of every setting, untimed."""
    found: dict[str, dict[str, list[Any]]] = {
        label: {"response_ids": [], "counts": []} for label in work.labels
    }
    for places in work.batches:
        for label in work.labels:
            for text in _answers(work, contenders[label], places, exact_counts=True).texts:
                found[label]["response_ids"].append([int(token) for token in text.response_ids])
                if label != ALONE:
                    found[label]["counts"].append(_as_numbers(text))
        on_batch(len(places) * work.prompts.max_new_tokens * len(work.labels))
    own = found[ALONE]["response_ids"]
    greedy = work.temperature == 0
    return {
        "prompt_tokens": [len(ids) for ids in work.prompts.prompt_ids],
        "texts": found,
        "lossless": {label: greedy or contenders[label].lossless_sampling for label in work.labels},
        "differences": {
            label: _differences(work, own, found[label]["response_ids"], judge) if greedy else None
            for label in work.labels[1:]
        },
    }


def _as_numbers(text: TimedText) -> list[float | None] | None:
    """Counts as numbers, null where the runtime cannot count; null for a text without a round (one that ended at its first token)."""
    return (
        [None if math.isnan(value) else float(value) for value in counts_to_array(text.counts)]
        if text.rounds
        else None
    )


def _differences(
    work: Measurement, own: list[list[int]], others: list[list[int]], judge: Judge
) -> list[dict[str, Any]]:
    """Where texts leave the target's own, each with how near the two tokens are in the target's eyes."""
    found = []
    for name, prompt, first, second in zip(
        work.prompts.names, work.prompts.prompt_ids, own, others, strict=True
    ):
        if first == second:
            continue
        place = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        gap = None if place is None else abs(judge([*prompt, *first[:place]], first[place], second[place]))
        token = min(len(first), len(second)) if place is None else place
        found.append({"prompt": name, "token": token, "logprob_gap": gap})
    return found


def _timed(
    work: Measurement, contenders: Mapping[str, Contender], number: int, on_batch: Callable[[int], None]
) -> dict[str, Any]:
    """One repeat: batch by batch, every setting in turn."""
    order = work.labels if number % 2 == 0 else work.labels[::-1]
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in work.labels}
    for places in work.batches:
        for label in order:
            runs[label].append(_as_times(_answers(work, contenders[label], places)))
        on_batch(len(places) * work.prompts.max_new_tokens * len(work.labels))
    return {"order": order, "runs": runs}


def _as_times(batch: TimedBatch) -> dict[str, Any]:
    """A batch as it is kept."""
    return {
        "seconds": batch.seconds,
        "num_tokens": [len(text.response_ids) for text in batch.texts],
        "text_seconds": [text.seconds for text in batch.texts],
        "first_token_seconds": [text.first_token_seconds for text in batch.texts],
    }


def as_settings(
    num_speculative_tokens: Sequence[int], confidence_thresholds: Sequence[float]
) -> list[Setting]:
    """Every fixed K, then every threshold."""
    return [
        *map(Setting, num_speculative_tokens),
        *(Setting(max(num_speculative_tokens), value) for value in confidence_thresholds),
    ]
