"""The runs of a benchmark: the target alone and with a draft in turn, then where the time goes and how much memory is held.

`measure_pair` does all of one pair. Every result is a file in the stage's `units/`, kept when it ends: a killed benchmark repeats at most one
of them, no repeat is ever made of runs from two processes, and models are loaded only where something is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastdraft.benchmark.memory import measure_memory
from fastdraft.benchmark.plan import ALONE, BenchmarkPlan, Measurement
from fastdraft.benchmark.rows import BreakdownRow, MemoryRow, PassesRow
from fastdraft.functional.acceptance import counts_to_array
from fastdraft.functional.generation import Sampling
from fastdraft.functional.same_text import compare_texts
from fastdraft.json_rows import JsonRow
from fastdraft.run_folder import StageFolder, digest
from fastdraft.runtimes.runtime import LoadedPair, Runtime, TimedBatch

PREFIX_TOKENS = 128
_WARM_UP_TOKENS = 8
_BREAKDOWN_TASKS = 4
_MEMORY_TOKENS = 64
OnBatch = Callable[[int, str], None]


@dataclass(frozen=True)
class ExportedPair:
    """Two exports of given weights."""

    weights: tuple[str, str]
    target: Path
    draft: Path

    @property
    def name(self) -> str:
        return "-".join(self.weights)

    @property
    def named(self) -> dict[str, str]:
        """The fields of a row."""
        return {"target_weights": self.weights[0], "draft_weights": self.weights[1]}


@dataclass(frozen=True)
class Measured:
    """A measurement and what its files hold."""

    work: Measurement
    counts: dict[str, Any]
    """Texts, counts and comparisons of every label."""
    repeats: list[dict[str, Any]]
    """Times of every label, by repeat."""


def finished_tokens(plan: BenchmarkPlan, folder: StageFolder) -> int:
    """Planned tokens of everything that was measured before."""
    works = [work for weights in plan.weights for work in plan.of_tasks(weights)] + plan.of_sweeps(1)
    names = [(work.planned_tokens, name) for work in works for name in _unit_names(work, plan.repeats)]
    return sum(tokens for tokens, name in names if (folder.path / name).is_file())


def _unit_names(work: Measurement, repeats: int) -> list[str]:
    parts = ["counts", *(f"repeat-{number}" for number in range(1, repeats + 1))]
    return [f"units/{work.name}.{part}.json" for part in parts]


def measure(
    work: Measurement,
    pair: LoadedPair,
    runtime: Runtime,
    folder: StageFolder,
    repeats: int,
    on_batch: OnBatch,
) -> Measured:
    """Makes what is missing of a measurement.

    A baseline is never taken from another time: all labels (the target alone, then each K) answer a prompt one after the other before the
    next prompt comes, and every second repeat goes through them from the other end, so that a slow spell of the machine, a warm cache or a
    falling clock hits all alike. Before that an untimed run with exact counts warms up, and gives the counts and the texts.
    """
    first, *rest = _unit_names(work, repeats)
    warm = False

    def counted() -> dict[str, Any]:
        nonlocal warm
        warm = True
        return _counted(work, pair, runtime.lossless_sampling, on_batch)

    def timed(number: int) -> dict[str, Any]:
        nonlocal warm
        if not warm:  # a process that goes on with timing
            for k in work.labels.values():
                _answers(work, pair, k, work.batches[0], tokens=_WARM_UP_TOKENS)
            warm = True
        return _timed(work, pair, number, on_batch)

    counts = folder.keep(first, counted)
    return Measured(
        work, counts, [folder.keep(name, partial(timed, number)) for number, name in enumerate(rest)]
    )


def _answers(
    work: Measurement,
    pair: LoadedPair,
    k: int,
    places: Sequence[int],
    *,
    exact: bool = False,
    tokens: int = 0,
) -> TimedBatch:
    seed = int(digest([work.seed, work.name, places[0]]), 16) % 2**31
    prompts = [work.prompts.prompt_ids[place] for place in places]
    tokens = min(tokens or work.prompts.max_new_tokens, work.prompts.max_new_tokens)
    if k == 0:
        return pair.write(prompts, Sampling(work.temperature), tokens, seed)
    return pair.write_with_draft(prompts, Sampling(work.temperature), tokens, seed, k, exact_counts=exact)


def _counted(
    work: Measurement, pair: LoadedPair, lossless_sampling: bool, on_batch: OnBatch
) -> dict[str, Any]:
    """Texts, counts and comparisons of every label, untimed."""
    found: dict[str, dict[str, list[Any]]] = {
        label: {"response_ids": [], "counts": []} for label in work.labels
    }
    for places in work.batches:
        for label, k in work.labels.items():
            for text in _answers(work, pair, k, places, exact=True).texts:
                found[label]["response_ids"].append([int(token) for token in text.response_ids])
                if k:  # null for a text without a round: one that ended at its first token
                    numbers = [
                        None if math.isnan(value) else float(value) for value in counts_to_array(text.counts)
                    ]
                    found[label]["counts"].append(numbers if text.rounds else None)
        on_batch(len(places) * work.prompts.max_new_tokens * len(work.labels), work.name)
    own, greedy = found[ALONE]["response_ids"], work.temperature == 0
    drafted = [label for label in work.labels if label != ALONE]
    return {
        "prompt_tokens": [len(ids) for ids in work.prompts.prompt_ids],
        "texts": found,
        "lossless": {label: greedy or label == ALONE or lossless_sampling for label in work.labels},
        "differences": {
            label: _differences(work, own, found[label]["response_ids"], pair) if greedy else None
            for label in drafted
        },
    }


def _differences(
    work: Measurement, own: list[list[int]], others: list[list[int]], pair: LoadedPair
) -> list[dict[str, Any]]:
    """Where texts leave the target's own, each with how near the two tokens are under the target."""
    found = []
    for name, prompt, *texts in zip(work.prompts.names, work.prompts.prompt_ids, own, others, strict=True):
        mismatch = compare_texts(prompt, *texts, pair.gap)
        if mismatch:
            found.append({"prompt": name, "token": mismatch.place, "logprob_gap": mismatch.gap})
    return found


def _timed(work: Measurement, pair: LoadedPair, number: int, on_batch: OnBatch) -> dict[str, Any]:
    """One repeat: batch by batch, every label in turn."""
    order = list(work.labels) if number % 2 == 0 else list(work.labels)[::-1]
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in work.labels}
    for places in work.batches:
        for label in order:
            batch = _answers(work, pair, work.labels[label], places)
            runs[label].append(
                {
                    "seconds": batch.seconds,
                    "num_tokens": [len(text.response_ids) for text in batch.texts],
                    "text_seconds": [text.seconds for text in batch.texts],
                    "first_token_seconds": [text.first_token_seconds for text in batch.texts],
                }
            )
        on_batch(len(places) * work.prompts.max_new_tokens * len(order), work.name)
    return {"order": order, "runs": runs}


def measure_passes(
    plan: BenchmarkPlan, pair: ExportedPair, runtime: Runtime, folder: StageFolder
) -> list[PassesRow]:
    """Single passes of a pair behind the usual prefix; of the deployed pair also behind the swept ones."""
    swept = (
        [p.value for p in plan.swept if p.part == "prompt_tokens"] if pair.weights == plan.weights[0] else []
    )
    widths = sorted(k + 1 for k in plan.num_speculative_tokens)
    found = []
    for prefix in sorted({PREFIX_TOKENS, *swept}):

        def make(prefix: int = prefix) -> PassesRow | None:
            found = runtime.measure_passes(pair.target, pair.draft, widths, prefix)
            return found and PassesRow(
                **pair.named,
                prefix_tokens=found.prefix_tokens,
                draft_seconds=found.draft_seconds,
                target_seconds=found.target_seconds,
                device=runtime.device,
                draft_device=runtime.draft_device or runtime.device,
            )

        found.append(_keep_row(folder, f"latency-{pair.name}-{prefix}", PassesRow, make))
    return [row for row in found if row is not None]


def measure_time_spent(
    plan: BenchmarkPlan, exported: ExportedPair, pair: LoadedPair, k: int, folder: StageFolder
) -> BreakdownRow | None:
    """Where the time of real runs goes, of a prompt of each task together; None where the runtime does not tell."""

    def make() -> BreakdownRow | None:
        chosen = plan.tasks[:_BREAKDOWN_TASKS]
        found = [pair.time_spent(p.prompt_ids[0], p.max_new_tokens, k) for p in chosen]
        spent = [(each.target_seconds, each.draft_seconds, each.total_seconds) for each in found if each]
        if not spent:
            return None
        target, draft, total = map(sum, zip(*spent, strict=True))
        return BreakdownRow(
            **exported.named,
            num_speculative_tokens=k,
            target_seconds=round(target, 6),
            draft_seconds=round(draft, 6),
            other_seconds=round(max(0.0, total - target - draft), 6),
            total_seconds=round(total, 6),
        )

    return _keep_row(folder, f"breakdown-{exported.name}-k{k}", BreakdownRow, make)


def measure_peaks(
    plan: BenchmarkPlan, pair: ExportedPair, runtime: Runtime, k: int, folder: StageFolder
) -> MemoryRow:
    """Peak bytes of the target alone and with the draft, each for one prompt of the first task."""
    first = plan.tasks[0]

    def make() -> MemoryRow:
        tokens = min(_MEMORY_TOKENS, first.max_new_tokens)
        peak = partial(measure_memory, runtime, pair.target, pair.draft, first.prompt_ids[0], tokens)
        return MemoryRow(**pair.named, alone_bytes=peak(0), with_draft_bytes=peak(k))

    return _keep_row(folder, f"memory-{pair.name}-k{k}", MemoryRow, make)


def _keep_row(folder: StageFolder, name: str, kind: Any, make: Callable[[], JsonRow | None]) -> Any:
    value = folder.keep(f"units/{name}.json", lambda: (row := make()) and row.to_json())
    return value and kind.from_json(value)


def busy_share(seconds: float = 0.5) -> float | None:
    """Share of the processors that others keep busy while this process waits; None where it cannot be told."""
    try:
        import psutil
    except ImportError:
        return None
    return float(psutil.cpu_percent(interval=seconds)) / 100
