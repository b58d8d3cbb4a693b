"""The few figures that a terminal shows at the end of a run, in 80 columns.

Decides what closes a run: one table that says per task and temperature how many tokens to propose and what that brings,
and one of the measured wall clock where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdraft.reporting.benchmark_results import Benchmark
from fastdraft.reporting.results import Results, interval, number, stage_label

SummaryTable = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, columns, rows: the arguments of `Console.table`."""

_TASK_WIDTH = 14
_COUNTED = (("num_speculative_tokens", "{:.0f}"), ("block_efficiency", "{:.2f}"))
SPEEDUP_COLUMNS = {
    "mbsu_parameters": "MBSU param",
    "mbsu_bytes": "MBSU bytes",
    "predicted_speedup": "wall clock",
}
"""The kinds of speed-up shown, and their headings."""


def summary_tables(results: Mapping[str, Any], *, prediction: bool = True) -> list[SummaryTable]:
    """What the exported draft brings: for every task and temperature its best K and the speed-ups there.

    Acceptance along the ladder is not repeated here: the evaluate stage has printed it, and the report shows it.
    MBSU is memory-bound speed-up, by parameters (its best K is shown) and by bytes; `wall clock` is what the measured times
    predict for this machine at the same K.

    Args:
        results: The content of `results.json`.
        prediction: Whether to show the predicted wall clock; of no use beside a measured one.

    Returns:
        One table, temperatures in rising order within a task; none when there are no rows.
    """
    figures = Results(results)
    if figures.final is None:
        return []
    shown = {key: name for key, name in SPEEDUP_COLUMNS.items() if prediction or key != "predicted_speedup"}
    rows = [
        _row(figures, task, temperature, tuple(shown))
        for task in figures.tasks
        for temperature in figures.temperatures
        if figures.select(figures.final, task, temperature)
    ]
    if not rows:
        return []
    columns = ["task", "T", "best K", "tokens/pass", *shown.values()]
    return [(f"What the draft ({stage_label(figures.final)}) brings at its best K", columns, rows)]


def measured_tables(raw: Mapping[str, Any]) -> list[SummaryTable]:
    """What the clock of a real runtime says: every task at its best K.

    Args:
        raw: The content of `benchmark.json`.

    Returns:
        One table; none when nothing was measured on which a verdict may rest.
    """
    benchmark = Benchmark(raw)
    rows = []
    for task in benchmark.tasks:
        item = benchmark.best(task)
        around = interval(item, "speedup")
        cells = [show(number(item, key), form) for key, form in _COUNTED]
        cells += [
            show(number(item, "speedup"), "{:.2f}x"),
            f"{around[0]:.2f}-{around[1]:.2f}" if around else "-",
        ]
        cells += [
            show(number(item, "predicted_speedup"), "{:.2f}x"),
            show(number(item, "predicted_quotient"), "{:.2f}"),
        ]
        rows.append([_short(task), *cells])
    columns = ["task", "best K", "tokens/pass", "measured", "range", "predicted", "quotient"]
    return (
        [(f"Wall clock: {benchmark.runtime_name}, {benchmark.runtime.get('device') or '-'}", columns, rows)]
        if rows
        else []
    )


def _short(task: str) -> str:
    return task if len(task) <= _TASK_WIDTH else task[: _TASK_WIDTH - 1] + "…"


def _row(figures: Results, task: str, temperature: float, keys: Sequence[str]) -> list[str]:
    best = figures.best(figures.final, task, temperature)
    counts = [show(number(best, key), form) for key, form in _COUNTED]
    return [_short(task), f"{temperature:g}", *counts, *(show(number(best, key), "{:.2f}x") for key in keys)]


def show(value: float | None, form: str = "{:.3f}") -> str:
    """A figure in the given form, `-` when there is none."""
    return "-" if value is None else form.format(value)
