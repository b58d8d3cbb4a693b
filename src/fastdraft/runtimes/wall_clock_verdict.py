"""What a benchmark comes to: the best K, a sentence, a table for the terminal.

Decides which rows may speak (tasks, the deployed weights, a fixed K, text that is the target's own; greedy where greedy was
measured), that the best K of all tasks is that of the largest geometric mean, from which speed-up on a draft is worth using,
and which figure is named as the reason when it is not: the draft's cost, the cost of verifying, the acceptance, or what the
runtime adds to a prediction that promised more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastdraft.functional.acceptance import tidy
from fastdraft.decoding.latency import Latency
from fastdraft.forecast import WORTH

WITHIN_REACH = 0.6
"""A needed share of accepted proposals above this is beyond what small drafts reach: the costs are then the reason, not the acceptance."""
SMALL_OVERHEAD = 0.15

Row = Mapping[str, Any]


def speaking_rows(rows: Sequence[Row], target_weights: str, draft_weights: str) -> list[Row]:
    """Rows from which the best K and the verdict follow, at the lowest temperature among them."""
    found = [
        row
        for row in rows
        if row["part"] == "tasks"
        and row["lossless"]
        and row["speedup"] is not None
        and not row["confidence_threshold"]
        and (row["target_weights"], row["draft_weights"]) == (target_weights, draft_weights)
    ]
    lowest = min((row["temperature"] for row in found), default=0.0)
    return [row for row in found if row["temperature"] == lowest]


def best(rows: Sequence[Row]) -> dict[str, Any]:
    """The best K of all tasks and of each, from `speaking_rows`; null without any."""
    by_task: dict[str, Row] = {}
    by_k: dict[int, list[float]] = {}
    for row in rows:
        by_k.setdefault(row["num_speculative_tokens"], []).append(row["speedup"])
        if row["task"] not in by_task or row["speedup"] > by_task[row["task"]]["speedup"]:
            by_task[row["task"]] = row
    means = {k: math.prod(values) ** (1 / len(values)) for k, values in by_k.items()}
    names = ("num_speculative_tokens", "speedup")
    return {
        "num_speculative_tokens": max(means, key=lambda k: (means[k], -k)) if means else None,
        "by_task": {task: {name: row[name] for name in names} for task, row in by_task.items()},
    }


def verdict(
    rows: Sequence[Row], latencies: Sequence[Latency], breakdown: Row | None, device: str
) -> dict[str, str]:
    """A sentence for whoever has to decide, and its tone.

    Args:
        rows: From `speaking_rows`.
        latencies: Of the same pair.
        breakdown: Its entry of `benchmark.json`, if there is one.
        device: As OpenVINO names it.
    """
    k = best(rows)["num_speculative_tokens"]
    if k is None:
        return {
            "sentence": "No verdict: nothing was measured whose text is the target's own; measure at temperature 0.",
            "tone": "mixed",
        }
    chosen = [row for row in rows if row["num_speculative_tokens"] == k]
    pair = f"({device}, {chosen[0]['target_weights']} target, {chosen[0]['draft_weights']} draft)"
    good = [row for row in chosen if row["speedup"] >= WORTH]
    poor = [row for row in chosen if row["speedup"] < WORTH]
    if not poor:
        sentence = f"Use this draft with K = {k}: measured {_each(good)} {pair}"
        lowest = min(row["speedup_low"] for row in good)
        if lowest < 1:
            return {
                "sentence": f"{sentence}, but {lowest:.2f}x in one repeat: measure again on a quiet machine.",
                "tone": "mixed",
            }
        return {"sentence": f"{sentence}.", "tone": "good"}
    reason = _reason(poor, latencies, breakdown)
    if good:
        sentence = f"Use this draft with K = {k} where it pays: measured {_each(good)}, but {_each(poor)} {pair}; there {reason}."
        return {"sentence": sentence, "tone": "mixed"}
    if all(row["speedup"] >= 1 for row in poor):
        sentence = (
            f"A draft brings next to nothing here: measured {_each(poor)} at best K = {k} {pair}; {reason}."
        )
        return {"sentence": sentence, "tone": "mixed"}
    return {
        "sentence": f"Do not use a draft here: measured {_each(poor)} at best K = {k} {pair}; {reason}.",
        "tone": "bad",
    }


def _each(rows: Sequence[Row]) -> str:
    """1.62x on code and 1.31x on text."""
    parts = [f"{row['speedup']:.2f}x on {row['task']}" for row in rows]
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def _reason(poor: Sequence[Row], latencies: Sequence[Latency], breakdown: Row | None) -> str:
    """The figure that explains most of why these rows gain nothing, in words."""
    row = min(poor, key=lambda row: row["speedup"])
    predicted = row["predicted_speedup"]
    if predicted is None or not latencies:
        return f"the target accepts {_percent(row['acceptance_rate'])} of what is proposed"
    if predicted >= WORTH:
        return _overhead(row, breakdown)
    return _costs(row, latencies[0])


def _costs(row: Row, latency: Latency) -> str:
    """For a prediction that promised nothing: the costs are too high for any acceptance, or the acceptance too low for the costs."""
    one, k = latency.target_seconds[1], row["num_speculative_tokens"]
    widths = sorted(width for width in latency.target_seconds if width > 1)
    width = k + 1 if k + 1 in widths else widths[0]
    draft, verify = latency.cost_ratio, (latency.target_seconds[width] / one - 1) / (width - 1)
    needed, rate = draft + verify, row["conditional_acceptance_rate"]
    if needed <= WITHIN_REACH and rate is not None and rate >= needed:
        return f"the passes of a round cost as much as the accepted tokens gain ({_percent(rate)} of the proposals looked at)"
    if needed <= WITHIN_REACH:
        digits = int(_percent(rate) == _percent(needed))  # so that what is said can be seen
        found, wanted = _percent(rate, digits), _percent(needed, digits)
        return f"the acceptance is too low: {found} of the proposals looked at, and costs ask for more than {wanted}"
    if draft >= verify:
        return (
            f"the target answers in {_ms(one)} ms a token and the draft needs {_ms(latency.draft_seconds)} ms"
        )
    seconds = latency.target_seconds[width]
    return f"verifying is too dear: a pass of the target over {width} tokens takes {_ms(seconds)} ms, over one {_ms(one)} ms"


def _overhead(row: Row, breakdown: Row | None) -> str:
    """For a prediction that promised more than was measured."""
    promised = f"its passes alone promised {row['predicted_speedup']:.2f}x"
    total = breakdown["total_seconds"] if breakdown else 0
    share = breakdown["other_seconds"] / total if breakdown and total else None
    if share is None:
        return f"{promised}, the rest is the runtime's overhead"
    if share < SMALL_OVERHEAD:
        return f"{promised}, but inside the runtime the passes take longer"
    return f"{promised}, but {_percent(share)} of the time is the runtime's own, neither target nor draft"


def _percent(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2g}" if seconds < 0.1 else f"{1000 * seconds:.0f}"


def summary_table(
    rows: Sequence[Row], found: Mapping[str, Any], pair: str
) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and lines for the terminal: each task at its own best K.

    Args:
        rows: From `speaking_rows`.
        found: From `best`.
        pair: Device and weights in words.
    """
    lines = []
    for task, entry in found["by_task"].items():
        row = next(
            r
            for r in rows
            if r["task"] == task and r["num_speculative_tokens"] == entry["num_speculative_tokens"]
        )
        measured = f"{row['speedup']:.2f} [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"
        cells = [_cell(row[name]) for name in ("block_efficiency", "predicted_speedup")]
        lines.append(
            [
                task[:16],
                str(row["num_speculative_tokens"]),
                *cells,
                measured,
                _cell(row["predicted_quotient"]),
            ]
        )
    columns = ["task", "best K", "tok/pass", "predicted", "measured [range]", "quotient"]
    return f"Speed-up on the clock, {pair}", columns, lines


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def breakdown_entry(
    target_weights: str, draft_weights: str, k: int, parts: Mapping[str, float]
) -> dict[str, Any]:
    """An entry of `breakdown` in `benchmark.json`.

    Args:
        target_weights: As exported.
        draft_weights: As exported.
        k: num_speculative_tokens.
        parts: `target_seconds`, `draft_seconds`, `total_seconds`.
    """
    other = max(0.0, parts["total_seconds"] - parts["target_seconds"] - parts["draft_seconds"])
    return {
        "target_weights": target_weights,
        "draft_weights": draft_weights,
        "num_speculative_tokens": k,
        "target_seconds": tidy(parts["target_seconds"]),
        "draft_seconds": tidy(parts["draft_seconds"]),
        "other_seconds": tidy(other),
        "total_seconds": tidy(parts["total_seconds"]),
    }
