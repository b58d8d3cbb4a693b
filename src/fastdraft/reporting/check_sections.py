"""The chapter of checks: do two ways of counting agree, is greedy text the target's own, how much of it loops, is it clean.

Decides how forgiving the reading is: every check is optional, and each missing one is named by a line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastdraft.reporting.document import Block, Cell, Row, Section, Table, Text, row
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

FEWEST_PROMPTS = 8
"""An interval over fewer prompts is too narrow to accuse anybody: it knows only their own spread."""


def checks_section(record: RunRecord) -> Section | str:
    """Everything that makes the figures believable."""
    raw = record.results or {}
    results = Results(raw)
    if not results.rows:
        return "Checks: the run has no evaluation results."
    blocks: list[Block] = []
    for name, found in (
        ("Exact against replay", agreement_table(results)),
        ("Looping", looping_table(results)),
        ("Contamination", contamination_table(record)),
        ("Greedy output", greedy_check(raw)),
    ):
        blocks.append(found if found is not None else Text(f"{name}: not recorded in this run.", "muted"))
    return Section("Checks", "checks", tuple(blocks))


def agreement_table(results: Results) -> Table | None:
    """Settings counted both ways: by running the decoder, and by replaying text that the target wrote."""
    rows = []
    for exact in results.select(method="exact"):
        setting = (
            exact.get("checkpoint"),
            exact.get("task"),
            exact.get("temperature"),
            exact.get("num_speculative_tokens"),
        )
        replay = next(iter(results.select(*setting, method="replay")), None)
        first, second = number(exact, "block_efficiency"), number(replay, "block_efficiency")
        if first is None or second is None or replay is None:
            continue
        rows.append(_agreement_row(exact, first, second, replay))
    if not rows:
        return None
    note = (
        "Exact runs the lossless decoder on the first prompts; replay counts in expectation over what the target wrote for "
        f"all of them. Red: intervals apart, which is judged from {FEWEST_PROMPTS} prompts on."
    )
    return Table(
        ("Task", "At", "Exact", "Replay", "Difference"),
        tuple(rows),
        "Exact decoding against replay: tokens per target pass",
        note,
    )


def greedy_check(raw: Mapping[str, Any]) -> Text | None:
    """Whether greedy speculative decoding wrote exactly what the target writes alone."""
    found = raw.get("greedy_check")
    found = found if isinstance(found, Mapping) else {}
    texts, different, ties = (
        number(found, "texts"),
        number(found, "different") or 0.0,
        number(found, "near_ties") or 0.0,
    )
    if not texts:
        return None
    text = f"Greedy text with the draft is the target's own, token for token, on {texts - different:g} of {texts:g} prompts."
    if different:
        text += f" Of the {different:g} others, {ties:g} part at a near-tie of two tokens, which rounding decides."
    return Text(text, "good" if different <= ties else "bad")


def looping_table(results: Results) -> Table | None:
    """Share of continuations that repeat themselves, and the figures when those are left out."""
    rows = []
    for task, temperature in results.settings():
        item = results.row(results.final, task, temperature, results.headline_k)
        share = number(item, "looping_share")
        if share is None:
            continue
        figures = [show(number(item, f"acceptance_rate{end}")) for end in ("", "_without_looping")]
        figures += [
            show(number(item, f"block_efficiency{end}"), "{:.2f}") for end in ("", "_without_looping")
        ]
        rows.append(row(task, temperature_name(temperature), f"{share:.1%}", *figures))
    if not rows:
        return None
    columns = ("Task", "At", "Looping", "AR", "without", "Tokens per pass", "without")
    note = (
        f"Text that repeats itself is easy to predict and flatters a draft. Checkpoint {stage_label(results.final or '-')}, "
        f"{k_name(results.headline_k)}."
    )
    return Table(columns, tuple(rows), "Looping continuations, and the figures without them", note)


def contamination_table(record: RunRecord) -> Table | None:
    """How many evaluation prompts share a run of 13 tokens with something trained on."""
    rows: list[Row] = []
    holders = [
        record.results or {},
        *(record.manifests.get(stage, {}) for stage in ("evaluate", "synthesize", "prepare", "align")),
    ]
    for holder in holders:
        for path, item in _overlaps(holder.get("contamination"), ()):
            prompts, total = number(item, "prompts_with_overlap"), number(item, "prompts", "num_prompts")
            matched, grams = number(item, "ngrams_matched"), number(item, "ngrams")
            share = f"{matched / grams:.2%}" if matched is not None and grams else "-"
            of = (
                f"{prompts:g}" + (f" of {total:g}" if total is not None else "")
                if prompts is not None
                else "-"
            )
            rows.append(
                row(
                    ", ".join(path) or str(item.get("task", "all")),
                    of,
                    show(matched, "{:.0f}"),
                    show(grams, "{:.0f}"),
                    Cell(share, "", "top" if prompts else ""),
                )
            )
        if rows:
            break
    if not rows:
        return None
    columns = ("Task", "Prompts with overlap", "13-grams matched", "13-grams", "Share")
    return Table(
        columns,
        tuple(rows),
        "Contamination: evaluation texts found in what was trained on",
        "Evaluation prompts are refused as training prompts; this counts what remains.",
    )


def _agreement_row(exact: Figures, first: float, second: float, replay: Figures) -> Row:
    around, other = interval(exact, "block_efficiency"), interval(replay, "block_efficiency")
    enough = min(number(exact, "num_prompts") or 0, number(replay, "num_prompts") or 0) >= FEWEST_PROMPTS
    apart = (
        enough and around is not None and other is not None and (around[0] > other[1] or other[0] > around[1])
    )
    at = (
        f"{stage_label(str(exact.get('checkpoint')))}, {temperature_name(number(exact, 'temperature'))}, "
        f"{k_name(number(exact, 'num_speculative_tokens'))}"
    )
    cells = [
        Cell(f"{value:.2f}", _range_of(item, pair))
        for value, item, pair in ((first, exact, around), (second, replay, other))
    ]
    difference = f"{second / first - 1:+.1%}".replace("-", "−") if first else "-"
    return row(
        str(exact.get("task", "-")),
        at,
        *cells,
        Cell(difference, "intervals apart" if apart else "", "bad" if apart else ""),
    )


def _range_of(item: Figures, around: tuple[float, float] | None) -> str:
    prompts = number(item, "num_prompts")
    parts = [f"{around[0]:.2f} to {around[1]:.2f}"] if around else []
    return ", ".join(parts + ([f"{prompts:g} prompts"] if prompts is not None else []))


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
