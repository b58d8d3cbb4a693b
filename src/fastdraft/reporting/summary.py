"""The few figures that a terminal shows at the end of a run, in 80 columns.

Decides what fits: one table of acceptance along the ladder, block efficiency and memory-bound speed-up per task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdraft.reporting.results import Results, k_name, number, stage_label, temperature_name

SummaryTable = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, columns, rows: the arguments of `Console.table`."""

_TASK_WIDTH = 14


def summary_tables(results: Mapping[str, Any]) -> list[SummaryTable]:
    """One table per temperature: tasks by acceptance rate of each checkpoint, block efficiency and speed-ups of the last one.

    MBSU is by parameters; `predicted` is the wall-clock speed-up that the measured times predict at the same K.

    Args:
        results: The content of `results.json`.

    Returns:
        At most one table for each temperature, the headline temperature first; nothing when there are no rows.
    """
    figures = Results(results)
    first = figures.headline_temperature
    order = sorted(figures.temperatures, key=lambda temperature: (temperature != first, temperature))
    return [table for temperature in order if (table := _table(figures, temperature)) is not None]


def _table(figures: Results, temperature: float) -> SummaryTable | None:
    k, final = figures.headline_k, figures.final
    checkpoints = figures.checkpoints[-3:]
    rows = [_row(figures, checkpoints, task, temperature) for task in figures.tasks if figures.select(task=task, temperature=temperature)]
    if not rows or final is None:
        return None
    last = stage_label(final)[:8]
    title = f"Acceptance rate at {k_name(k)}, {temperature_name(temperature)}; then {last} at its best K"
    columns = ["task", *(stage_label(checkpoint)[:8] for checkpoint in checkpoints), "tokens/pass", "best K", "MBSU", "predicted"]
    return title, columns, rows


def _row(figures: Results, checkpoints: Sequence[str], task: str, temperature: float) -> list[str]:
    rates = [show(number(figures.row(checkpoint, task, temperature, figures.headline_k), "acceptance_rate")) for checkpoint in checkpoints]
    best = figures.best(figures.final, task, temperature)
    k = number(best, "num_speculative_tokens")
    name = task if len(task) <= _TASK_WIDTH else task[: _TASK_WIDTH - 1] + "…"
    speedups = [show(number(best, key), "{:.2f}x") for key in ("mbsu_parameters", "predicted_speedup")]
    return [name, *rates, show(number(best, "block_efficiency"), "{:.2f}"), f"{k:.0f}" if k is not None else "-", *speedups]


def show(value: float | None, form: str = "{:.3f}") -> str:
    """A figure in the given form, `-` when there is none."""
    return "-" if value is None else form.format(value)
