"""Every table, once: the page shows it whole, the terminal and the model card some of its columns.

console.table("Speed-up", *best(results).only("Task", "T", "by parameters").plain())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastdraft.console import format_seconds
from fastdraft.evaluation.results import SPEEDUPS, DifferenceRow, EvaluationResults, PositionRow, ResultRow
from fastdraft.reporting.definitions import (
    DEFINITIONS,
    PAPER_RATES,
    PAPER_TASKS,
    byte_size,
    count,
    duration,
    k_is,
    label,
    percent,
    times,
)

TRAINING = ("pretrain", "continue_pretrain", "align")
FEWEST_PROMPTS = 8
"""An interval over fewer prompts knows only their own spread: too little to say that two figures disagree."""
FORMS: dict[str, Callable[[Any], str]] = {
    "": str,
    "×": times,
    "seconds": duration,
    "bytes": byte_size,
    "count": count,
    "clock": format_seconds,
    "label": label,
}


class Cell(NamedTuple):
    """A figure, an interval or remark in small print, and a mark: good, bad or paper."""

    text: str
    detail: str = ""
    mark: str = ""


Column = str | Callable[[Any], Cell | str]
"""A field of the row and how it is written (`speedup ×`, `overlap .3f`), or a function of the row."""


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold figures only, and so are aligned to the right; never the first, which names the row."""
        columns = zip(*self.rows, strict=True)
        return [i > 0 and all(_is_figure(cell.text) for cell in column) for i, column in enumerate(columns)]

    def only(self, *columns: str) -> Table:
        """The same with some of its columns, those that it has."""
        places = [self.columns.index(name) for name in columns if name in self.columns]
        return Table([self.columns[i] for i in places], [[row[i] for i in places] for row in self.rows])

    def plain(self, *, details: bool = False) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of text, for the terminal."""
        return list(self.columns), [
            [f"{cell.text} ({cell.detail})" if details and cell.detail else cell.text for cell in row]
            for row in self.rows
        ]


def table(rows: Iterable[Any], columns: Mapping[str, Column]) -> Table:
    return Table(list(columns), [[_cell(row, each) for each in columns.values()] for row in rows])


def _cell(row: Any, column: Column) -> Cell:
    if not isinstance(column, str):
        found = column(row)
        return found if isinstance(found, Cell) else Cell(found)
    key, _, form = column.partition(" ")
    value = row.get(key) if isinstance(row, Mapping) else getattr(row, key)
    return Cell("-" if value is None else FORMS[form](value) if form in FORMS else format(value, form))


def _is_figure(text: str) -> bool:
    return not text or text in ("-", "–") or text.lstrip("+-−<")[:1].isdigit()


def defined(*, benchmark: bool) -> Table:
    """What the figures mean; those behind "Measured speed-up" only where a benchmark ran."""
    names = list(DEFINITIONS)
    shown = names if benchmark else names[: names.index("Measured speed-up")]
    return table(shown, {"Figure": lambda name: name, "Definition": lambda name: DEFINITIONS[name]})


# What an evaluation found. A setting is a task and a temperature.


def _by_setting(
    results: EvaluationResults, columns: Mapping[str, Callable[[str, float], Cell | str]]
) -> Table:
    given = {name: lambda setting, make=make: make(*setting) for name, make in columns.items()}
    return table(results.settings(), {"Task": lambda s: s[0], "T": lambda s: f"{s[1]:g}", **given})


def _rate(row: ResultRow | None, key: str, form: str = ".2f", after: str = "") -> Cell:
    value = getattr(row, key, None)
    if row is None or value is None:
        return Cell("-")
    around = row.interval(key)
    return Cell(format(value, form) + after, f"{around[0]:{form}} to {around[1]:{form}}" if around else "")


def ladder(results: EvaluationResults) -> Table:
    """Acceptance after each checkpoint, at the headline K, with 95 % intervals."""

    def shown(name: str, key: str, form: str) -> Callable[[str, float], Cell]:
        return lambda task, t: _rate(results.row(name, task, t), key, form)

    names = results.checkpoints
    rates = {f"{label(name)} rate": shown(name, "acceptance_rate", ".3f") for name in names}
    tokens = {f"{label(name)} tok/pass": shown(name, "block_efficiency", ".2f") for name in names}
    return _by_setting(results, rates | tokens)


def paper_ladder() -> Table:
    """The paper's own acceptance rates, of other models on other test sets."""
    rows = [
        (task, PAPER_TASKS[task], pair, *(f"{rate:.3f}" for rate in rates))
        for pair, by_task in PAPER_RATES.items()
        for task, rates in by_task.items()
    ]
    names = ("Task", "Test set", "Draft", "PT", "CP", "FT")
    return table(rows, {name: lambda row, i=i: Cell(row[i], mark="paper") for i, name in enumerate(names)})


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
    return _by_setting(results, {f"{label(a)} → {label(b)}": step(a, b) for a, b in steps})


def _minus(text: str) -> str:
    return text.replace("-", "−")


def best(results: EvaluationResults) -> Table:
    """The final draft at the best K of every kind of speed-up; tokens per target pass at the first one's."""

    def speedup(key: str) -> Callable[[str, float], Cell]:
        def shown(task: str, temperature: float) -> Cell:
            row = results.best(task, temperature, key)
            found = _rate(row, key, ".2f", f"× at {k_is(row.num_speculative_tokens)}" if row else "")
            return found._replace(mark="" if row is None else "good" if getattr(row, key) > 1 else "bad")

        return shown

    def tokens(task: str, temperature: float) -> Cell:
        return _rate(results.best(task, temperature, results.speedups[0]), "block_efficiency")

    speedups = {SPEEDUPS[key]: speedup(key) for key in results.speedups}
    return _by_setting(results, {"Tokens per target pass": tokens, **speedups})


def all_results(results: EvaluationResults) -> Table:
    columns: dict[str, Column] = {
        "Checkpoint": "checkpoint label",
        "Task": "task",
        "Method": "method",
        "T": "temperature g",
        "K": "num_speculative_tokens",
        "Rounds": "num_drafts ,.0f",
        "Proposed": "num_draft_tokens ,.0f",
        "Accepted": "num_accepted_tokens ,.0f",
        "Generated": "num_generated_tokens ,.0f",
        "AR": "acceptance_rate .3f",
        "Cond. AR": "conditional_acceptance_rate .3f",
        "Overlap": "overlap .3f",
        "Tokens per pass": "block_efficiency .2f",
    }
    return table(results.rows, columns | {words: f"{key} .2f" for key, words in SPEEDUPS.items()})


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
        return Cell(
            f"{row.acceptance_rate:.3f}", f"{row.block_efficiency:.2f} a pass, {row.num_prompts} texts"
        )

    def at(first: int) -> Callable[[str, float], Cell]:
        return lambda task, t: shown(found.get((task, t, first)))

    starts = sorted({row.first for row in results.rows_by_position})
    return _by_setting(results, {stretch(start): at(start) for start in starts})


def stretch(first: int) -> str:
    """0 -> `0–512`, 1024 -> `1k–2k`."""
    ends = (first, first * 2 or 512)
    return "–".join(f"{end // 1024}k" if end and end % 1024 == 0 else str(end) for end in ends)


def agreement(results: EvaluationResults) -> Table:
    """Tokens per target pass of settings counted both ways."""
    pairs = [
        (exact, replay)
        for exact in results.select(method="exact")
        if (
            replay := results.row(
                exact.checkpoint, exact.task, exact.temperature, exact.num_speculative_tokens
            )
        )
        and replay.method == "replay"
    ]

    def shown(row: ResultRow) -> Cell:
        found = _rate(row, "block_efficiency")
        return found._replace(detail=f"{found.detail}, {row.num_prompts} prompts")

    def change(pair: tuple[ResultRow, ResultRow]) -> Cell:
        first, second = (row.interval("block_efficiency") for row in pair)
        enough = min(row.num_prompts for row in pair) >= FEWEST_PROMPTS
        apart = enough and first and second and (first[0] > second[1] or second[0] > first[1])
        share = (pair[1].block_efficiency or 0.0) / (pair[0].block_efficiency or 1.0) - 1
        return Cell(_minus(f"{share:+.1%}"), "intervals apart" if apart else "", "bad" if apart else "")

    columns: dict[str, Column] = {
        "Task": lambda pair: pair[0].task,
        "T": lambda pair: f"{pair[0].temperature:g}",
        "K": lambda pair: str(pair[0].num_speculative_tokens),
        "Exact": lambda pair: shown(pair[0]),
        "Replay": lambda pair: shown(pair[1]),
        "Difference": change,
    }
    return table(pairs, columns)


def looping(results: EvaluationResults) -> Table:
    """Share of texts that repeat themselves, and the figures without them, at the headline K."""
    rows = [results.row(results.checkpoints[-1], *setting) for setting in results.settings()]
    columns: dict[str, Column] = {
        "Task": "task",
        "T": "temperature g",
        "Looping": "looping_share .1%",
        "AR": "acceptance_rate .3f",
        "AR without": "acceptance_rate_without_looping .3f",
        "Tokens per pass": "block_efficiency .2f",
        "Without": "block_efficiency_without_looping .2f",
    }
    return table([row for row in rows if row], columns)


def contamination(results: EvaluationResults) -> Table:
    """How many evaluation prompts share a run of 13 tokens with something trained on."""
    columns: dict[str, Column] = {
        "Task": lambda item: item[0],
        "Prompts with overlap": lambda item: f"{item[1].prompts_with_overlap} of {item[1].prompts}",
        "13-grams matched": lambda item: f"{item[1].ngrams_matched:,} of {item[1].ngrams:,}",
        "Share": lambda item: percent(item[1].ngrams_matched / max(item[1].ngrams, 1), 2),
    }
    return table((results.contamination or {}).items(), columns)


# What the other stages tell in their manifests.


def training(manifests: Mapping[str, Mapping[str, Any]]) -> Table:
    def validation(row: Mapping[str, Any]) -> str:
        parts = [f"{name} {loss:.3f}" for name, loss in (row.get("validation_loss") or {}).items()]
        ends = [row.get(f"{when}_block_efficiency") for when in ("start", "validation")]
        known = " → ".join(f"{end:.2f}" for end in ends if end is not None)
        return ", ".join([*parts, *([f"{known} tokens per target pass"] if known else [])]) or "-"

    columns: dict[str, Column] = {
        "Stage": "stage label",
        "Tokens": "tokens count",
        "Steps": "steps ,",
        "Train loss": "train_loss .3f",
        "Validation": validation,
        "Tokens/s": "tokens_per_second count",
        "Time": "seconds clock",
    }
    return table([manifests[stage] for stage in TRAINING if stage in manifests], columns)


def stages(manifests: Mapping[str, Mapping[str, Any]]) -> Table:
    columns: dict[str, Column] = {
        "Stage": "stage",
        "Time": "seconds clock",
        "Finished (UTC)": lambda row: row["provenance"]["time"].replace("T", " ").removesuffix("+00:00"),
        "Fingerprint": "fingerprint",
    }
    return table(manifests.values(), columns)


def corpora(prepare: Mapping[str, Any]) -> Table:
    columns: dict[str, Column] = {
        "Corpus": "name",
        "Documents": "documents count",
        "Tokens": "tokens count",
        "Rows": "rows count",
        "Validation tokens": lambda row: count(row["validation"]["tokens"]),
        "Duplicates removed": "duplicates count",
    }
    rows = [{"name": name, **corpus["train"], **corpus} for name, corpus in prepare["corpora"].items()]
    return table(rows, columns)


def sources(prepare: Mapping[str, Any]) -> Table:
    columns: dict[str, Column] = {
        "Corpus": "corpus",
        "Source": lambda row: str(row.get("from") or row["kind"]),
        "Licence": lambda row: row.get("license") or "not recorded",
        "Tokens taken": "tokens count",
    }
    found = prepare["corpora"].items()
    return table([{"corpus": name, **row} for name, corpus in found for row in corpus["sources"]], columns)


def answers(synthesize: Mapping[str, Any]) -> Table:
    """Asked = written + filtered by reason + failed."""
    parts = {"asked": synthesize["asked"], "written": synthesize["written"]}
    parts |= {f"filtered: {reason}": number for reason, number in synthesize["filtered"].items()}
    columns: dict[str, Column] = {
        "Answers of the target": lambda part: part[0],
        "Rows": lambda part: f"{part[1]:,}",
        "Share": lambda part: f"{part[1] / max(synthesize['asked'], 1):.1%}",
    }
    return table({**parts, "failed": synthesize["failed"]}.items(), columns)


def counts_by(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """What became of the rows of every source or temperature."""
    rows = [
        {"": name, **{key: n for key, n in each.items() if isinstance(n, int)}}
        for name, each in found.items()
    ]
    names = list(dict.fromkeys(name for row in rows for name in row if name))
    return table(rows, {"": lambda row: row[""], **{name.replace("_", " "): f"{name} ," for name in names}})
