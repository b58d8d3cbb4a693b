"""Every table, once: the page shows it whole, the terminal and the model card some of its columns.

console.table("Speed-up", *best(results).only("Task", "T", "by parameters").plain())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastdraft.benchmark.rows import BenchmarkResults, BenchmarkRow, Pair, TextDifference
from fastdraft.console import format_seconds
from fastdraft.evaluation.results import (
    SPEEDUPS,
    DifferenceRow,
    EvaluationResults,
    PositionRow,
    ProposedRow,
    ResultRow,
)
from fastdraft.functional.same_text import near_tie
from fastdraft.reporting.definitions import (
    PAPER_RATES,
    PAPER_SETS,
    byte_size,
    count,
    duration,
    k_is,
    label,
    percent,
    show,
    stretch,
    times,
)
from fastdraft.reporting.verdict import worth

TRAINING = ("pretrain", "continue_pretrain", "align")
FEWEST_PROMPTS = 8  # an interval over fewer knows only their own spread: too little to call figures apart
FORMS: dict[str, Callable[[Any], str]] = {
    "": str,
    "×": times,
    "seconds": duration,
    "bytes": byte_size,
    "count": count,
    "clock": format_seconds,
    "percent": percent,
    "label": label,
    "losses": lambda losses: ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()),
}


class Cell(NamedTuple):
    """A figure, an interval or remark in small print, and a mark: good or bad."""

    text: str
    detail: str = ""
    mark: str = ""


# A figure's path in the row and how it is written (`speedup ×`, `train.tokens count`), or a function of the
# row.
Column = str | Callable[[Any], Cell | str]


@dataclass(frozen=True)
class Table:
    """Headings, and rows with a cell under each."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold figures only, and so are aligned to the right; never the first."""

        def figure(text: str) -> bool:
            return not text or text in ("-", "–") or text.lstrip("+-−<")[:1].isdigit()

        columns = zip(*self.rows, strict=True)
        return [i > 0 and all(figure(cell.text) for cell in column) for i, column in enumerate(columns)]

    def only(self, *columns: str) -> Table:
        """The same with some of its columns, those that it has."""
        places = [self.columns.index(name) for name in columns if name in self.columns]
        return Table([self.columns[i] for i in places], [[row[i] for i in places] for row in self.rows])

    def plain(self, *, details: bool = False) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of text, for the terminal."""

        def shown(cell: Cell) -> str:
            return f"{cell.text} ({cell.detail})" if details and cell.detail else cell.text

        return list(self.columns), [[shown(cell) for cell in row] for row in self.rows]


def table(rows: Iterable[Any], columns: str | Mapping[str, Column]) -> Table:
    """A table of `Heading = path form | ...`, or of headings and columns."""
    given = fields(columns) if isinstance(columns, str) else columns
    return Table(list(given), [[_cell(row, each) for each in given.values()] for row in rows])


def fields(columns: str) -> dict[str, Column]:
    """Headings and columns of `Heading = path form | ...`, to be mixed with functions."""
    pairs = (each.split("=", 1) for each in columns.split("|"))
    return {heading.strip(): path.strip() for heading, path in pairs}


def _cell(row: Any, column: Column) -> Cell:
    if not isinstance(column, str):
        found = column(row)
        return found if isinstance(found, Cell) else Cell(found)
    path, _, form = column.partition(" ")
    value = row
    for key in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(int(key) if key.isdigit() else key)
        elif value is not None:
            value = value[int(key)] if key.isdigit() else getattr(value, key)
    return Cell("-" if value is None else FORMS[form](value) if form in FORMS else format(value, form))


# What an evaluation found. A setting is a task and a temperature.


def by_setting(
    results: EvaluationResults, columns: Mapping[str, Callable[[str, float], Cell | str]]
) -> Table:
    """A row for every task and temperature."""
    given = {name: lambda setting, make=make: make(*setting) for name, make in columns.items()}
    return table(results.settings(), {"Task": lambda s: s[0], "T": lambda s: f"{s[1]:g}", **given})


def rate(row: ProposedRow | None, key: str, form: str = ".2f", after: str = "") -> Cell:
    """A figure of a row with its interval in small print."""
    value = getattr(row, key, None)
    if row is None or value is None:
        return Cell("-")
    around = row.interval(key)
    return Cell(format(value, form) + after, f"{around[0]:{form}} to {around[1]:{form}}" if around else "")


def ladder(results: EvaluationResults, earlier: EvaluationResults | None = None) -> Table:
    """Acceptance after each checkpoint, at the headline K; `earlier`: of the draft on its own target."""

    def shown(found: EvaluationResults, name: str, key: str, form: str) -> Callable[[str, float], Cell]:
        return lambda task, t: rate(found.row(name, task, t), key, form)

    places = {label(name): (results, name) for name in results.checkpoints}
    if earlier:
        places = {"own target": (earlier, earlier.checkpoints[-1])} | places
    rates = {f"{name} rate": shown(*place, "acceptance_rate", ".3f") for name, place in places.items()}
    tokens = {f"{name} tok/pass": shown(*place, "block_efficiency", ".2f") for name, place in places.items()}
    return by_setting(results, rates | tokens)


def paper_ladder() -> Table:
    """The paper's own acceptance rates, of other models on other test sets."""
    rates = [(pair, task, *by_task[task]) for pair, by_task in PAPER_RATES.items() for task in by_task]
    columns: dict[str, Column] = {"Task": "1", "Test set": lambda row: PAPER_SETS[row[1]]}
    return table(rates, columns | fields("Draft = 0 | PT = 2 .3f | CP = 3 .3f | FT = 4 .3f"))


def differences(results: EvaluationResults) -> Table:
    """What each training stage changed, at the headline K; coloured where the interval leaves out 0."""
    found = {(row.task, row.temperature, row.before, row.after): row for row in results.differences}

    def change(row: DifferenceRow | None) -> Cell:
        if row is None or row.difference is None or row.difference_low is None or row.difference_high is None:
            return Cell("-")
        mark = "good" if row.difference_low > 0 else "bad" if row.difference_high < 0 else ""
        detail = f"{row.difference_low:+.3f} to {row.difference_high:+.3f}"
        return Cell(_minus(f"{row.difference:+.3f}"), _minus(detail), mark)

    def step(before: str, after: str) -> Callable[[str, float], Cell]:
        return lambda task, t: change(found.get((task, t, before, after)))

    steps = dict.fromkeys((row.before, row.after) for row in results.differences)
    return by_setting(results, {f"{label(a)} → {label(b)}": step(a, b) for a, b in steps})


def _minus(text: str) -> str:
    return text.replace("-", "−")


def best(results: EvaluationResults) -> Table:
    """The final draft at the best K of every kind of speed-up; tokens per target pass at the first one's."""

    def speedup(key: str) -> Callable[[str, float], Cell]:
        def shown(task: str, temperature: float) -> Cell:
            row = results.best(task, temperature, key)
            found = rate(row, key, ".2f", f"× at {k_is(row.num_speculative_tokens)}" if row else "")
            return found._replace(mark="" if row is None else "good" if getattr(row, key) > 1 else "bad")

        return shown

    def tokens(task: str, temperature: float) -> Cell:
        return rate(results.best(task, temperature, results.speedups[0]), "block_efficiency")

    speedups = {SPEEDUPS[key]: speedup(key) for key in results.speedups}
    return by_setting(results, {"Tokens per target pass": tokens, **speedups})


def positions(results: EvaluationResults) -> Table:
    """Share of rounds that accept position 1 to K, at the headline K and temperature."""

    def shares(checkpoint: str, task: str) -> str:
        row = results.row(checkpoint, task, results.temperatures[0])
        return ", ".join(f"{share:.3f}" for share in row.accepted_per_position) if row else "-"

    columns = {task: lambda checkpoint, task=task: shares(checkpoint, task) for task in results.tasks}
    return table(results.checkpoints, {"Checkpoint": label, **columns})


def along_the_text(results: EvaluationResults) -> Table:
    """The final draft's acceptance by position in the text."""
    found = {(row.task, row.temperature, row.first): row for row in results.rows_by_position}

    def shown(row: PositionRow | None) -> Cell:
        if row is None or row.acceptance_rate is None or row.block_efficiency is None:
            return Cell("-")
        detail = f"{row.block_efficiency:.2f} a pass, {row.num_prompts} texts"
        return Cell(f"{row.acceptance_rate:.3f}", detail)

    def at(first: int) -> Callable[[str, float], Cell]:
        return lambda task, t: shown(found.get((task, t, first)))

    starts = sorted({row.first for row in results.rows_by_position})
    return by_setting(results, {stretch(start): at(start) for start in starts})


def agreement(results: EvaluationResults) -> Table:
    """Tokens per target pass of settings counted both ways, exactly and by replay."""

    def setting(row: ResultRow) -> tuple[str, str, float, int]:
        return row.checkpoint, row.task, row.temperature, row.num_speculative_tokens

    def shown(row: ResultRow) -> Cell:
        found = rate(row, "block_efficiency")
        return found._replace(detail=f"{found.detail}, {row.num_prompts} prompts")

    def change(pair: tuple[ResultRow, ResultRow]) -> Cell:
        first, second = (row.interval("block_efficiency") for row in pair)
        enough = min(row.num_prompts for row in pair) >= FEWEST_PROMPTS
        apart = enough and first and second and (first[0] > second[1] or second[0] > first[1])
        share = (pair[1].block_efficiency or 0.0) / (pair[0].block_efficiency or 1.0) - 1
        return Cell(_minus(f"{share:+.1%}"), "intervals apart" if apart else "", "bad" if apart else "")

    replayed = {setting(row): row for row in results.select(method="replay")}
    pairs = [(row, replayed.get(setting(row))) for row in results.select(method="exact")]
    columns = fields("Task = 0.task | T = 0.temperature g | K = 0.num_speculative_tokens")
    columns |= {"Exact": lambda pair: shown(pair[0]), "Replay": lambda pair: shown(pair[1])}
    return table([pair for pair in pairs if pair[1]], {**columns, "Difference": change})


# What the clock says.


def measured(benchmark: BenchmarkResults, pairs: Sequence[Pair] = ()) -> Table:
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
    rows = [row for pair in pairs or benchmark.pairs[:1] for row in benchmark.fastest_of_each(pair)]
    return table(rows, columns)


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
    columns = fields("Weights = pair | Context, tokens = prefix_tokens ,")
    columns |= fields("Draft, 1 token = draft_seconds seconds")
    columns |= {f"Target, {n}": f"target_seconds.{n} seconds" for n in shown}
    return table(benchmark.latencies, columns)


def different_texts(benchmark: BenchmarkResults) -> Table:
    """Every greedy text that differs: once for each place, with the widest gap of log-probs there."""
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


# What the other stages tell in their manifests.


def sources(prepare: Mapping[str, Any]) -> Table:
    """Where the corpora come from, with the licence that the recipe names."""
    found = [(name, row) for name, corpus in prepare["corpora"].items() for row in corpus["sources"]]
    where: dict[str, Column] = {"Source": lambda item: str(item[1].get("from") or item[1]["kind"])}
    more = fields("Licence = 1.license | Tokens taken = 1.tokens count")
    return table(found, {**fields("Corpus = 0"), **where, **more})


def answers(synthesize: Mapping[str, Any]) -> Table:
    """Asked = written + filtered by reason + failed."""
    parts = {key: synthesize[key] for key in ("asked", "written")}
    parts |= {f"filtered: {reason}": number for reason, number in synthesize["filtered"].items()}
    parts["failed"] = synthesize["failed"]
    rows = [(name, number, number / max(parts["asked"], 1)) for name, number in parts.items()]
    return table(rows, "Answers of the target = 0 | Rows = 1 , | Share = 2 .1%")


def counts_by(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """What became of the rows of every source or temperature."""
    given = (pair for each in found.values() for pair in each.items())
    names = dict.fromkeys(name for name, value in given if isinstance(value, int))
    return table(found.items(), {"": "0", **{name.replace("_", " "): f"1.{name} ," for name in names}})
