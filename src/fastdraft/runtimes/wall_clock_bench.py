"""The benchmark at work on one device: exports, single passes, runs in turn, the breakdown and the memory of a pair.

Decides what is made when, what is kept in which unit, and that models are loaded only where a unit is missing: a killed
benchmark goes on with the unit that it was making.

    models/ROLE-WEIGHTS             exports that the export stage has not made
    units/device.json               what it runs on; another machine does not go on with it
    units/latency-T-D-PREFIX.json   medians of single passes
    units/NAME.counts.json, NAME.repeat-N.json    see wall_clock_runs.py
    units/breakdown-T-D.json, memory-T-D.json
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft.console import Console, Progress
from fastdraft.decoding.latency import Latency
from fastdraft.errors import FastDraftError
from fastdraft.machine import disk_errors
from fastdraft.runtimes.openvino import MODEL_FILE, Precision
from fastdraft.runtimes.wall_clock import Contender
from fastdraft.runtimes.wall_clock_memory import MemoryRun, measure_memory
from fastdraft.runtimes.wall_clock_plan import Plan
from fastdraft.runtimes.wall_clock_runs import (
    ALONE,
    Judge,
    Measured,
    Measurement,
    Units,
    is_finished,
    measure,
    stored,
)

if TYPE_CHECKING:
    from fastdraft.runtimes.openvino_wall_clock import OpenVINOPair

BREAKDOWN_PROMPTS = 4
MEMORY_TOKENS = 64


@dataclass(frozen=True)
class Place:
    """Where and how models run."""

    device: str
    draft_device: str
    precision: Precision
    threads: int
    rows: int
    """Most texts written at a time."""
    eos_ids: tuple[int, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """As the runtime's classes for pairs take them."""
        return {
            "device": self.device,
            "draft_device": self.draft_device,
            "precision": self.precision,
            "threads": self.threads,
        }

    def as_dict(self) -> dict[str, Any]:
        """For `benchmark.json`."""
        return {
            "device": self.device,
            "draft_device": self.draft_device or self.device,
            "threads": self.threads,
            "precision": self.precision,
        }

    @property
    def in_words(self) -> str:
        """CPU, or CPU with the draft on GPU."""
        apart = self.draft_device not in ("", self.device)
        return self.device + (f" with the draft on {self.draft_device}" if apart else "")


@dataclass(frozen=True)
class Pair:
    """Two exports of given weights."""

    target_weights: str
    draft_weights: str
    target: Path
    draft: Path

    @property
    def name(self) -> str:
        return f"{self.target_weights}-{self.draft_weights}"

    @property
    def weights(self) -> tuple[str, str]:
        return self.target_weights, self.draft_weights


@dataclass(frozen=True)
class Bench:
    """A plan, the folder that keeps its units, and where the models run."""

    plan: Plan
    folder: Path
    place: Place
    console: Console

    @property
    def units(self) -> Units:
        return Units(self.folder / "units")

    def claim(self, device: Mapping[str, str]) -> None:
        """Notes the machine, or sees that it is the one that began.

        Raises:
            FastDraftError: when units were measured on another device or release.
        """
        if not self.units.has("device"):
            self.units.write("device", dict(device))
            return
        before = self.units.read("device")
        if before != dict(device):
            found = f"begun on {before.get('device_name')}, OpenVINO {before.get('version')}"
            rule = f"one benchmark is of one device; this is {device['device_name']}, OpenVINO {device['version']}"
            raise FastDraftError(
                self.units.path("device"), found, rule, "go on there, or add --redo benchmark"
            )

    def latencies(self, pair: Pair, prefixes: Sequence[int]) -> list[Latency]:
        """Single passes of a pair behind each prefix."""
        from fastdraft.runtimes.openvino_latency import measure_passes

        widths = sorted({setting.num_speculative_tokens + 1 for setting in self.plan.settings})
        found = []
        for prefix in prefixes:
            name = f"latency-{pair.name}-{prefix}"
            if not self.units.has(name):
                self.console.stop.check(self.folder)
                self.units.write(
                    name,
                    measure_passes(pair.target, pair.draft, widths, prefix, **self.place.settings).to_json(),
                )
            found.append(_as_latency(self.units, name))
        return found

    def finished_tokens(self) -> int:
        """Planned tokens of all units that stand; the sweeps' at whichever K they were made."""
        works = [work for weights in self.plan.weights for work in self.plan.of_tasks(weights)]
        works += [
            work
            for k in {s.num_speculative_tokens for s in self.plan.settings}
            for work in self.plan.of_sweeps(k)
        ]
        return sum(
            work.planned_tokens for work in works for name in self.units.names(work) if self.units.has(name)
        )

    def measure_all(self, models: Models, works: Sequence[Measurement], progress: Progress) -> list[Measured]:
        """Every measurement of a pair; models are loaded only if one is missing."""
        for work in works:
            if is_finished(work, self.units):
                continue

            def on_batch(tokens: int, name: str = work.name) -> None:
                progress.advance(tokens, name)
                self.console.stop.check(self.folder)

            measure(work, models.contenders(work), self.units, models.judge, on_batch)
        return [stored(work, self.units) for work in works]

    def breakdown(self, models: Models, num_speculative_tokens: int) -> dict[str, float]:
        """Seconds of target, draft and all in real runs of a prompt of each task, by OpenVINO's own metrics."""
        name = f"breakdown-{models.pair.name}-k{num_speculative_tokens}"
        if not self.units.has(name):
            prompts = self.plan.tasks[:BREAKDOWN_PROMPTS]
            for chosen in (prompts[:1], prompts):  # the first time warms up
                found = [
                    models.both.breakdown(each.prompt_ids[0], each.max_new_tokens, num_speculative_tokens)
                    for each in chosen
                ]
            names = ("target_seconds", "draft_seconds", "total_seconds")
            self.units.write(
                name, {field: sum(float(getattr(one, field)) for one in found) for field in names}
            )
        return self.units.read(name)

    def memory(self, pair: Pair, num_speculative_tokens: int) -> dict[str, int | None]:
        """Peak bytes of the target alone and with the draft, one prompt of the first task each."""
        name = f"memory-{pair.name}-k{num_speculative_tokens}"
        if not self.units.has(name):
            self.console.stop.check(self.folder)
            first = self.plan.tasks[0]
            run = MemoryRun(
                str(pair.target),
                "",
                first.prompt_ids[0],
                min(MEMORY_TOKENS, first.max_new_tokens),
                num_speculative_tokens,
                eos_ids=list(self.place.eos_ids),
                **self.place.settings,
            )
            found = {
                "alone_bytes": measure_memory(run),
                "with_draft_bytes": measure_memory(run.with_draft(pair.draft)),
            }
            if None in found.values():
                self.console.warn(
                    f"the memory of {pair.name} could not be measured: a process that loads it failed"
                )
            self.units.write(name, found)
        return self.units.read(name)


class Models:
    """A pair of exports, loaded when it is first needed and let go with this object.

    Args:
        pair: The exports.
        place: Where they run.
    """

    def __init__(self, pair: Pair, place: Place) -> None:
        self.pair, self.place = pair, place
        self.judge = lazy_judge(pair.target)

    @cached_property
    def alone(self) -> Contender:
        """The target alone."""
        from fastdraft.runtimes.openvino_wall_clock import OpenVINOTarget

        p = self.place
        return OpenVINOTarget(
            self.pair.target,
            p.eos_ids,
            device=p.device,
            precision=p.precision,
            threads=p.threads,
            rows=p.rows,
        )

    @cached_property
    def both(self) -> OpenVINOPair:
        """The target with its draft."""
        from fastdraft.runtimes.openvino_wall_clock import OpenVINOPair

        return OpenVINOPair(
            self.pair.target, self.pair.draft, self.place.eos_ids, rows=self.place.rows, **self.place.settings
        )

    def contenders(self, work: Measurement) -> dict[str, Contender]:
        """One for each label of a measurement."""
        drafted = {
            s.label: self.both.at(s.num_speculative_tokens, s.confidence_threshold) for s in work.settings
        }
        return {ALONE: self.alone, **drafted}


def _as_latency(units: Units, name: str) -> Latency:
    try:
        return Latency.from_json(units.read(name))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FastDraftError(
            units.path(name),
            "damaged",
            "must hold medians of passes",
            "delete it and run the same command again",
        ) from None


def lazy_judge(target: Path) -> Judge:
    """Asks the exact target about near-ties; it is loaded with the first question, for most texts are equal."""
    opened: list[Any] = []

    def gap(prefix_ids: list[int], first: int, second: int) -> float:
        from fastdraft.runtimes.openvino_ties import TieJudge

        if not opened:
            opened.append(TieJudge(target))
        return float(opened[0].gap(prefix_ids, first, second))

    return gap


def export_pairs(
    weights: Sequence[tuple[str, str]],
    have: Mapping[tuple[str, str], Path],
    folder: Path,
    export: Callable[[str, str, Path, Path | None], None],
) -> list[Pair]:
    """The exports of every pair, missing ones made.

    Args:
        weights: Target's and draft's of every pair.
        have: Exports that stand elsewhere, by role and weights.
        folder: Where missing ones go, as ROLE-WEIGHTS.
        export: Makes one: role, weights, folder, and for a draft the target that it must run with.
    """
    made = dict(have)

    def find(role: str, name: str, target: Path | None) -> Path:
        if (role, name) not in made:
            path = folder / f"{role}-{name}"
            if not path.is_dir():
                with disk_errors(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                export(role, name, path, target)
            made[role, name] = path
        return made[role, name]

    pairs = []
    for of_target, of_draft in weights:
        target = find("target", of_target, None)
        pairs.append(Pair(of_target, of_draft, target, find("draft", of_draft, target)))
    return pairs


def model_sizes(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """`models` of `benchmark.json`: bytes of each export's weights."""
    found = {("target", pair.target_weights): pair.target for pair in pairs} | {
        ("draft", pair.draft_weights): pair.draft for pair in pairs
    }
    return [
        {"role": role, "weights": weights, "bytes": (path / MODEL_FILE).with_suffix(".bin").stat().st_size}
        for (role, weights), path in found.items()
    ]


def busy_share(seconds: float = 0.5) -> float | None:
    """Share of the processors that others keep busy while this process waits; None where it cannot be told."""
    try:
        import psutil
    except ImportError:
        return None
    return float(psutil.cpu_percent(interval=seconds)) / 100
