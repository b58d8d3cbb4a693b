"""The chapter of checks: do two ways of counting agree, is greedy text the target's own, how much of it loops, is it clean.

Decides how forgiving the reading is: every check is optional, and each missing one is named by a line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastdraft.reporting.document import Block, Cell, Row, Section, Table, Text, row
from fastdraft.reporting.record import RunRecord
from fastdraft.reporting.results import Figures, Results, interval, number, stage_label, temperature_name
from fastdraft.reporting.summary import show

_AGREE = 0.02
"""Relative difference in block efficiency up to which the two methods are said to agree."""


def checks_section(record: RunRecord) -> Section | str:
    """Everything that makes the figures believable."""
    raw = record.results or {}
    results = Results(raw)
    if not results.rows:
        return "Checks: the run has no evaluation results."
    blocks: list[Block] = []
    for name, found in (
        ("Exact against replay", agreement_table(results)),
        ("Greedy output", greedy_check(raw)),
        ("Looping", looping_table(results)),
        ("Contamination", contamination_table(record)),
    ):
        blocks.append(found if found is not None else Text(f"{name}: not recorded in this run.", "muted"))
    return Section("Checks", "checks", tuple(blocks))


def agreement_table(results: Results) -> Table | None:
    """Settings counted both ways: by running the decoder, and by replaying text that the target wrote."""
    rows = []
    for exact in results.select(method="exact"):
        setting = (exact.get("checkpoint"), exact.get("task"), exact.get("temperature"), exact.get("num_speculative_tokens"))
        replay = next(iter(results.select(*setting, method="replay")), None)
        first, second = number(exact, "block_efficiency"), number(replay, "block_efficiency")
        if first is None or second is None:
            continue
        rows.append(_agreement_row(exact, first, second, replay))
    if not rows:
        return None
    note = "Replay counts in expectation over text the target wrote; exact runs the lossless decoder. The two draw different text when sampling, so they agree within noise."
    return Table(("Task", "At", "Exact", "Replay", "Difference"), tuple(rows), "Exact decoding against replay: tokens per target pass", note)


def greedy_check(raw: Mapping[str, Any]) -> Text | None:
    """Whether greedy speculative decoding wrote exactly what the target writes alone."""
    found = next((raw[key] for key in ("greedy_check", "greedy", "greedy_identical") if key in raw), None)
    totals = [_prompt_counts(item) for item in ([found] if _prompt_counts(found) else _items(found))]
    counted = [pair for pair in totals if pair]
    if isinstance(found, bool):
        return _greedy_text(found, "Greedy output with the draft is the target's own." if found else "Greedy output with the draft differs from the target's own.")
    if not counted:
        return None
    same, prompts = sum(pair[0] for pair in counted), sum(pair[1] for pair in counted)
    near = sum(number(item, "near_ties") or 0 for item in ([found] if isinstance(found, Mapping) else _items(found)))
    text = f"Greedy output with the draft is the target's own on {same:g} of {prompts:g} prompts."
    return _greedy_text(same == prompts, text + (f" {near:g} differ at a near-tie of two tokens." if near else ""))


def looping_table(results: Results) -> Table | None:
    """Share of continuations that repeat themselves, and the figures when those are left out."""
    rows = []
    for item in _looping_items(results):
        share = number(item, "looping_share", "share")
        if share is None:
            continue
        temperature = number(item, "temperature")
        rates = [number(item, f"{key}_without_looping", f"without_looping_{key}") for key in ("acceptance_rate", "block_efficiency")]
        rates = [rate if rate is not None else number(_without(item), key) for rate, key in zip(rates, ("acceptance_rate", "block_efficiency"), strict=True)]
        base = results.row(results.final, str(item.get("task")), temperature, results.headline_k) if temperature is not None else None
        cells = [show(number(base, "acceptance_rate")), show(rates[0]), show(number(base, "block_efficiency"), "{:.2f}"), show(rates[1], "{:.2f}")]
        rows.append(row(str(item.get("task", "-")), temperature_name(temperature), f"{share:.1%}", *cells))
    if not rows:
        return None
    columns = ("Task", "At", "Looping", "AR, all", "AR, without", "Tokens per pass, all", "Without")
    note = "Text that repeats itself is easy to predict and flatters a draft."
    return Table(columns, tuple(rows), f"Looping continuations and the figures without them, checkpoint {stage_label(results.final or '-')}, K = {results.headline_k}", note)


def contamination_table(record: RunRecord) -> Table | None:
    """How many evaluation prompts share a run of 13 tokens with something trained on."""
    rows: list[Row] = []
    holders = [record.results or {}, *(record.manifests.get(stage, {}) for stage in ("evaluate", "synthesize", "prepare", "align"))]
    for holder in holders:
        for path, item in _overlaps(holder.get("contamination"), ()):
            prompts, total = number(item, "prompts_with_overlap"), number(item, "prompts", "num_prompts")
            matched, grams = number(item, "ngrams_matched"), number(item, "ngrams")
            share = f"{matched / grams:.2%}" if matched is not None and grams else "-"
            of = f"{prompts:g}" + (f" of {total:g}" if total is not None else "") if prompts is not None else "-"
            rows.append(row(", ".join(path) or str(item.get("task", "all")), of, show(matched, "{:.0f}"), show(grams, "{:.0f}"), Cell(share, "", "bad" if prompts else "")))
        if rows:
            break
    if not rows:
        return None
    columns = ("Task", "Prompts with overlap", "13-grams matched", "13-grams", "Share")
    return Table(columns, tuple(rows), "Contamination: evaluation texts found in what was trained on", "Evaluation prompts are refused as training prompts; this counts what remains.")


def _agreement_row(exact: Figures, first: float, second: float, replay: Figures | None) -> Row:
    difference = second / first - 1 if first else 0.0
    around = interval(exact, "block_efficiency")
    inside = around is not None and around[0] <= second <= around[1]
    other = interval(replay, "block_efficiency")
    at = f"{stage_label(str(exact.get('checkpoint')))}, {temperature_name(number(exact, 'temperature'))}, K = {number(exact, 'num_speculative_tokens') or 0:g}"
    cells = [Cell(f"{value:.3f}", f"{pair[0]:.2f} to {pair[1]:.2f}" if pair else "") for value, pair in ((first, around), (second, other))]
    remark = "within the interval" if inside else ""
    return row(str(exact.get("task", "-")), at, *cells, Cell(f"{difference:+.1%}", remark, "best" if inside or abs(difference) <= _AGREE else "bad"))


def _greedy_text(good: bool, text: str) -> Text:
    return Text(text, "good" if good else "bad")


def _prompt_counts(item: object) -> tuple[float, float] | None:
    if not isinstance(item, Mapping):
        return None
    same, prompts = number(item, "identical", "num_identical", "equal", "num_equal", "same"), number(item, "prompts", "num_prompts", "checked")
    return (same, prompts) if same is not None and prompts is not None else None


def _items(value: object) -> list[Figures]:
    if isinstance(value, Mapping):
        return [item if "task" in item else {"task": name, **item} for name, item in value.items() if isinstance(item, Mapping)]
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _looping_items(results: Results) -> Iterator[Figures]:
    """Looping figures kept by themselves, or else in the rows of the final checkpoint."""
    listed = _items(results.raw.get("looping"))
    if listed:
        yield from listed
        return
    for task, temperature in results.settings():
        found = results.row(results.final, task, temperature, results.headline_k)
        if found is not None:
            yield found


def _without(item: Figures) -> Figures | None:
    value = item.get("without_looping")
    return value if isinstance(value, Mapping) else None


def _overlaps(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Figures]]:
    """Every leaf that counts overlaps, whatever it is grouped by."""
    if isinstance(value, list):
        for item in value:
            yield from _overlaps(item, path)
    elif isinstance(value, Mapping):
        if number(value, "prompts_with_overlap", "ngrams_matched") is not None:
            yield path, value
        else:
            for name, item in value.items():
                yield from _overlaps(item, (*path, str(name)))
