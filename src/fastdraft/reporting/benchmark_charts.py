"""The charts of a measured wall clock, each one small drawing.

Decides what is drawn against what: measured and predicted speed-up against K (solid with ranges, dashed), the pairs of
weights as bars, one changed circumstance at a time on a logarithmic axis, and the shares of a speculative run's time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fastdraft.recipe.base import format_count
from fastdraft.reporting.benchmark_results import SWEEPS, Benchmark, Pair, pair_of, times
from fastdraft.reporting.document import Chart
from fastdraft.reporting.drawing import (
    INK,
    LADDER,
    MUTED,
    PAPER,
    Label,
    Points,
    draw_line,
    draw_mark,
    draw_range,
    drawing,
    label_ends,
    slug,
    task_colour,
    to_svg,
)
from fastdraft.reporting.results import Figures, interval, k_name, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARES = (
    ("target_seconds", "ladder-3", "passes of the target", LADDER["align"]),
    ("draft_seconds", "ladder-2", "passes of the draft", LADDER["continue_pretrain"]),
    ("other_seconds", "ladder-1", "the runtime around them", LADDER["pretrain"]),
)
"""Where the time of a speculative run goes: key, series class, words, colour."""


def wall_clock_charts(benchmark: Benchmark) -> tuple[Chart, ...]:
    """For each task the measured speed-up (solid, with ranges) and the predicted one (dashed) against K, all on one scale."""
    rows = {task: benchmark.against_k(task) for task in benchmark.tasks}
    rows = {task: found for task, found in rows.items() if len(_points(found, "speedup")) > 1}
    limits = _limits(
        value
        for found in rows.values()
        for item in found
        for value in (*_measured(item), number(item, "predicted_speedup"))
    )
    return tuple(_against_k(benchmark, task, found, limits) for task, found in rows.items())


def _against_k(
    benchmark: Benchmark, task: str, rows: Sequence[Figures], limits: tuple[float, float]
) -> Chart:
    measured, predicted = _points(rows, "speedup"), _points(rows, "predicted_speedup")
    best, colour = benchmark.best(task), task_colour(task, benchmark.tasks)
    k, value = number(best, "num_speculative_tokens"), number(best, "speedup")
    with drawing(right=64) as (figure, axes):
        axes.axhline(1, color=MUTED, linewidth=1, dashes=(1, 2))
        for item in rows:
            _range(axes, number(item, "num_speculative_tokens"), item, colour)
        if predicted:
            axes.plot(
                [x for x, _ in predicted],
                [y for _, y in predicted],
                color=colour,
                linewidth=1.5,
                dashes=(4, 3),
            )
        draw_line(axes, measured, colour, markers=True)
        if k is not None and value is not None:
            draw_mark(axes, k, value, colour)
        axes.set_ylim(*limits)
        axes.set_xticks([x for x, _ in measured])
        axes.set_xlabel("K, draft tokens per round")
        ends = [
            Label("measured", *measured[-1], colour),
            *([Label("predicted", *predicted[-1], colour)] if predicted else []),
        ]
        label_ends(axes, ends)
        alt = f"Speed-up against K on {task}: measured {_told(measured)}" + (
            f"; predicted {_told(predicted)}" if predicted else ""
        )
        return Chart(
            to_svg(figure, f"wall-clock-{slug(task)}", alt), f"{task}: {times(value)} at {k_name(k)}", alt
        )


def pair_charts(benchmark: Benchmark) -> tuple[Chart, ...]:
    """For each task a bar per pair of weights at its best K, all on one scale; none where there is one pair alone."""
    bars = {
        task: [(pair, item) for pair in benchmark.pairs if (item := benchmark.best(task, pair)) is not None]
        for task in benchmark.tasks
    }
    bars = {task: found for task, found in bars.items() if len(found) > 1}
    top = max(
        (value for found in bars.values() for _, item in found for value in _measured(item)), default=1.0
    )
    return tuple(
        _pair_chart(task, found, benchmark.tasks, 1.16 * max(top, 1.0)) for task, found in bars.items()
    )


def _pair_chart(task: str, bars: Sequence[tuple[Pair, Figures]], tasks: Sequence[str], top: float) -> Chart:
    colour = task_colour(task, tasks)
    with drawing(right=8) as (figure, axes):
        for x, (_, item) in enumerate(bars):
            value, around = number(item, "speedup") or 0.0, interval(item, "speedup")
            axes.bar(
                [x],
                [value],
                width=min(0.62, 0.16 * len(bars)),
                color=colour,
                alpha=0.85 if x == 0 else 0.5,
                linewidth=0,
            )
            _range(axes, x, item, INK, alpha=0.8)
            if len(bars) <= 5:
                high = max(value, around[1]) if around else value
                axes.annotate(
                    times(value),
                    (x, high),
                    xytext=(0, 4),
                    textcoords="offset points",
                    ha="center",
                    color=INK,
                    fontsize=10,
                    zorder=6,
                    bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.9, "pad": 1},
                )
        axes.axhline(1, color=MUTED, linewidth=1, dashes=(1, 2))
        names = [f"{pair.target}\n+ {pair.draft}" if len(bars) > 2 else pair.name for pair, _ in bars]
        axes.set_xticks(range(len(bars)), names, fontsize=10 if len(bars) < 5 else 8)
        axes.set_xlim(-0.6, len(bars) - 0.4)
        axes.set_ylim(0, top)
        told = ", ".join(f"{pair.name} {times(number(item, 'speedup'))}" for pair, item in bars)
        alt = f"Measured speed-up on {task} by weights of target + draft: {told}"
        return Chart(to_svg(figure, f"weights-{slug(task)}", alt), task, alt)


def sweep_charts(benchmark: Benchmark) -> tuple[Chart, ...]:
    """Measured speed-up against prompt length, output length and concurrency, a line per task, all on one scale."""
    found = {
        part: {task: rows for task, rows in benchmark.sweep(part).items() if len(rows) > 1} for part in SWEEPS
    }
    limits = _limits(
        value
        for tasks in found.values()
        for rows in tasks.values()
        for item in rows
        for value in _measured(item)
    )
    return tuple(_sweep_chart(part, tasks, limits) for part, tasks in found.items() if tasks)


def _sweep_chart(part: str, tasks: Mapping[str, Sequence[Figures]], limits: tuple[float, float]) -> Chart:
    labels, told = [], []
    with drawing(right=80) as (figure, axes):
        axes.set_xscale("log")
        axes.axhline(1, color=MUTED, linewidth=1, dashes=(1, 2))
        for task, rows in tasks.items():
            colour, points = task_colour(task, list(tasks)), _points(rows, "speedup", part)
            for item in rows:
                _range(axes, number(item, part), item, colour)
            draw_line(axes, points, colour, markers=True)
            labels.append(Label(task[:13], *points[-1], colour))
            told.append(f"{task} " + ", ".join(f"{times(y)} at {x:g}" for x, y in points))
        axes.set_xticks(_ticks([x for rows in tasks.values() for x, _ in _points(rows, "speedup", part)]))
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(lambda value, _: format_count(round(value)))
        axes.set_ylim(*limits)
        label_ends(axes, labels)
        alt = f"Measured speed-up against {SWEEPS[part].lower()}: {'; '.join(told)}"
        return Chart(to_svg(figure, f"sweep-{part}", alt), SWEEPS[part], alt)


def breakdown_chart(items: Sequence[Figures]) -> Chart | None:
    """Shares of a speculative run's time, one lying bar for each pair of weights."""
    rows = [(item, shares) for item in items if (shares := shares_of(item))]
    if not rows:
        return None
    told = []
    with drawing(height=47 + 46 * len(rows), right=10, left=8) as (figure, axes):
        for i, (item, shares) in enumerate(rows):
            start = 0.0
            for share, (_, _, _, colour) in zip(shares, SHARES, strict=True):
                axes.barh([-i], [share], left=start, height=0.42, color=colour, linewidth=0)
                start += share
            name = f"{pair_of(item).name}, {k_name(number(item, 'num_speculative_tokens'))}"
            figures = " / ".join(f"{share:.0%}" for share in shares)
            axes.annotate(
                f"{name}: {figures}",
                (0, -i + 0.21),
                xytext=(0, 4),
                textcoords="offset points",
                color=INK,
                fontsize=10,
            )
            told.append(
                f"{name}: "
                + ", ".join(
                    f"{words} {share:.0%}" for share, (_, _, words, _) in zip(shares, SHARES, strict=True)
                )
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(-len(rows) + 0.7, 0.75)
        axes.set_yticks([])
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.grid(visible=False)
        alt = f"Where the time of a speculative run goes: {'; '.join(told)}"
        return Chart(to_svg(figure, "where-the-time-goes", alt), "", alt)


def shares_of(item: Figures) -> list[float] | None:
    """Shares of target passes, draft passes and the rest; None when they cannot be computed."""
    parts = [number(item, key) for key, _, _, _ in SHARES]
    known = [max(0.0, part) for part in parts if part is not None]
    total = sum(known)
    return [part / total for part in known] if len(known) == len(SHARES) and total > 0 else None


def _measured(item: Figures) -> tuple[float, ...]:
    value = number(item, "speedup")
    return *(() if value is None else (value,)), *(interval(item, "speedup") or ())


def _points(rows: Iterable[Figures], key: str, at: str = "num_speculative_tokens") -> Points:
    found = ((number(item, at), number(item, key)) for item in rows)
    return [(x, y) for x, y in found if x is not None and y is not None]


def _range(axes: Axes, x: float | None, item: Figures, colour: str, alpha: float = 0.5) -> None:
    around = interval(item, "speedup")
    if around and x is not None:
        draw_range(axes, x, around, colour, alpha)


def _told(points: Points) -> str:
    return ", ".join(f"{times(y)} at {k_name(x)}" for x, y in points)


def _limits(values: Iterable[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None]
    low, high = min([1.0, *known]), max([1.2, *known])
    return max(0.0, math.floor((low - 0.04) * 10) / 10), high + 0.06 * (high - low)


def _ticks(values: Iterable[float]) -> list[float]:
    """Those of the values that stand apart enough on a logarithmic axis for their figures to be read."""
    found: list[float] = []
    for value in sorted({value for value in values if value > 0}):
        if not found or value / found[-1] > 1.6:
            found.append(value)
    return found
