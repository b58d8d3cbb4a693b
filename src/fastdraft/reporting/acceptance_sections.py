"""The chapters made from `results.json`: ladder, differences, speed-up against K, positions, checks.

Decides what each chapter says and shows; a chapter whose material is missing returns the line that says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdraft.reporting.charts import against_k_chart, ladder_chart, limits_of, positions_chart
from fastdraft.reporting.document import Block, Cell, Charts, Details, Row, Section, Table, Text, row
from fastdraft.reporting.paper import PAPER_ROWS, PAPER_TASKS
from fastdraft.reporting.record import RunRecord
from fastdraft.reporting.results import BASES, HEADLINE_TEMPERATURE, Basis, Figures, Results, interval, number, per_position, stage_label, temperature_name
from fastdraft.reporting.summary import show

KEYS = (("ladder-1", "PT, text pre-training"), ("ladder-2", "CP, continued on code and text"), ("ladder-3", "FT, aligned to the target"))


def ladder_section(record: RunRecord) -> Section | str:
    """Acceptance rate per task after each checkpoint, beside the paper's."""
    results = Results(record.results or {})
    if not results.rows:
        return "Acceptance ladder: the run has no evaluation results."
    temperatures = sorted(results.temperatures, key=lambda t: (t != results.headline_temperature, t))
    blocks: list[Block] = [ladder_table(results, temperatures[0], paper=temperatures[0] == 0.6 and results.headline_k == 3)]
    blocks += [ladder_table(results, temperature, paper=False) for temperature in temperatures[1:]]
    if len(results.checkpoints) > 1:
        blocks.insert(0, Charts(tuple(ladder_chart(results, temperature) for temperature in temperatures[:3])))
    prompts = {task: number((results.select(task=task) or [{}])[0], "num_prompts") for task in results.tasks}
    counts = ", ".join(f"{task} {count:g}" for task, count in prompts.items() if count is not None)
    lead = "Share of the draft's proposals that the target accepts. PT is the text-only checkpoint, CP adds code, FT is fine-tuned on what the target wrote."
    return Section("Acceptance ladder", "ladder", (*blocks, *([Text(f"Prompts per task: {counts}.", "muted")] if counts else [])), lead)


def ladder_table(results: Results, temperature: float, paper: bool) -> Table:
    """Checkpoints down, tasks across; intervals in small print, the highest figure of a column marked."""
    rates = {(c, t): results.row(c, t, temperature, results.headline_k) for c in results.checkpoints for t in results.tasks}
    top = {task: max((number(rates[c, task], "acceptance_rate") or 0.0 for c in results.checkpoints), default=0.0) for task in results.tasks}
    rows = [row(stage_label(c), *(_rate_cell(rates[c, t], "acceptance_rate", top[t]) for t in results.tasks)) for c in results.checkpoints]
    if paper:
        rows = [row("This draft", *[""] * len(results.tasks), kind="group"), *rows, *_paper_rows(results)]
    columns = ("Checkpoint", *results.tasks)
    note = "The lower groups are the paper's results for other models on its own test sets, to compare the shape with." if paper else ""
    return Table(columns, tuple(rows), f"Acceptance rate at K = {results.headline_k}, {temperature_name(temperature)}, with 95 % intervals", note)


def differences_section(record: RunRecord) -> Section | str:
    """What each training stage changed, with intervals over prompts."""
    found = (record.results or {}).get("differences")
    items = [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []
    if not items:
        return "Differences between checkpoints: the results hold none."
    table = differences_table(items, Results(record.results or {}).headline_k)
    return Section("What each stage changed", "differences", (table,))


def differences_table(items: Sequence[Figures], k: int | None) -> Table:
    """Steps of the ladder across, tasks down, at the headline K; a change whose interval leaves out 0 is marked."""
    at_k = [item for item in items if number(item, "num_speculative_tokens") == k] or list(items)
    steps = list(dict.fromkeys((str(item.get("from", "")), str(item.get("to", ""))) for item in at_k))
    found = {(number(item, "temperature"), item.get("task"), str(item.get("from", "")), str(item.get("to", ""))): item for item in at_k}
    rows = []
    for temperature in sorted({key[0] for key in found}, key=lambda t: (t != HEADLINE_TEMPERATURE, t or 0)):
        rows.append(row(temperature_name(temperature), *[""] * len(steps), kind="group"))
        for task in dict.fromkeys(key[1] for key in found if key[0] == temperature):
            rows.append(row(str(task), *(_difference_cell(found.get((temperature, task, *step))) for step in steps)))
    columns = ("Task", *(f"{stage_label(before)} → {stage_label(after)}" for before, after in steps))
    note = "Paired over prompts. A change whose interval leaves out 0 is unlikely to be chance; those are in colour."
    return Table(columns, tuple(rows), f"Change of the acceptance rate at K = {k}, with 95 % intervals", note)


def speedup_section(record: RunRecord) -> Section | str:
    """Block efficiency and memory-bound speed-up against K, best K marked, and the table of best K."""
    results = Results(record.results or {})
    temperature = results.headline_temperature
    if temperature is None:
        return "Speed-up against K: the run has no evaluation results."
    blocks: list[Block] = [best_table(results)]
    if len(results.ks()) > 1:
        for key, name, caption in (
            ("block_efficiency", "Tokens per target pass", f"Block efficiency: tokens per target pass against K, {temperature_name(temperature)}."),
            ("mbsu_parameters", "Memory-bound speed-up", f"Memory-bound speed-up by parameters against K, {temperature_name(temperature)}; the best K is marked, dashed is no gain."),
        ):
            limits = limits_of(results, key, temperature)
            charts = tuple(against_k_chart(results, task, temperature, key, name, limits) for task in results.tasks if results.select(task=task, temperature=temperature))
            blocks.append(Charts(charts, caption, _keys(results)))
    blocks.append(Details("All counts and rates", table=full_table(results)))
    lead = "A larger K wins more tokens per target pass but costs more draft passes; the best K balances the two for a given cost ratio."
    return Section("Speed-up and the best K", "speedup", tuple(blocks), lead)


def best_table(results: Results) -> Table:
    """The final checkpoint's best K per task and temperature, on every cost basis."""
    bases = [basis for basis in BASES if any(number(item, f"mbsu_{basis}") is not None for item in results.rows)]
    ratios = {basis: results.cost_ratio(basis) for basis in bases}
    columns = ["Task", "Tokens per target pass", *(f"MBSU by {basis}" + (f", c = {ratio:.3g}" if ratio is not None else "") for basis, ratio in ratios.items())]
    rows = []
    for temperature in sorted(results.temperatures, key=lambda t: (t != results.headline_temperature, t)):
        rows.append(row(temperature_name(temperature), *[""] * (len(bases) + 1), kind="group"))
        for task in [task for task in results.tasks if results.select(results.final, task, temperature)]:
            best = results.best(results.final, task, temperature, bases[0] if bases else "parameters")
            rows.append(row(task, _rate_cell(best, "block_efficiency", form="{:.2f}"), *(_best_cell(results, task, temperature, basis) for basis in bases)))
    note = "Each speed-up stands with the K that gives it; tokens per target pass at the best K of the first one. Under 1: do not use a draft at this cost ratio."
    return Table(tuple(columns), tuple(rows), f"Best K for the checkpoint {stage_label(results.final or '-')}", note)


def full_table(results: Results) -> Table:
    """Every row of the results."""
    columns = ("Checkpoint", "Task", "Method", "T", "K", "Rounds", "Proposed", "Accepted", "Generated", "AR", "Cond. AR", "Overlap", "BE", "MBSU par.", "MBSU bytes", "MBSU lat.")
    return Table(columns, tuple(_full_row(item) for item in results.rows))


def positions_section(record: RunRecord) -> Section | str:
    """Acceptance at each position of a round."""
    results = Results(record.results or {})
    temperature = results.headline_temperature
    if temperature is None or not any(item.get("num_accepted_tokens_per_pos") for item in results.rows):
        return "Acceptance per position: the results hold no counts per position."
    tasks = [task for task in results.tasks if results.select(task=task, temperature=temperature)]
    charts = tuple(positions_chart(results, task, temperature) for task in tasks)
    largest = results.ks()[-1]
    caption = f"Share of rounds in which the proposal at this position was accepted, K = {largest}, {temperature_name(temperature)}."
    k = results.headline_k
    table = positions_table(results, temperature, k) if k else None
    return Section("Acceptance per position", "positions", (Charts(charts, caption, _keys(results)), *([table] if table and table.rows else [])))


def positions_table(results: Results, temperature: float, k: int) -> Table:
    """Share of rounds that accept each position, tasks in groups, checkpoints down."""
    rows: list[Row] = []
    for task in results.tasks:
        found = {c: per_position(results.row(c, task, temperature, k)) for c in results.checkpoints}
        full = {c: shares for c, shares in found.items() if len(shares) == k}
        if full:
            rows.append(row(task, *[""] * k, kind="group"))
        rows += [row(stage_label(c), *(f"{share:.3f}" for share in shares)) for c, shares in full.items()]
    columns = ("Checkpoint", *(f"position {i + 1}" for i in range(k)))
    return Table(columns, tuple(rows), f"Share of rounds that accept each position, K = {k}, {temperature_name(temperature)}")


def _rate_cell(item: Figures | None, key: str, top: float | None = None, form: str = "{:.3f}") -> Cell:
    value, around = number(item, key), interval(item, key)
    detail = f"{form.format(around[0])} to {form.format(around[1])}" if around else ""
    return Cell(show(value, form), detail, "best" if top and value is not None and value >= top else "")


def _best_cell(results: Results, task: str, temperature: float, basis: Basis) -> Cell:
    item = results.best(results.final, task, temperature, basis)
    value, k, around = number(item, f"mbsu_{basis}"), number(item, "num_speculative_tokens"), interval(item, f"mbsu_{basis}")
    if value is None or k is None:
        return Cell("-")
    detail = f"K = {k:g}" + (f", {around[0]:.2f} to {around[1]:.2f}" if around else "")
    return Cell(f"{value:.2f}×", detail, "bad" if value <= 1 else "best")


def _paper_rows(results: Results) -> list[Row]:
    rows = []
    for pair, checkpoints in PAPER_ROWS.items():
        sets = (PAPER_TASKS.get(task, "") for task in results.tasks)
        rows.append(row(f"Paper: {pair}", *sets, kind="group"))
        rows += [row(stage_label(name), *(f"{rates[t]:.3f}" if t in rates else "–" for t in results.tasks), kind="paper") for name, rates in checkpoints.items()]
    return rows


def _difference_cell(item: Figures | None) -> Cell:
    change, around = number(item, "difference"), interval(item, "difference") or interval({"it_interval": (item or {}).get("interval")}, "it")
    if change is None:
        return Cell("-")
    sure = around is not None and (around[0] > 0 or around[1] < 0)
    return Cell(f"{change:+.3f}", f"{around[0]:+.3f} to {around[1]:+.3f}" if around else "", ("best" if change > 0 else "bad") if sure else "")


def _full_row(item: Figures) -> Row:
    counts = [show(number(item, key), "{:.0f}") for key in ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_generated_tokens")]
    rates = [show(number(item, key)) for key in ("acceptance_rate", "conditional_acceptance_rate", "overlap")]
    gains = [show(number(item, key), "{:.2f}") for key in ("block_efficiency", *(f"mbsu_{basis}" for basis in BASES))]
    names = [stage_label(str(item.get("checkpoint", "-"))), str(item.get("task", "-")), str(item.get("method", "-"))]
    return row(*names, show(number(item, "temperature"), "{:g}"), show(number(item, "num_speculative_tokens"), "{:g}"), *counts, *rates, *gains)


def _keys(results: Results) -> tuple[tuple[str, str], ...]:
    wanted = {stage_label(checkpoint) for checkpoint in results.checkpoints}
    return tuple(key for key in KEYS if key[1].split(",")[0] in wanted)


