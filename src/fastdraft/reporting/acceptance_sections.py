"""The chapters made from `results.json`: ladder, differences, speed-up against K, positions, checks.

Decides what each chapter says and shows; a chapter whose material is missing returns the line that says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdraft.reporting.charts import against_k_chart, ladder_charts, limits_of, positions_charts
from fastdraft.reporting.document import Block, Cell, Charts, Details, Row, Section, Table, Text, row
from fastdraft.reporting.paper import PAPER_ROWS, PAPER_TASKS
from fastdraft.reporting.record import RunRecord
from fastdraft.reporting.results import (
    HEADLINE_K,
    HEADLINE_TEMPERATURE,
    SPEEDUPS,
    Figures,
    Results,
    interval,
    k_name,
    number,
    per_position,
    stage_label,
    temperature_name,
)
from fastdraft.reporting.summary import show
from fastdraft.reporting.verdict import listing

KEYS = (
    ("muted", "untrained"),
    ("ladder-1", "PT, text pre-training"),
    ("ladder-2", "CP, continued on code and text"),
    ("ladder-3", "FT, aligned to the target"),
)


def ladder_section(record: RunRecord) -> Section | str:
    """Acceptance rate per task after each checkpoint, beside the paper's."""
    results = Results(record.results or {})
    temperatures = by_headline(results)
    if not temperatures:
        return "Acceptance ladder: the run has no evaluation results."
    beside = temperatures[0] == HEADLINE_TEMPERATURE and results.headline_k == HEADLINE_K
    blocks: list[Block] = []
    if len(results.checkpoints) > 1:
        caption = (
            f"Acceptance rate at {k_name(results.headline_k)} after each checkpoint; bars are 95 % intervals."
        )
        blocks.append(
            Charts(
                ladder_charts(results, temperatures[:2], paper=beside),
                caption + (" All on one scale." if beside else ""),
            )
        )
    blocks += [
        ladder_table(results, temperature, paper=beside and i == 0)
        for i, temperature in enumerate(temperatures)
    ]
    counts = listing([words for task in results.tasks if (words := _prompts(results, task))])
    if counts:
        blocks.append(Text(f"Prompts: {counts}.", "muted"))
    lead = (
        "Share of the draft's proposals that the target accepts. PT is the text-only checkpoint, CP adds code, FT is "
        "fine-tuned on what the target wrote."
    )
    return Section("Acceptance ladder", "ladder", tuple(blocks), lead)


def _prompts(results: Results, task: str) -> str:
    """For example `12 for talks (drawn as 4 for the intervals)`; empty where the results do not tell."""
    row: Mapping[str, Any] = (results.select(task=task) or [{}])[0]
    prompts, talks = number(row, "num_prompts"), number(row, "num_conversations")
    if prompts is None:
        return ""
    return f"{prompts:g} for {task}" + (
        f" (drawn as {talks:g} for the intervals)" if talks is not None and talks < prompts else ""
    )


def by_headline(results: Results) -> list[float]:
    """Temperatures, the headline one first."""
    return sorted(results.temperatures, key=lambda t: (t != results.headline_temperature, t))


def ladder_table(results: Results, temperature: float, paper: bool) -> Table:
    """Checkpoints down, tasks across; intervals in small print, the highest figure of a column marked."""
    rates = {
        (c, t): results.row(c, t, temperature, results.headline_k)
        for c in results.checkpoints
        for t in results.tasks
    }
    top = {
        task: max(
            (number(rates[c, task], "acceptance_rate") or 0.0 for c in results.checkpoints), default=0.0
        )
        for task in results.tasks
    }
    rows = [
        row(stage_label(c), *(_rate_cell(rates[c, t], "acceptance_rate", top[t]) for t in results.tasks))
        for c in results.checkpoints
    ]
    if paper:
        rows = [_group("This draft", len(results.tasks)), *rows, *_paper_rows(results)]
    columns = ("Checkpoint", *results.tasks)
    sets = listing([name for task in results.tasks if (name := PAPER_TASKS.get(task))])
    note = (
        f"The lower groups are the paper's own results for other models and test sets ({sets}): compare the shape, not the height."
        if paper
        else ""
    )
    return Table(
        columns,
        tuple(rows),
        f"Acceptance rate at {k_name(results.headline_k)}, {temperature_name(temperature)}, with 95 % intervals",
        note,
    )


def differences_section(record: RunRecord) -> Section | str:
    """What each training stage changed, with intervals over prompts."""
    found = (record.results or {}).get("differences")
    items = [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []
    if not items:
        return "Differences between checkpoints: the results hold none."
    results = Results(record.results or {})
    at_k = [item for item in items if number(item, "num_speculative_tokens") == results.headline_k] or items
    temperatures = sorted(
        {t for item in at_k if (t := number(item, "temperature")) is not None},
        key=lambda t: (t != results.headline_temperature, t),
    )
    tables = [
        differences_table(
            [item for item in at_k if number(item, "temperature") == t],
            f"{k_name(results.headline_k)}, {temperature_name(t)}",
        )
        for t in temperatures
    ]
    lead = (
        "Change of the acceptance rate from one checkpoint to the next on the same texts, with 95 % intervals. Coloured: "
        "the interval leaves out 0."
    )
    return Section("What each stage changed", "differences", tuple(tables), lead)


def differences_table(items: Sequence[Figures], caption: str) -> Table:
    """Steps of the ladder across, tasks down."""
    steps = list(dict.fromkeys((str(item.get("from", "")), str(item.get("to", ""))) for item in items))
    found = {
        (str(item.get("task")), str(item.get("from", "")), str(item.get("to", ""))): item for item in items
    }
    tasks = dict.fromkeys(key[0] for key in found)
    rows = [row(task, *(_difference_cell(found.get((task, *step))) for step in steps)) for task in tasks]
    return Table(
        ("Task", *(f"{stage_label(before)} → {stage_label(after)}" for before, after in steps)),
        tuple(rows),
        caption,
    )


def speedup_section(record: RunRecord) -> Section | str:
    """Block efficiency and memory-bound speed-up against K, best K marked, and the table of best K."""
    results = Results(record.results or {})
    temperature = results.headline_temperature
    if temperature is None:
        return "Speed-up against K: the run has no evaluation results."
    blocks: list[Block] = [best_table(results)]
    costs = measured_costs(results.raw)
    if costs is not None:
        blocks.append(costs)
    if len(results.ks()) > 1:
        for key, name, caption in (
            (
                "block_efficiency",
                "Tokens per target pass",
                f"Block efficiency: tokens per target pass against K, {temperature_name(temperature)}.",
            ),
            (
                "mbsu_parameters",
                "Memory-bound speed-up",
                f"Memory-bound speed-up by parameters against K, {temperature_name(temperature)}; the best K is marked, dashed is no gain.",
            ),
        ):
            limits = limits_of(results, key, temperature)
            charts = tuple(
                against_k_chart(results, task, temperature, key=key, name=name, limits=limits)
                for task in results.tasks
                if results.select(task=task, temperature=temperature)
            )
            blocks.append(Charts(charts, caption, _keys(results)))
    blocks.append(Details("All counts and rates", table=full_table(results)))
    lead = "A larger K wins more tokens per target pass but costs more draft passes; the best K balances the two for a given cost ratio."
    return Section("Speed-up", "speedup", tuple(blocks), lead)


def best_table(results: Results) -> Table:
    """The final checkpoint's best K per temperature and task, for every kind of speed-up."""
    keys, rows = results.speedups, []
    for temperature in by_headline(results):
        rows.append(_group(temperature_name(temperature).capitalize(), len(keys) + 1))
        for task in [task for task in results.tasks if results.select(results.final, task, temperature)]:
            best = results.best(results.final, task, temperature, keys[0] if keys else "")
            rows.append(
                row(
                    task,
                    _rate_cell(best, "block_efficiency", form="{:.2f}"),
                    *(_best_cell(results, task, temperature, key) for key in keys),
                )
            )
    ratios = [
        f"{ratio:.3g} {SPEEDUPS[key]}" for key in keys if (ratio := results.cost_ratio(key)) is not None
    ]
    cost = f"Cost ratio: {listing(ratios)}. " if ratios else ""
    note = (
        f"{cost}Each figure stands with its own best K, tokens per target pass with the first one's. Red is under 1: do not "
        "use a draft there."
    )
    return Table(
        ("Task", "Tokens per target pass", *(SPEEDUPS[key] for key in keys)),
        tuple(rows),
        f"Speed-up of {stage_label(results.final or '-')} at the best K",
        note,
    )


def measured_costs(raw: Mapping[str, Any]) -> Text | None:
    """What one pass of each model took where the evaluation ran."""
    latency = raw.get("latency")
    if not isinstance(latency, Mapping) or not isinstance(latency.get("target_seconds"), Mapping):
        return None
    draft, widths = (
        number(latency, "draft_seconds"),
        {
            int(width): number(latency["target_seconds"], width)
            for width in latency["target_seconds"]
            if str(width).isdigit()
        },
    )
    one = widths.pop(1, None)
    if draft is None or one is None:
        return None
    wider = listing(
        [
            f"{seconds * 1e3:.2f} ms for {width}"
            for width, seconds in sorted(widths.items())
            if seconds is not None and width in (2, 4, 6, 9)
        ]
    )
    more = f"; verifying several tokens at once, {wider}" if wider else ""
    place = ", ".join(str(latency[key]) for key in ("device", "target_dtype") if latency.get(key))
    return Text(
        f"Measured on this machine ({place}): one token takes the draft {draft * 1e3:.2f} ms and the target {one * 1e3:.2f} ms{more}.",
        "muted",
    )


def full_table(results: Results) -> Table:
    """Every row of the results."""
    columns = (
        "Checkpoint",
        "Task",
        "Method",
        "T",
        "K",
        "Rounds",
        "Proposed",
        "Accepted",
        "Generated",
        "AR",
        "Cond. AR",
        "Overlap",
        "BE",
        *SPEEDUPS.values(),
    )
    return Table(columns, tuple(_full_row(item) for item in results.rows))


def positions_section(record: RunRecord) -> Section | str:
    """Acceptance at each position of a round."""
    results = Results(record.results or {})
    temperature = results.headline_temperature
    if temperature is None or not any(item.get("num_accepted_tokens_per_pos") for item in results.rows):
        return "Acceptance per position: the results hold no counts per position."
    tasks = [task for task in results.tasks if results.select(task=task, temperature=temperature)]
    charts = positions_charts(results, tasks, temperature)
    largest, k = results.ks()[-1], results.headline_k
    caption = (
        f"Share of rounds in which the proposal at this position was accepted, {k_name(largest)}, "
        f"{temperature_name(temperature)}. All on one scale."
    )
    table = positions_table(results, temperature, k) if k else None
    return Section(
        "Acceptance per position",
        "positions",
        (Charts(charts, caption, _keys(results)), *([table] if table and table.rows else [])),
    )


def positions_table(results: Results, temperature: float, k: int) -> Table:
    """Checkpoints down, tasks across; a cell holds the shares of positions 1 to K."""
    rows = []
    for checkpoint in results.checkpoints:
        found = [per_position(results.row(checkpoint, task, temperature, k)) for task in results.tasks]
        if any(found):
            rows.append(
                row(
                    stage_label(checkpoint),
                    *(", ".join(f"{share:.3f}" for share in shares) or "-" for shares in found),
                )
            )
    caption = f"Share of rounds that accept position 1 to {k}, {k_name(k)}, {temperature_name(temperature)}"
    return Table(("Checkpoint", *results.tasks), tuple(rows), caption)


def _rate_cell(item: Figures | None, key: str, top: float | None = None, form: str = "{:.3f}") -> Cell:
    value, around = number(item, key), interval(item, key)
    detail = f"{form.format(around[0])} to {form.format(around[1])}" if around else ""
    return Cell(show(value, form), detail, "top" if top and value is not None and value >= top else "")


def _best_cell(results: Results, task: str, temperature: float, key: str) -> Cell:
    item = results.best(results.final, task, temperature, key)
    value, k, around = number(item, key), number(item, "num_speculative_tokens"), interval(item, key)
    if value is None or k is None:
        return Cell("-")
    detail = k_name(k) + (f", {around[0]:.2f} to {around[1]:.2f}" if around else "")
    return Cell(f"{value:.2f}×", detail, "bad" if value <= 1 else "good")


def _paper_rows(results: Results) -> list[Row]:
    rows = []
    for pair, checkpoints in PAPER_ROWS.items():
        rows.append(_group(f"Paper: {pair}", len(results.tasks)))
        rows += [
            row(
                stage_label(name),
                *(f"{rates[t]:.3f}" if t in rates else "–" for t in results.tasks),
                kind="paper",
            )
            for name, rates in checkpoints.items()
        ]
    return rows


def _group(label: str, others: int) -> Row:
    return row(label, *[""] * others, kind="group")


def _difference_cell(item: Figures | None) -> Cell:
    change, around = number(item, "difference"), interval(item, "difference")
    if change is None:
        return Cell("-")
    sure = around is not None and (around[0] > 0 or around[1] < 0)
    detail = f"{around[0]:+.3f} to {around[1]:+.3f}" if around else ""
    return Cell(_minus(f"{change:+.3f}"), _minus(detail), ("good" if change > 0 else "bad") if sure else "")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _full_row(item: Figures) -> Row:
    counts = [
        show(number(item, key), "{:.0f}")
        for key in ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_generated_tokens")
    ]
    rates = [show(number(item, key)) for key in ("acceptance_rate", "conditional_acceptance_rate", "overlap")]
    gains = [show(number(item, key), "{:.2f}") for key in ("block_efficiency", *SPEEDUPS)]
    names = [
        stage_label(str(item.get("checkpoint", "-"))),
        str(item.get("task", "-")),
        str(item.get("method", "-")),
    ]
    return row(
        *names,
        show(number(item, "temperature"), "{:g}"),
        show(number(item, "num_speculative_tokens"), "{:g}"),
        *counts,
        *rates,
        *gains,
    )


def _keys(results: Results) -> tuple[tuple[str, str], ...]:
    wanted = {stage_label(checkpoint) for checkpoint in results.checkpoints}
    return tuple(key for key in KEYS if key[1].split(",")[0] in wanted)
