"""What an evaluation found, put together from its units: `results.json`, `samples.json`, the table in the terminal.

Decides the layout of `results.json` (schema 1), at which settings checkpoints are compared (K = 3 or the nearest), that the
greedy check covers every exact greedy run, and which answers are shown coloured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastdraft.decoding.evaluation import greedy_difference, looping_flags, nearest
from fastdraft.decoding.figures import CostRatios, CountsTable, Setting, difference_rows, result_row, tidy
from fastdraft.decoding.position_figures import faded_sentence, position_results
from fastdraft.decoding.token_stream import text_pieces
from fastdraft.decoding.workbench import ExactUnit, Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES_PER_TASK = 2
LABELS = {"design": "untrained", "pretrain": "PT", "continue_pretrain": "CP", "align": "FT"}


def findings(
    bench: Workbench,
    replayed: Mapping[Setting, CountsTable],
    exact: Mapping[Setting, ExactUnit],
    costs: CostRatios,
    context_length: int,
) -> dict[str, Any]:
    """All of `results.json` that follows from the counts.

    Args:
        bench: The evaluation.
        replayed: Counts of every checkpoint; the last one is the final draft.
        exact: Real runs of the final draft.
        costs: The final draft's.
        context_length: Tokens that target and drafts can read.
    """
    checkpoints = dict.fromkeys(setting.checkpoint for setting in replayed)
    return {
        "rows": result_rows(bench, replayed, exact, costs),
        "differences": headline_differences(bench, replayed),
        "by_position": by_position(bench, checkpoints, context_length),
        "greedy_check": greedy_check(bench, exact),
    }


def result_rows(
    bench: Workbench,
    replayed: Mapping[Setting, CountsTable],
    exact: Mapping[Setting, ExactUnit],
    costs: CostRatios,
) -> list[dict[str, Any]]:
    """Every row of `results.json`: replay first, then exact, each in the order of the plan."""
    looping = {(task.name, t): looping_flags(bench.texts(task, t)) for task, t in bench.plan.settings}
    seed, groups = bench.plan.seed, bench.groups()
    rows = [
        result_row(
            s, table, looping[s.task, s.temperature], costs, seed, groups=groups[s.task, s.temperature]
        )
        for s, table in replayed.items()
    ]
    return rows + [
        result_row(
            s,
            unit.table,
            looping_of(unit),
            costs,
            seed,
            groups=groups[s.task, s.temperature][: len(unit.table)],
        )
        for s, unit in exact.items()
    ]


def looping_of(unit: ExactUnit) -> Any:
    """Looping flags of texts that an exact run wrote."""
    import numpy as np

    from fastdraft.data.filters import is_looping

    return np.array([is_looping(ids) for ids in unit.response_ids], dtype=bool)


def greedy_check(bench: Workbench, exact: Mapping[Setting, ExactUnit]) -> dict[str, Any]:
    """Compares every greedy exact text with the target's own, token by token."""
    own = {task.name: bench.texts(task, 0.0) for task, t in bench.plan.settings if t == 0}
    names = {task.name: task.prompt_names for task in bench.plan.tasks}
    texts, cases = 0, list[dict[str, Any]]()
    for setting, unit in exact.items():
        if setting.temperature != 0:
            continue
        for row, ids, name in zip(own[setting.task], unit.response_ids, names[setting.task], strict=False):
            texts += 1
            found = greedy_difference(bench.loaded_target, row, ids)
            if found:
                place = {
                    "task": setting.task,
                    "prompt": name,
                    "num_speculative_tokens": setting.num_speculative_tokens,
                }
                cases.append(
                    {
                        **place,
                        "token": found.place,
                        "logprob_gap": tidy(found.gap),
                        "near_tie": found.near_tie,
                    }
                )
    return {
        "texts": texts,
        "different": len(cases),
        "near_ties": sum(case["near_tie"] for case in cases),
        "cases": cases,
    }


def headline_differences(bench: Workbench, replayed: Mapping[Setting, CountsTable]) -> list[dict[str, Any]]:
    """Each checkpoint against the one before, per task and temperature, at the headline K."""
    k = nearest(bench.plan.num_speculative_tokens)
    return difference_rows(
        {s: table for s, table in replayed.items() if s.num_speculative_tokens == k},
        bench.plan.seed,
        bench.groups(),
    )


def by_position(bench: Workbench, checkpoints: Iterable[str], context_length: int) -> dict[str, Any]:
    """Acceptance along the text, by replay at the headline K."""
    k = nearest(bench.plan.num_speculative_tokens)
    return position_results(bench.positions(checkpoints), k, context_length, bench.plan.seed, bench.groups())


def faded(found: Mapping[str, Any]) -> list[str]:
    """Warnings about a draft whose acceptance dies before the context ends."""
    return [faded_sentence(case, found["context_length"]) for case in found["faded"]]


def samples(
    bench: Workbench, exact: Mapping[Setting, ExactUnit], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """A few exact answers as pieces of text, each marked accepted or not; the lowest sampled temperature, else greedy."""
    temperature = min((t for t in bench.plan.temperatures if t > 0), default=0.0)
    k = nearest(bench.plan.exact_num_speculative_tokens)
    tasks = {task.name: task for task in bench.plan.tasks}
    found = []
    for setting, unit in exact.items():
        if setting.temperature != temperature or setting.num_speculative_tokens != k:
            continue
        task = tasks[setting.task]
        for index in range(min(SAMPLES_PER_TASK, len(unit.response_ids))):
            prompt = tokenizer.decode(task.prompt_ids[index], skip_special_tokens=False)
            pieces = text_pieces(tokenizer, unit.response_ids[index], unit.accepted[index])
            place = {
                "task": setting.task,
                "id": task.prompt_names[index],
                "temperature": temperature,
                "num_speculative_tokens": k,
            }
            found.append({**place, "prompt": prompt, "pieces": pieces})
    return found


def summary_table(
    rows: Sequence[Mapping[str, Any]], num_speculative_tokens: Sequence[int]
) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and lines for the terminal: acceptance rate and block efficiency of each checkpoint at the headline K."""
    k = nearest(num_speculative_tokens)
    shown = [row for row in rows if row["method"] == "replay" and row["num_speculative_tokens"] == k]
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in shown))
    found = {(row["checkpoint"], row["task"], row["temperature"]): row for row in shown}
    labels = [LABELS.get(name, name) for name in checkpoints]
    columns = [
        "task",
        "T",
        *(f"{label} rate" for label in labels),
        *(f"{label} tok/pass" for label in labels),
    ]
    lines = []
    for task, temperature in dict.fromkeys((row["task"], row["temperature"]) for row in shown):
        cells = [found.get((name, task, temperature), {}) for name in checkpoints]
        rates = [_cell(cell.get("acceptance_rate"), ".3f") for cell in cells]
        lines.append(
            [
                task[:16],
                f"{temperature:g}",
                *rates,
                *(_cell(cell.get("block_efficiency"), ".2f") for cell in cells),
            ]
        )
    return f"Acceptance rate and tokens per target pass, K = {k}, by replay", columns, lines


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
