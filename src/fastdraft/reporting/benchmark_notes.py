"""What a reader has to know before believing measured figures: lossy sampling, differing texts, looping, odd clocks.

Decides how large a gap between two log-probs still counts as a near-tie that rounding decides, and that a note is written
only where there is something to say.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastdraft.reporting.benchmark_results import Benchmark, times
from fastdraft.reporting.document import Cell, Table, Text, row
from fastdraft.reporting.results import k_name, number, temperature_name
from fastdraft.reporting.summary import show
from fastdraft.reporting.verdict import listing

NEAR_TIE = {"exact": 1e-3}
"""Widest gap of two log-probs that float32 rounding decides, in nats."""
NEAR_TIE_FAST = 0.2
"""The same in the reduced precisions of a device, where up to 0.13 was seen."""


def notes(benchmark: Benchmark) -> list[Text]:
    """One paragraph for each thing to know; none for clean figures."""
    return [
        note
        for note in (_same_text(benchmark), _lossy(benchmark), _looping(benchmark), _left_out(benchmark))
        if note is not None
    ]


def near_tie(benchmark: Benchmark) -> float:
    """The widest gap that rounding decides in the precision of this benchmark."""
    return NEAR_TIE.get(str(benchmark.runtime.get("precision")), NEAR_TIE_FAST)


def differences_table(benchmark: Benchmark) -> Table | None:
    """Every greedy text that differs, with the place and the gap there."""
    limit, rows = near_tie(benchmark), []
    for task, prompt, token, gap in benchmark.differences():
        tie = gap is not None and gap <= limit
        words = "not computed" if gap is None else "near-tie" if tie else f"above {limit:g}"
        rows.append(
            row(task, prompt, show(token, "{:g}"), Cell(show(gap, "{:.4f}"), words, "" if tie else "bad"))
        )
    if not rows:
        return None
    note = "Difference of the target's log-probs, in nats, of the two tokens at the first place where the texts differ."
    return Table(
        ("Task", "Prompt", "Token", "Gap"), tuple(rows), "Greedy texts that differ with the draft", note
    )


def _same_text(benchmark: Benchmark) -> Text | None:
    greedy = [
        item
        for item in benchmark.rows
        if number(item, "temperature") == 0
        and number(item, "texts")
        and number(item, "same_text") is not None
    ]
    texts, same = (sum(number(item, key) or 0.0 for item in greedy) for key in ("texts", "same_text"))
    if not texts:
        return None
    start = f"Greedy text with the draft is the target's own, token for token, in {same:g} of {texts:g} comparisons."
    found = benchmark.differences()
    if same == texts:
        return Text(start, "good")
    gaps, limit = [item.gap for item in found], near_tie(benchmark)
    known = [gap for gap in gaps if gap is not None]
    ties = sum(gap <= limit for gap in known)
    text = f"{start} At {len(found)} places the texts part; {ties} of them are near-ties of two tokens, which rounding decides"
    text += f" (largest gap {max(known):.3g} nats)." if known else "."
    return Text(text, "good" if found and ties == len(found) else "bad")


def _lossy(benchmark: Benchmark) -> Text | None:
    if not benchmark.lossy:
        return None
    parts = [
        f"{times(number(item, 'speedup'))} on {item.get('task')} at {temperature_name(number(item, 'temperature'))}, "
        f"{k_name(number(item, 'num_speculative_tokens'))}"
        for item in benchmark.lossy
        if number(item, "speedup") is not None
    ]
    figures = f" ({'; '.join(parts[:4])}{'; and others' if len(parts) > 4 else ''})" if parts else ""
    return Text(
        f"With a draft, {benchmark.runtime_name} does not sample losslessly: the text leans towards the draft, which flatters every figure "
        f"of sampled text{figures}. No verdict rests on them.",
        "bad",
    )


def _left_out(benchmark: Benchmark) -> Text | None:
    block = benchmark.raw.get("block")
    found = block.get("left_out") if isinstance(block, Mapping) else None
    lines = [str(line) for line in found] if isinstance(found, list) else []
    return Text(f"Left out: {'; '.join(lines)}.", "muted") if lines else None


def _looping(benchmark: Benchmark) -> Text | None:
    shares = {
        task: share for task in benchmark.tasks if (share := number(benchmark.best(task), "looping_share"))
    }
    if not shares:
        return None
    told = listing([f"{share:.0%} on {task}" for task, share in shares.items()])
    return Text(
        f"Of the measured answers loop {told}: text that repeats itself is easy to predict and flatters a draft.",
        "muted",
    )
