"""The figures at the top of the page.

Decides that there are at most four tiles of tasks, the measured ones first, and what the others say: the draft's size, its
cost, its training and its time.
"""

from __future__ import annotations

from fastdraft.console import format_seconds
from fastdraft.recipe.base import format_count
from fastdraft.reporting.benchmark_results import Benchmark, times, worth
from fastdraft.reporting.document import Tile
from fastdraft.reporting.record import RunRecord
from fastdraft.reporting.results import Results, interval, k_name, number, stage_label
from fastdraft.reporting.verdict import best_rows

TASK_TILES = 4


def tiles(record: RunRecord) -> tuple[Tile, ...]:
    """The summary: one tile per task (at most four), then the draft, its cost, its training and its time."""
    results, design = Results(record.results or {}), record.manifests.get("design", {})
    measured = _measured_tiles(Benchmark(record.benchmark or {}))
    found = [*measured.values(), *_forecast_tiles(results, measured)][:TASK_TILES]
    parameters, target = number(design, "parameters"), design.get("target")
    if parameters is not None:
        of = number(target if isinstance(target, dict) else None, "parameters")
        found.append(
            Tile(
                "Draft parameters",
                format_count(parameters),
                f"the target has {format_count(of)}" if of else "",
            )
        )
    names = ("parameters", "bytes", "latency")
    ratios = [
        (name, ratio)
        for name in names
        if (ratio := number(record.results, f"cost_ratio_{name}") or number(design, f"cost_ratio_{name}"))
        is not None
    ]
    if ratios:
        others = ", ".join(f"{ratio:.3g} by {name}" for name, ratio in ratios[1:])
        found.append(Tile("Cost ratio by " + ratios[0][0], f"{ratios[0][1]:.3g}", others))
    return (*found, *_work_tiles(record))


def _work_tiles(record: RunRecord) -> list[Tile]:
    found = []
    tokens = {
        stage: count
        for stage in ("pretrain", "continue_pretrain", "align")
        if (count := number(record.manifests.get(stage), "tokens")) is not None
    }
    if tokens:
        stages = ", ".join(f"{stage_label(s)} {format_count(n)}" for s, n in tokens.items())
        found.append(Tile("Trained on", f"{format_count(sum(tokens.values()))} tokens", stages))
    seconds = [value for stage in record.manifests if (value := record.seconds(stage)) is not None]
    if seconds:
        unit = "hours:minutes:seconds" if sum(seconds) >= 3600 else "minutes:seconds, all stages so far"
        found.append(Tile("Time", format_seconds(sum(seconds)), unit))
    return found


def _measured_tiles(benchmark: Benchmark) -> dict[str, Tile]:
    """By task, the measured speed-up at its best K."""
    found = {}
    for task in benchmark.tasks:
        item = benchmark.best(task)
        speedup, around = number(item, "speedup"), interval(item, "speedup")
        if speedup is None:
            continue
        parts = [f"{around[0]:.2f} to {around[1]:.2f}"] if around else []
        parts.append(k_name(number(item, "num_speculative_tokens")))
        predicted = number(item, "predicted_speedup")
        parts += [f"{times(predicted)} predicted"] if predicted is not None else []
        found[task] = Tile(f"{task.capitalize()}, measured", times(speedup), ", ".join(parts), worth(speedup))
    return found


def _forecast_tiles(results: Results, measured: dict[str, Tile]) -> list[Tile]:
    """Of tasks without a measurement, the memory-bound speed-up at the best K."""
    if not results.speedups:
        return []
    key = results.speedups[0]
    best = best_rows(results, key)
    found = []
    for task in [task for task in results.tasks if task in best and task not in measured]:
        speedup, k = number(best[task], key) or 0.0, number(best[task], "num_speculative_tokens") or 0
        detail = f"{number(best[task], 'block_efficiency') or 0:.2f} tokens per target pass, {k_name(k)}"
        label = f"{task.capitalize()}, memory-bound" if measured else task.capitalize()
        found.append(Tile(label, f"{speedup:.2f}×", detail, "good" if speedup > 1 else "bad"))
    return found
