"""Picks figures out of an evaluation's `results.json`.

Decides the order of checkpoints and tasks, at which temperature and K a headline is read, which method's row stands for
a setting (replay, which covers every checkpoint and K; else exact), and that the best K is the one with the highest
speed-up of the chosen kind. Unknown extra keys are ignored and missing ones tolerated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Figures = Mapping[str, Any]

STAGE_LABELS = {"design": "untrained", "pretrain": "PT", "continue_pretrain": "CP", "align": "FT"}
SPEEDUPS = {
    "mbsu_parameters": "by parameters",
    "mbsu_bytes": "by bytes read",
    "mbsu_latency": "by measured latency",
    "predicted_speedup": "predicted wall clock",
}
"""Kinds of speed-up that a row may hold, the paper's first, and how they are called."""
TASK_ORDER = ("code", "summarization", "text", "instructions")
HEADLINE_TEMPERATURE, HEADLINE_K = 0.6, 3


@dataclass(frozen=True)
class Results:
    """The content of `results.json` with questions answered."""

    raw: Mapping[str, Any]

    @cached_property
    def rows(self) -> list[Figures]:
        """Every row that is a mapping."""
        return [item for item in self.raw.get("rows") or [] if isinstance(item, Mapping)]

    @cached_property
    def checkpoints(self) -> list[str]:
        """Checkpoints in the order of training, unknown names last."""
        return ordered((str(item.get("checkpoint")) for item in self.rows), tuple(STAGE_LABELS))

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks, the shipped ones first."""
        return ordered((str(item.get("task")) for item in self.rows), TASK_ORDER)

    @cached_property
    def temperatures(self) -> list[float]:
        return sorted({t for item in self.rows if (t := number(item, "temperature")) is not None})

    @property
    def final(self) -> str | None:
        """The last checkpoint of the ladder: the draft that is exported."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def headline_temperature(self) -> float | None:
        """0.6, the paper's; else the lowest sampled one; else greedy."""
        if not self.temperatures:
            return None
        sampled = [t for t in self.temperatures if t > 0]
        return HEADLINE_TEMPERATURE if HEADLINE_TEMPERATURE in sampled else (sampled or self.temperatures)[0]

    @property
    def headline_k(self) -> int | None:
        """3, the paper's, or the nearest K that was evaluated."""
        available = self.ks()
        return min(available, key=lambda k: (abs(k - HEADLINE_K), k)) if available else None

    def ks(
        self, checkpoint: str | None = None, task: str | None = None, temperature: float | None = None
    ) -> list[int]:
        """The K values that have a row."""
        return sorted(
            {
                int(k)
                for item in self.select(checkpoint, task, temperature)
                if (k := number(item, "num_speculative_tokens")) is not None
            }
        )

    def select(
        self,
        checkpoint: str | None = None,
        task: str | None = None,
        temperature: float | None = None,
        k: int | None = None,
        method: str | None = None,
    ) -> list[Figures]:
        """Rows that match every given value."""
        wanted = {
            "checkpoint": checkpoint,
            "task": task,
            "temperature": temperature,
            "num_speculative_tokens": k,
            "method": method,
        }
        return [
            item
            for item in self.rows
            if all(value is None or item.get(key) == value for key, value in wanted.items())
        ]

    def row(
        self, checkpoint: str | None, task: str, temperature: float | None, k: int | None
    ) -> Figures | None:
        """The one row for a setting; replay before exact."""
        found = self.select(checkpoint, task, temperature, k)
        return min(found, key=lambda item: item.get("method") != "replay") if found else None

    @cached_property
    def speedups(self) -> list[str]:
        """The kinds of speed-up that these rows hold."""
        return [key for key in SPEEDUPS if any(number(item, key) is not None for item in self.rows)]

    def best(
        self, checkpoint: str | None, task: str, temperature: float | None, key: str = "mbsu_parameters"
    ) -> Figures | None:
        """The row of the K with the highest speed-up of the kind `key`; the smallest such K when equal."""
        candidates = [
            self.row(checkpoint, task, temperature, k) for k in self.ks(checkpoint, task, temperature)
        ]
        rated = [item for item in candidates if item is not None and number(item, key) is not None]
        return max(rated, key=lambda item: number(item, key) or 0.0) if rated else None

    def cost_ratio(self, key: str) -> float | None:
        """The cost ratio behind a kind of memory-bound speed-up."""
        return number(self.raw, key.replace("mbsu_", "cost_ratio_")) if key.startswith("mbsu_") else None

    def settings(self) -> Iterator[tuple[str, float]]:
        """Every (task, temperature) that has rows."""
        for task in self.tasks:
            for temperature in self.temperatures:
                if self.select(task=task, temperature=temperature):
                    yield task, temperature


def number(item: Mapping[str, Any] | None, *keys: str) -> float | None:
    """The first finite number found under one of `keys`; None when there is none."""
    for key in keys:
        value = item.get(key) if item else None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    return None


def interval(item: Mapping[str, Any] | None, key: str) -> tuple[float, float] | None:
    """The 95 % interval of a figure, from `KEY_low` and `KEY_high`.

    A memory-bound or predicted speed-up is block efficiency times what K and the costs fix, so its interval is that of block
    efficiency, scaled; the costs' own spread is not in it.
    """
    low, high = number(item, f"{key}_low"), number(item, f"{key}_high")
    if low is not None and high is not None:
        return low, high
    value, efficiency = number(item, key), number(item, "block_efficiency")
    if key not in SPEEDUPS or value is None or not efficiency:
        return None
    around = interval(item, "block_efficiency")
    return (around[0] * value / efficiency, around[1] * value / efficiency) if around else None


def per_position(item: Mapping[str, Any] | None) -> list[float]:
    """Share of rounds in which the proposal at position 1, 2, ... was accepted."""
    counts, rounds = (item or {}).get("num_accepted_tokens_per_pos"), number(item, "num_drafts")
    return [float(count) / rounds for count in counts] if isinstance(counts, (list, tuple)) and rounds else []


def stage_label(checkpoint: str) -> str:
    """`align` -> `FT`, as in the paper's tables."""
    return STAGE_LABELS.get(checkpoint, checkpoint)


def k_name(k: float | None) -> str:
    """`K = 3`, kept on one line."""
    return f"K\u00a0=\u00a0{k:g}" if k is not None else "K unknown"


def temperature_name(temperature: float | None) -> str:
    """0 -> `greedy`, 0.6 -> `temperature 0.6`."""
    return (
        "greedy" if temperature == 0 else f"temperature {temperature:g}" if temperature is not None else "-"
    )


def ordered(names: Iterable[str], order: tuple[str, ...]) -> list[str]:
    """Each name once: those of `order` first, in its order, then the others as they come."""
    seen = list(dict.fromkeys(names))
    return [name for name in order if name in seen] + [name for name in seen if name not in order]
