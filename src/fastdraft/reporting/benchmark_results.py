"""Picks figures out of a benchmark's `benchmark.json`.

Decides which rows a verdict may rest on (whole tasks, a fixed K, text that is the target's own), which pair of weights is
the deployed one (that of the sweeps, else the first), and that the best K of a task is the one that the benchmark names,
else the fastest. Unknown extra keys are ignored and missing ones tolerated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from fastdraft.forecast import WORTH
from fastdraft.reporting.results import TASK_ORDER, Figures, number, ordered

SWEEPS = {
    "prompt_tokens": "Prompt length, tokens",
    "max_new_tokens": "Output length, tokens",
    "concurrency": "Requests at the same time",
}
"""What is varied alone at the best K: the row's `part` and the key of its value, and how it is called."""
RUNTIMES = {"openvino": "OpenVINO"}


class Pair(NamedTuple):
    """Weights of target and draft, by the names of their formats."""

    target: str
    draft: str

    @property
    def name(self) -> str:
        """`int4 + int8`, kept on one line: the target's, then the draft's."""
        return f"{self.target}\u00a0+\u00a0{self.draft}"


class Difference(NamedTuple):
    """A greedy text that is not the same with the draft."""

    task: str
    prompt: str
    token: float | None
    """Index of the first token that differs."""
    gap: float | None
    """Between the log-probs of the two tokens there; None when it was not computed."""


@dataclass(frozen=True)
class Benchmark:
    """The content of `benchmark.json` with questions answered."""

    raw: Mapping[str, Any]

    @cached_property
    def rows(self) -> list[Figures]:
        """Every row that is a mapping."""
        return self.items("rows")

    def items(self, key: str) -> list[Figures]:
        """The mappings of a list in the file; empty when it is missing."""
        found = self.raw.get(key)
        return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []

    @cached_property
    def judged(self) -> list[Figures]:
        """Rows of whole tasks that a verdict may rest on: a measured speed-up, a fixed K, text that is the target's own."""
        return [
            item
            for item in self.static
            if item.get("lossless") is not False and number(item, "speedup") is not None
        ]

    @cached_property
    def static(self) -> list[Figures]:
        """Rows of whole tasks with a fixed K."""
        return [
            item
            for item in self.rows
            if item.get("part") == "tasks" and not number(item, "confidence_threshold")
        ]

    @cached_property
    def dynamic(self) -> list[Figures]:
        """Rows of whole tasks whose rounds end early where the draft is unsure, and that have a measured speed-up."""
        return [
            item
            for item in self.rows
            if item.get("part") == "tasks"
            and number(item, "confidence_threshold")
            and number(item, "speedup") is not None
        ]

    @cached_property
    def lossy(self) -> list[Figures]:
        """Rows whose text is not the target's own."""
        return [item for item in self.rows if item.get("lossless") is False]

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks that a verdict may speak of, the shipped ones first."""
        return ordered((str(item.get("task")) for item in self.judged), TASK_ORDER)

    @cached_property
    def pairs(self) -> list[Pair]:
        """Pairs of weights, the deployed one first."""
        swept = [item for item in self.rows if item.get("part") in SWEEPS]
        return list(dict.fromkeys(pair_of(item) for item in (*swept, *self.rows)))

    @property
    def deployed(self) -> Pair | None:
        return self.pairs[0] if self.pairs else None

    @property
    def temperature(self) -> float | None:
        """Greedy, else the lowest temperature of the judged rows."""
        return min(
            (t for item in self.judged if (t := number(item, "temperature")) is not None), default=None
        )

    def against_k(self, task: str, pair: Pair | None = None) -> list[Figures]:
        """The judged rows of one task and pair (None: the deployed), by rising K."""
        pair = pair or self.deployed
        found = [
            item
            for item in self.judged
            if item.get("task") == task
            and pair_of(item) == pair
            and number(item, "temperature") == self.temperature
        ]
        return sorted(found, key=lambda item: number(item, "num_speculative_tokens") or 0.0)

    def best(self, task: str, pair: Pair | None = None) -> Figures | None:
        """The row of a task's best K: for the deployed pair the one that the benchmark names, else the fastest."""
        found = self.against_k(task, pair)
        if pair is None or pair == self.deployed:
            by_task = _mapping(_mapping(self.raw.get("best")).get("by_task"))
            k = number(_mapping(by_task.get(task)), "num_speculative_tokens")
            found = [item for item in found if number(item, "num_speculative_tokens") == k] or found
        return max(found, key=lambda item: number(item, "speedup") or 0.0, default=None)

    @property
    def best_k(self) -> int | None:
        """K to launch with: the one that the benchmark names, else the best of the fastest task."""
        named = number(_mapping(self.raw.get("best")), "num_speculative_tokens")
        rows = [item for task in self.tasks if (item := self.best(task))]
        fastest = max(rows, key=lambda item: number(item, "speedup") or 0.0, default=None)
        k = named if named is not None else number(fastest, "num_speculative_tokens")
        return int(k) if k is not None else None

    def sweep(self, part: str) -> dict[str, list[Figures]]:
        """Rows that vary one thing, by task, by its rising value; those alone that may be judged."""
        found: dict[str, list[Figures]] = {}
        for item in self.rows:
            usable = (
                number(item, part) is not None
                and number(item, "speedup") is not None
                and item.get("lossless") is not False
            )
            if item.get("part") == part and usable:
                found.setdefault(str(item.get("task")), []).append(item)
        return {
            task: sorted(found[task], key=lambda item: number(item, part) or 0.0)
            for task in ordered(found, TASK_ORDER)
        }

    def differences(self) -> list[Difference]:
        """Every greedy text that differed, once for each place at which it did, with the widest gap found there."""
        found: dict[tuple[str, str, float | None], Difference] = {}
        for item in self.rows:
            cases = item.get("differences")
            for case in cases if isinstance(cases, list) else ():
                if isinstance(case, Mapping):
                    place = str(item.get("task")), str(case.get("prompt", "-")), number(case, "token")
                    known, gap = found.get(place), number(case, "logprob_gap")
                    if known is None or known.gap is None or (gap is not None and gap > known.gap):
                        found[place] = Difference(
                            *place, gap if known is None or gap is not None else known.gap
                        )
        return list(found.values())

    @property
    def runtime(self) -> Mapping[str, Any]:
        return _mapping(self.raw.get("runtime"))

    @property
    def runtime_name(self) -> str:
        """`OpenVINO 2026.4.1`."""
        name = str(self.runtime.get("name") or "the runtime")
        return " ".join(
            part for part in (RUNTIMES.get(name, name), str(self.runtime.get("version") or "")) if part
        )

    @property
    def device_name(self) -> str:
        """`AMD EPYC ... (CPU)`, as far as it is recorded."""
        device, long = str(self.runtime.get("device") or ""), str(self.runtime.get("device_name") or "")
        return (
            f"{long} ({device})"
            if long and device and long != device
            else long or device or "a device that was not recorded"
        )


def pair_of(item: Figures) -> Pair:
    """The weights with which a row was measured."""
    return Pair(str(item.get("target_weights") or "-"), str(item.get("draft_weights") or "-"))


def milliseconds(seconds: float | None) -> str:
    """`0.412 ms`, `19.3 ms`, `183 ms`, `2.41 s`; `-` when there is none."""
    if seconds is None:
        return "-"
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f} {unit}"


def byte_size(count: float | None) -> str:
    """`5.20 MB`, `692 MB`, `1.31 GB` (decimal); `-` when there is none."""
    if count is None:
        return "-"
    value, unit = next(
        ((count / size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB")) if abs(count) >= size * 0.9995),
        (count / 1e3, "kB"),
    )
    return f"{value:.{0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2}f} {unit}"


def worth(speedup: float) -> Literal["", "good", "bad"]:
    """good: a draft pays; bad: it is slower than none; neither between the two."""
    return "good" if speedup >= WORTH else "bad" if speedup < 1 else ""


def times(value: float | None) -> str:
    """`1.62×`; `-` when there is none."""
    return "-" if value is None else f"{value:.2f}×"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
