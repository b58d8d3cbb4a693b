"""The tables of a measured wall clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastdraft.benchmark.rows import BenchmarkResults, BenchmarkRow, TextDifference
from fastdraft.functional.same_text import near_tie
from fastdraft.reporting.definitions import duration, show, times
from fastdraft.reporting.tables import Cell, Table, fields, table
from fastdraft.reporting.verdict import worth


def measured(benchmark: BenchmarkResults, pairs: Sequence[tuple[str, str]] = ()) -> Table:
    """Pairs of weights, the deployed one by default, at each task's best K.

    In small print: ranges, quotients of measured over promised, and times without the draft.
    """

    def promise(key: str, quotient: str) -> Callable[[BenchmarkRow], Cell]:
        def shown(row: BenchmarkRow) -> Cell:
            found = getattr(row, quotient)
            return Cell(times(getattr(row, key)), "" if found is None else f"quotient {found:.2f}")

        return shown

    def seconds(key: str) -> Callable[[BenchmarkRow], Cell]:
        ends = f"{key}_with_draft", f"{key}_alone"
        return lambda row: Cell(duration(getattr(row, ends[0])), f"{duration(getattr(row, ends[1]))} without")

    columns = fields("Weights = pair | Task = task | Best K = num_speculative_tokens")
    columns |= {"Tokens per target pass": "block_efficiency .2f", "Measured": measured_cell}
    columns |= {"Predicted": promise("predicted_speedup", "predicted_quotient")}
    columns |= {"Behind the first token": promise("decode_speedup", "decode_quotient")}
    columns |= {"MBSU by bytes": promise("mbsu_bytes", "mbsu_quotient")}
    columns |= {"Time to first token": seconds("first_token_seconds")}
    columns |= {"Time per output token": seconds("seconds_per_output_token")}
    columns |= {"Same greedy text": lambda row: f"{show(row.same_text, '{}')} of {row.texts}"}
    return table(
        [row for pair in pairs or benchmark.pairs[:1] for row in benchmark.fastest_of_each(pair)], columns
    )


def measured_cell(row: BenchmarkRow) -> Cell:
    """The speed-up with its range."""
    around = row.interval("speedup")
    parts = [f"{around[0]:.2f} to {around[1]:.2f}"] if around else []
    parts += [] if row.lossless else ["not lossless"]
    return Cell(times(row.speedup), ", ".join(parts), worth(row.speedup) if row.lossless else "")


def passes(benchmark: BenchmarkResults) -> Table:
    """What one pass of each model takes alone: what the prediction rests on."""
    widths = sorted({width for row in benchmark.latencies for width in row.target_seconds})
    shown = widths if len(widths) <= 6 else [*widths[:4], widths[len(widths) // 2 + 1], widths[-1]]
    columns = fields(
        "Weights = pair | Context, tokens = prefix_tokens , | Draft, 1 token = draft_seconds seconds"
    )
    return table(
        benchmark.latencies, columns | {f"Target, {n}": f"target_seconds.{n} seconds" for n in shown}
    )


def different_texts(benchmark: BenchmarkResults) -> Table:
    """Every greedy text that differs: once for each place at which it does, with the widest gap between the log-probs there."""
    places: dict[tuple[str, str, int], TextDifference] = {}
    for row in benchmark.rows:
        for case in row.differences:
            known = places.setdefault((row.task, case.prompt, case.token), case)
            if (case.logprob_gap or 0.0) > (known.logprob_gap or 0.0):
                places[row.task, case.prompt, case.token] = case

    def gap(item: tuple[Any, TextDifference]) -> Cell:
        found = item[1].logprob_gap
        if found is None:
            return Cell("-", "not computed", "bad")
        tie = found < near_tie(benchmark.runtime.precision)
        return Cell(f"{found:.4f}", "near-tie" if tie else "no near-tie", "" if tie else "bad")

    columns = fields("Task = 0.0 | Prompt = 1.prompt | Token = 1.token")
    return table(places.items(), {**columns, "Gap": gap})
