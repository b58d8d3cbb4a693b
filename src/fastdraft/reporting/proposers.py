"""Nothing, prompt lookup, the draft, and both: side by side."""

from __future__ import annotations

from collections.abc import Callable

from fastdraft.benchmark.rows import PROPOSERS, BenchmarkResults, BenchmarkRow
from fastdraft.evaluation.results import EvaluationResults
from fastdraft.reporting.definitions import k_is, show, times
from fastdraft.reporting.tables import Cell, Column, Table, by_setting, fields, rate, table
from fastdraft.reporting.verdict import RUNTIMES, best_of_each, fastest_by_task, worth_most

HEADINGS = {"lookup": "Prompt lookup", "draft": "Draft", "lookup_draft": "Lookup, then draft"}
_BRIEF = {"lookup": "Lookup", "draft": "Draft", "lookup_draft": "Both"}


def tokens(results: EvaluationResults) -> Table:
    """Tokens per target pass at the headline K, over the same texts."""

    def shown(kind: str) -> Callable[[str, float], Cell]:
        def cell(task: str, temperature: float) -> Cell:
            rows = results.proposed(kind, task, temperature)
            at = [row for row in rows if row.num_speculative_tokens == results.headline_k]
            return rate(next(iter(at), None), "block_efficiency")

        return cell

    columns = {HEADINGS[kind]: shown(kind) for kind in PROPOSERS}
    return by_setting(results, {"Nothing": lambda *_: "1.00", **columns})


def speedups(results: EvaluationResults, speedup: str) -> Table:
    """A kind of speed-up at the best K of each proposer; marked is what is worth it."""

    def shown(kind: str) -> Callable[[str, float], Cell]:
        def cell(task: str, temperature: float) -> Cell:
            rows = best_of_each(results, task, temperature, speedup)
            if kind not in rows:
                return Cell("-")
            chosen = worth_most({name: getattr(row, speedup) for name, row in rows.items()})
            text = f"{times(getattr(rows[kind], speedup))} at {k_is(rows[kind].num_speculative_tokens)}"
            return Cell(text, mark="good" if kind == chosen else "")

        return cell

    return by_setting(results, {HEADINGS[kind]: shown(kind) for kind in PROPOSERS})


def clocked(benchmark: BenchmarkResults, *, brief: bool = False) -> Table:
    """The deployed pair of every runtime on the clock: ratio to alone, tokens a second and a pass, K; `brief`
    leaves K and speeds out, for 80 columns.
    """

    def shown(kind: str) -> Callable[[dict[str, BenchmarkRow]], Cell]:
        def cell(rows: dict[str, BenchmarkRow]) -> Cell:
            if (row := rows.get(kind)) is None:
                return Cell("-")
            passes = show(row.block_efficiency, "{:.2f}")
            speed = f"{show(row.tokens_per_second_with_draft, '{:,.1f}')} tokens/s"
            detail = passes if brief else f"{speed}, {passes} a pass, {k_is(row.num_speculative_tokens)}"
            chosen = worth_most({name: each.speedup or 0.0 for name, each in rows.items()})
            return Cell(times(row.speedup), detail, "good" if kind == chosen else "")

        return cell

    def alone(rows: dict[str, BenchmarkRow]) -> Cell:
        speed = first(rows).tokens_per_second_alone
        return Cell(show(speed, "{:,.0f} tok/s")) if brief else Cell("1.00×", show(speed, "{:,.1f} tokens/s"))

    def first(rows: dict[str, BenchmarkRow]) -> BenchmarkRow:
        return next(iter(rows.values()))

    found = [by_kind for pair in benchmark.deployed for by_kind in fastest_by_task(benchmark, pair).values()]
    columns: dict[str, Column] = {"Task": lambda rows: first(rows).task}
    if len(benchmark.deployed) > 1:
        columns["Runtime"] = lambda rows: RUNTIMES.get(first(rows).runtime, first(rows).runtime)
    present = [kind for kind in PROPOSERS if any(kind in rows for rows in found)]
    headings = _BRIEF if brief else HEADINGS
    return table(found, columns | {"Nothing": alone} | {headings[kind]: shown(kind) for kind in present})


def replayed(benchmark: BenchmarkResults) -> Table:
    """Whole tasks: what the runtime counted beside what replay predicts for the same texts."""
    rows = [row for row in benchmark.rows if row.part == "tasks" and row.replayed_block_efficiency]

    def beside(counted: str, replayed: str, form: str) -> Callable[[BenchmarkRow], Cell]:
        def cell(row: BenchmarkRow) -> Cell:
            return Cell(show(getattr(row, counted), form), f"replay {show(getattr(row, replayed), form)}")

        return cell

    columns = fields("Task = task | Runtime = runtime | T = temperature g | K = num_speculative_tokens")
    columns["Proposer"] = lambda row: HEADINGS[row.proposer]
    columns["Tokens per pass"] = beside("block_efficiency", "replayed_block_efficiency", "{:.3f}")
    columns["Accepted"] = beside("num_accepted_tokens", "replayed_accepted_tokens", "{:,}")
    return table(rows, columns)
