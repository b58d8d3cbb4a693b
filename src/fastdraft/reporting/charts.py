"""The charts of a report, each one small drawing.

Decides what is drawn against what: losses on a logarithmic axis against tokens, block efficiency and memory-bound
speed-up against K with the best K marked, acceptance against position, and the ladder PT, CP, FT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastdraft.recipe.base import format_count
from fastdraft.reporting.document import Chart
from fastdraft.reporting.drawing import (
    INK,
    LADDER,
    MUTED,
    Label,
    Points,
    draw_line,
    draw_mark,
    draw_range,
    drawing,
    label_ends,
    plain_ticks,
    slug,
    task_colour,
    to_svg,
)
from fastdraft.reporting.paper import PAPER_ROWS, PAPER_TASKS
from fastdraft.reporting.results import (
    SPEEDUPS,
    Results,
    interval,
    k_name,
    number,
    per_position,
    stage_label,
    temperature_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rung = tuple[float | None, tuple[float, float] | None]
"""An acceptance rate and its interval."""


def ladder_charts(results: Results, temperatures: Sequence[float], paper: bool) -> tuple[Chart, ...]:
    """Acceptance rate of every task after each checkpoint; one chart per temperature, then the paper's pairs, all on one scale."""
    ladders: dict[str, dict[str, list[Rung]]] = {}
    for temperature in temperatures:
        ladders[temperature_name(temperature).capitalize()] = {
            task: [_rung(results.row(c, task, temperature, results.headline_k)) for c in results.checkpoints]
            for task in results.tasks
        }
    if paper:
        for pair, rates in PAPER_ROWS.items():
            ladders[f"Paper: {pair}"] = {
                task: [(rates[c][task], None) if c in rates else (None, None) for c in results.checkpoints]
                for task in results.tasks
                if task in PAPER_TASKS
            }
    values = [
        value
        for ladder in ladders.values()
        for rungs in ladder.values()
        for rate, around in rungs
        for value in (rate, around[1] if around else None)
        if value
    ]
    top, names = (
        _nice_top(max(values, default=1.0)),
        [stage_label(checkpoint) for checkpoint in results.checkpoints],
    )
    return tuple(
        _ladder_chart(f"ladder-{i}", title, ladder, names, top)
        for i, (title, ladder) in enumerate(ladders.items())
    )


def _rung(item: Mapping[str, Any] | None) -> Rung:
    return number(item, "acceptance_rate"), interval(item, "acceptance_rate")


def _ladder_chart(
    key: str, title: str, ladder: Mapping[str, Sequence[Rung]], names: Sequence[str], top: float
) -> Chart:
    with drawing(right=80) as (figure, axes):
        labels, tasks = [], list(ladder)
        for index, (task, rungs) in enumerate(ladder.items()):
            colour = task_colour(task, tasks)
            points = [(float(x), rate) for x, (rate, _) in enumerate(rungs) if rate is not None]
            for x, (_, around) in enumerate(rungs):
                if around:
                    at = x + (index - (len(tasks) - 1) / 2) * 0.03
                    draw_range(axes, at, around, colour)
            if points:
                draw_line(axes, points, colour, markers=True)
                labels.append(Label(task[:13], *points[-1], colour))
        axes.set_xticks(range(len(names)), list(names))
        axes.set_xlim(-0.14, len(names) - 1 + 0.14)
        axes.set_ylim(0, top)
        label_ends(axes, labels)
        return Chart(
            to_svg(figure, key, f"Acceptance rate by checkpoint: {title}"),
            title,
            f"Acceptance rate by checkpoint: {title}",
        )


def against_k_chart(
    results: Results, task: str, temperature: float, *, key: str, name: str, limits: tuple[float, float]
) -> Chart:
    """`key` of every checkpoint against K for one task; the K with the highest value is marked on each line."""
    with drawing(right=26) as (figure, axes):
        labels, ks = [], results.ks(None, task, temperature)
        for checkpoint in results.checkpoints:
            colour = _ladder(checkpoint)
            rows = [
                results.row(checkpoint, task, temperature, k)
                for k in results.ks(checkpoint, task, temperature)
            ]
            points = [
                (k, value)
                for row in rows
                if (k := number(row, "num_speculative_tokens")) is not None
                and (value := number(row, key)) is not None
            ]
            if not points:
                continue
            draw_line(axes, points, colour, markers=len(points) < 3)
            _band(axes, rows, key, colour)
            labels.append(Label(stage_label(checkpoint), *points[-1], colour))
            if key in SPEEDUPS:
                _mark_best(axes, points, colour, written=checkpoint == results.final)
        axes.set_ylim(*limits)
        axes.set_xticks(ks)
        axes.set_xlabel("K, draft tokens per round")
        if key in SPEEDUPS:
            axes.axhline(1, color=MUTED, linewidth=1, dashes=(4, 3))
        label_ends(axes, labels)
        alt = f"{name} against K on {task}, {temperature_name(temperature)}"
        return Chart(to_svg(figure, f"{slug(key)}-{slug(task)}", alt), task, alt)


def positions_charts(results: Results, tasks: Sequence[str], temperature: float) -> tuple[Chart, ...]:
    """For each task the share of rounds in which the proposal at each position was accepted, from the largest K, all on one scale."""
    shares = {
        (task, c): per_position(results.row(c, task, temperature, ks[-1]))
        for task in tasks
        for c in results.checkpoints
        if (ks := results.ks(c, task, temperature))
    }
    top = _nice_top(max((share for found in shares.values() for share in found), default=1.0))
    return tuple(
        _positions_chart(
            task, {c: found for (name, c), found in shares.items() if name == task and found}, top
        )
        for task in tasks
    )


def _positions_chart(task: str, shares: Mapping[str, Sequence[float]], top: float) -> Chart:
    with drawing(right=10) as (figure, axes):
        for checkpoint, found in shares.items():
            draw_line(
                axes, [(i + 1.0, share) for i, share in enumerate(found)], _ladder(checkpoint), markers=True
            )
        axes.set_ylim(0, top)
        axes.set_xticks(range(1, max((len(found) for found in shares.values()), default=1) + 1))
        axes.set_xlabel("position in the round")
        alt = f"Share of rounds in which each position was accepted on {task}"
        return Chart(to_svg(figure, f"positions-{slug(task)}", alt), task, alt)


def loss_chart(stage: str, lines: Sequence[Mapping[str, Any]], title: str) -> Chart | None:
    """Training loss (as logged, and smoothed) and validation loss per corpus against trained tokens."""
    train = _series(lines, "loss")
    names = list(dict.fromkeys(name for line in lines for name in _losses(line)))
    validation = {
        name: [
            (x, y)
            for line in lines
            if (x := number(line, "tokens", "step")) is not None and (y := _losses(line).get(name))
        ]
        for name in names
    }
    if len(train) < 2 and not any(len(points) > 1 for points in validation.values()):
        return None
    with drawing(right=52) as (figure, axes):
        labels = []
        if train:
            draw_line(axes, train, MUTED, width=0.7, alpha=0.4)
            draw_line(axes, smooth(train), MUTED, width=1.5)
            labels.append(Label("train", *smooth(train)[-1], MUTED))
        for name, points in validation.items():
            draw_line(axes, points, task_colour(name, names), markers=len(points) < 14)
            labels.append(Label(name[:11], *points[-1], task_colour(name, names)))
        _loss_axes(axes, [y for _, y in train] + [y for points in validation.values() for _, y in points])
        _token_axis(axes)
        label_ends(axes, labels)
        alt = f"{title}: training loss and validation loss against tokens"
        return Chart(to_svg(figure, f"loss-{stage}", alt), title, alt)


def validation_chart(
    stage: str, lines: Sequence[Mapping[str, Any]], best_step: float | None, title: str
) -> Chart | None:
    """Validation block efficiency against trained tokens, the kept checkpoint marked."""
    points = _series(lines, "validation_block_efficiency")
    if len(points) < 2:
        return None
    steps = {
        step: (x, y)
        for line in lines
        if (step := number(line, "step")) is not None
        for x, y in _series([line], "validation_block_efficiency")
    }
    with drawing(right=52) as (figure, axes):
        draw_line(axes, points, LADDER["align"], markers=len(points) < 30)
        low, high = min(y for _, y in points), max(y for _, y in points)
        axes.set_ylim(low - 0.1 * (high - low) - 0.01, high + 0.22 * (high - low) + 0.02)
        _token_axis(axes)
        if best_step in steps:
            x, y = steps[best_step]
            draw_mark(axes, x, y, LADDER["align"])
            axes.annotate(
                f"kept: {y:.2f}",
                (x, y),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                color=INK,
                fontsize=10,
            )
        alt = f"{title}: validation block efficiency against tokens"
        return Chart(to_svg(figure, f"validation-{stage}", alt), title, alt)


def smooth(points: Points, share: float = 0.04) -> Points:
    """A running mean over the latest `share` of all points, so that the trend of a noisy loss can be read."""
    window = max(1, round(len(points) * share))
    means, total = [], 0.0
    for i, (x, y) in enumerate(points):
        total += y - (points[i - window][1] if i >= window else 0.0)
        means.append((x, total / min(i + 1, window)))
    return means


def limits_of(results: Results, key: str, temperature: float) -> tuple[float, float]:
    """One vertical range for all tasks, so that their charts can be compared."""
    rows = results.select(temperature=temperature)
    values = [
        value
        for row in rows
        for value in (number(row, key), *(interval(row, key) or ()))
        if value is not None
    ]
    low, high = min([1.0, *values]), max([1.2, *values])
    return max(0.0, math.floor((low - 0.02) * 10) / 10), high + 0.14 * (high - low)


def _series(lines: Sequence[Mapping[str, Any]], key: str) -> Points:
    found = ((number(line, "tokens", "step"), number(line, key)) for line in lines)
    return [(x, y) for x, y in found if x is not None and y is not None]


def _losses(line: Mapping[str, Any]) -> dict[str, float]:
    losses = line.get("validation_loss")
    if isinstance(losses, Mapping):
        return {str(name): value for name in losses if (value := number(losses, name)) is not None}
    value = number(line, "validation_loss")
    return {} if value is None else {"validation": value}


def _band(axes: Axes, rows: Sequence[Mapping[str, Any] | None], key: str, colour: str) -> None:
    around = [
        (k, *pair)
        for row in rows
        if (pair := interval(row, key)) and (k := number(row, "num_speculative_tokens")) is not None
    ]
    if len(around) > 1:
        axes.fill_between(
            [k for k, _, _ in around],
            [low for _, low, _ in around],
            [high for _, _, high in around],
            color=colour,
            alpha=0.13,
            linewidth=0,
        )


def _mark_best(axes: Axes, points: Points, colour: str, written: bool) -> None:
    x, y = max(points, key=lambda point: (point[1], -point[0]))
    draw_mark(axes, x, y, colour)
    if written:
        side = "left" if x <= points[0][0] + 1 else "right" if x >= points[-1][0] - 1 else "center"
        axes.annotate(
            f"{y:.2f}× at {k_name(x)}",
            (x, y),
            xytext=(0, 8),
            textcoords="offset points",
            ha=side,
            color=INK,
            fontsize=10,
        )


def _loss_axes(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    axes.set_yscale("log")
    axes.set_ylim(low * 0.94, high * 1.04)
    ticks = [
        tick
        for tick in (0.25, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12)
        if low * 0.94 <= tick <= high * 1.04
    ]
    if len(ticks) > 6:
        ticks = ticks[::2]
    if len(ticks) < 2:  # a narrow range between those
        ticks = [
            float(tick)
            for tick in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high)
            if low * 0.94 <= tick <= high * 1.04
        ]
    axes.set_yticks(ticks)
    axes.set_yticks([], minor=True)
    plain_ticks(axes.yaxis)


def _token_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value) if value > 0 else "0"))
    axes.set_xlabel("tokens trained")
    axes.set_xlim(0, axes.get_xlim()[1] / 1.03)


def _ladder(checkpoint: str) -> str:
    return LADDER.get(checkpoint, MUTED)


def _nice_top(value: float) -> float:
    step = 0.1 if value > 0.25 else 0.05
    return min(1.0, math.ceil(value * 1.06 / step) * step) if value > 0 else 1.0
