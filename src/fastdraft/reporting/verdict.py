"""The answer in one sentence: on which tasks the draft pays, by how much, and where not to use it.

Decides that a draft pays where its memory-bound speed-up at its best K is above 1, that this is said per task and not as
an average, that a cost ratio at which it does not pay is named beside the advice, and that what the measured times
predict for the machine at hand follows at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastdraft.reporting.results import (
    SPEEDUPS,
    Figures,
    Results,
    k_name,
    number,
    stage_label,
    temperature_name,
)


@dataclass(frozen=True)
class Verdict:
    """One sentence, a second one with what it rests on, and how good the news is."""

    sentence: str
    detail: str
    tone: Literal["good", "mixed", "bad", "none"]


def give_verdict(raw: Mapping[str, Any] | None, *, prediction: bool = True) -> Verdict:
    """The verdict on `results.json`; tone `none` when there is nothing to judge.

    Args:
        raw: Its content.
        prediction: Whether to add what the times measured during the evaluation predict; of no use beside a real clock.
    """
    results = Results(raw or {})
    if not results.speedups or results.final is None:
        return Verdict(
            "This draft has not been evaluated yet: nothing can be said about its speed-up.",
            "Run `fastdraft evaluate` on its recipe.",
            "none",
        )
    key = results.speedups[0]
    best = best_rows(results, key)
    gains = [_phrase(task, item, key) for task, item in best.items() if _value(item, key) > 1]
    losses = [_phrase(task, item, key) for task, item in best.items() if _value(item, key) <= 1]
    ratio = results.cost_ratio(key)
    at = f"at this cost ratio ({ratio:.3g})" if ratio is not None else "at this cost ratio"
    if not gains:
        sentence = f"Do not use this draft {at}: its memory-bound speed-up stays under 1 even at the best K, {listing(losses)}."
        return Verdict(_explained(sentence), _detail(results, key, prediction), "bad")
    sentence = f"At its best K the draft reaches {listing(gains)}"
    if losses:
        sentence += f", but stays under 1 with {listing(losses)}: do not use a draft there {at}"
    return Verdict(
        _explained(f"{sentence}."), _detail(results, key, prediction), "mixed" if losses else "good"
    )


def best_rows(results: Results, key: str) -> dict[str, Figures]:
    """The final checkpoint's row at its best K for every task at the headline temperature, the fastest task first."""
    found = {
        task: results.best(results.final, task, results.headline_temperature, key) for task in results.tasks
    }
    return dict(
        sorted(((task, item) for task, item in found.items() if item), key=lambda pair: -_value(pair[1], key))
    )


def listing(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def _value(item: Figures, key: str) -> float:
    return number(item, key) or 0.0


def _phrase(task: str, item: Figures, key: str) -> str:
    efficiency, k = number(item, "block_efficiency") or 0.0, number(item, "num_speculative_tokens") or 0.0
    return f"{_value(item, key):.2f}× on\u00a0{task} ({efficiency:.2f},\u00a0{k_name(k)})"


def _explained(sentence: str) -> str:
    """Names the figure in the first pair of parentheses that holds one."""
    return sentence.replace(",\u00a0K", " tokens per target pass, K", 1)


def _detail(results: Results, key: str, prediction: bool) -> str:
    text = (
        f"This is the memory-bound speed-up {SPEEDUPS[key]} at {temperature_name(results.headline_temperature)}, "
        f"checkpoint {stage_label(results.final or '')}: "
        "counted acceptance combined with relative cost, not a wall-clock measurement."
    )
    measured = next(
        (name for name in ("predicted_speedup", "mbsu_latency") if name in results.speedups), None
    )
    best = best_rows(results, measured) if measured else {}
    if not prediction or measured is None or not best or measured == key:
        return text
    over = [
        f"{_value(item, measured):.2f}× on {task} ({k_name(number(item, 'num_speculative_tokens'))})"
        for task, item in best.items()
        if _value(item, measured) > 1
    ]
    under = [task for task, item in best.items() if _value(item, measured) <= 1]
    by = "With the times measured where this evaluation ran, the prediction is"
    if not over:
        return f"{text} {by} under 1 on every task: do not use a draft on that machine."
    return f"{text} {by} {listing(over)}" + (
        f", and under 1 on {listing(under)}: do not use a draft there on that machine." if under else "."
    )
