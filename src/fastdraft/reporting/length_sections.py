"""The chapter on acceptance along the text: by absolute position, where the texts are long enough to tell.

Decides that nothing is said of texts that all end in the first bucket, that the final draft is shown at the headline temperature, and
that what lies beyond the longest text is named as not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdraft.reporting.document import Block, Cell, Chart, Charts, Section, Table, Text, row
from fastdraft.reporting.drawing import Label, draw_line, draw_range, drawing, label_ends, task_colour, to_svg
from fastdraft.reporting.record import RunRecord
from fastdraft.reporting.results import (
    Figures,
    Results,
    interval,
    k_name,
    number,
    stage_label,
    temperature_name,
)
from fastdraft.reporting.summary import show


def length_section(record: RunRecord) -> Section | str | None:
    """Acceptance by position, a table for each temperature; None where every text ends in the first bucket."""
    results = Results(record.results or {})
    found = results.raw.get("by_position")
    if not isinstance(found, Mapping):
        return None
    rows = [
        item
        for item in found.get("rows") or []
        if isinstance(item, Mapping) and item.get("checkpoint") == results.final
    ]
    starts = sorted({int(first) for item in rows if (first := number(item, "from")) is not None})
    if len(starts) < 2:
        return None
    k, temperature = number(found, "num_speculative_tokens"), results.headline_temperature
    shown = [item for item in rows if item.get("temperature") == temperature]
    caption = f"Acceptance rate of {stage_label(results.final or '-')} by position in the text, {k_name(k)}, {temperature_name(temperature)}"
    blocks: list[Block] = [
        Text(_sentence(case), "bad") for case in found.get("faded") or [] if isinstance(case, Mapping)
    ]
    if any(number(item, "from") for item in shown):
        blocks.append(
            Charts((_chart(shown, starts, results.tasks, caption),), f"{caption}; bars are 95 % intervals.")
        )
    blocks += [
        _table([item for item in rows if item.get("temperature") == t], starts, results.tasks, k, t)
        for t in sorted(results.temperatures, key=lambda t: (t != temperature, t))
    ]
    blocks.append(Text(_reach(starts[-1], number(found, "context_length")), "muted"))
    lead = "Where in a text, prompt included, proposals are accepted: a round counts at the position of its first proposal."
    return Section("Acceptance along the text", "along-the-text", tuple(blocks), lead)


def bucket_name(first: int) -> str:
    """0 -> `0-512`, 1024 -> `1k-2k`."""
    return f"{_short(first)}\u2013{_short(first * 2 or 512)}"


def _short(position: int) -> str:
    return f"{position // 1024}k" if position and position % 1024 == 0 else str(position)


def _table(
    rows: Sequence[Figures], starts: Sequence[int], tasks: Sequence[str], k: float | None, temperature: float
) -> Table:
    by_place = {(item.get("task"), number(item, "from")): item for item in rows}
    lines = [
        row(task, *(_cell(by_place.get((task, start))) for start in starts))
        for task in tasks
        if any(t == task for t, _ in by_place)
    ]
    caption = f"Acceptance rate and tokens per target pass by position, {k_name(k)}, {temperature_name(temperature)}"
    return Table(("Task", *map(bucket_name, starts)), tuple(lines), caption)


def _cell(item: Figures | None) -> Cell:
    rate, prompts = number(item, "acceptance_rate"), number(item, "num_prompts")
    if rate is None or prompts is None:
        return Cell("-")
    return Cell(
        f"{rate:.3f}", f"{show(number(item, 'block_efficiency'), '{:.2f}')} a pass, {prompts:g} texts"
    )


def _chart(rows: Sequence[Figures], starts: Sequence[int], tasks: Sequence[str], alt: str) -> Chart:
    with drawing(right=80) as (figure, axes):
        labels = []
        for index, task in enumerate(tasks):
            colour, mine = task_colour(task, tasks), [item for item in rows if item.get("task") == task]
            points = [
                (float(starts.index(int(first))), rate)
                for item in mine
                if (first := number(item, "from")) is not None
                and (rate := number(item, "acceptance_rate")) is not None
            ]
            for item in mine:
                if (around := interval(item, "acceptance_rate")) and (
                    first := number(item, "from")
                ) is not None:
                    draw_range(
                        axes, starts.index(int(first)) + (index - (len(tasks) - 1) / 2) * 0.03, around, colour
                    )
            if points:
                draw_line(axes, points, colour, markers=True)
                labels.append(Label(task[:13], *points[-1], colour))
        axes.set_xticks(range(len(starts)), [bucket_name(start) for start in starts])
        axes.set_xlim(-0.14, len(starts) - 1 + 0.14)
        axes.set_ylim(0, None)
        axes.set_xlabel("position in the text, tokens")
        label_ends(axes, labels)
        return Chart(to_svg(figure, "along-the-text", alt), "By position", alt)


def _sentence(case: Mapping[str, Any]) -> str:
    rate, before, first = (
        number(case, key) or 0.0 for key in ("acceptance_rate", "best_acceptance_rate", "from")
    )
    place = f"{case.get('task')} at {temperature_name(number(case, 'temperature'))}"
    return f"{place}: from position {first:,.0f} on the acceptance rate is {rate:.3f}, under half of the {before:.3f} before."


def _reach(last: int, context_length: float | None) -> str:
    end = last * 2 or 512
    if context_length is None or context_length <= end:
        return "The texts reach the end of the context."
    return f"The context has {context_length:,.0f} positions; beyond {end:,} nothing was measured."
