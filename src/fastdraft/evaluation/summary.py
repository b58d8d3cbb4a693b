"""What an evaluation found, put together: the rows of `results.json`, the answers of `samples.json`, the table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdraft.console import Console
from fastdraft.decoding.token_stream import text_pieces
from fastdraft.evaluation.results import (
    CHECKPOINT_LABELS,
    AnswerPiece,
    AnswerSample,
    EvaluationResults,
    nearest_k,
)
from fastdraft.evaluation.rows import (
    CostRatios,
    Setting,
    difference_rows,
    faded_sentence,
    position_results,
    result_row,
)
from fastdraft.evaluation.work import EvaluationPlan, EvaluationWork, ExactRuns, Replayed, looping_flags

_SAMPLES_PER_TASK = 2


def findings(
    work: EvaluationWork,
    replayed: Mapping[tuple[str, str, float], Replayed],
    exact: Mapping[Setting, ExactRuns],
    costs: CostRatios,
    context_length: int,
) -> dict[str, Any]:
    """The fields of `EvaluationResults` that follow from the counts: replay first, then exact, each in the order of the plan."""
    groups, looping = work.marks()
    tables, seed, k = work.tables(replayed), work.plan.seed, nearest_k(work.plan.num_speculative_tokens)
    rows = [
        result_row(s, table, looping[s.task, s.temperature], costs, seed, groups[s.task, s.temperature])
        for s, table in tables.items()
    ]
    for s, runs in exact.items():
        own_groups = groups[s.task, s.temperature][: len(runs.table)]
        rows.append(result_row(s, runs.table, looping_flags(runs.response_ids), costs, seed, own_groups))
    headline = {s: table for s, table in tables.items() if s.num_speculative_tokens == k}
    by_position = {place: found.by_position for place, found in replayed.items()}
    return {
        "rows": rows,
        "differences": difference_rows(headline, seed, groups),
        "by_position": position_results(by_position, k, context_length, seed, groups),
        "greedy_check": work.greedy_check(exact),
    }


def samples(
    plan: EvaluationPlan, exact: Mapping[Setting, ExactRuns], tokenizer: PreTrainedTokenizerBase
) -> list[AnswerSample]:
    """A few exact answers in pieces, each marked accepted or not; the lowest sampled temperature, else greedy."""
    temperature = min((t for t in plan.temperatures if t > 0), default=0.0)
    k, tasks = nearest_k(plan.exact_num_speculative_tokens), {task.name: task for task in plan.tasks}
    return [
        AnswerSample(
            task=setting.task,
            id=tasks[setting.task].prompt_names[index],
            temperature=temperature,
            num_speculative_tokens=k,
            prompt=tokenizer.decode(tasks[setting.task].prompt_ids[index], skip_special_tokens=False),
            pieces=[
                AnswerPiece.from_json(piece)
                for piece in text_pieces(tokenizer, runs.response_ids[index], runs.accepted[index])
            ],
        )
        for setting, runs in exact.items()
        if (setting.temperature, setting.num_speculative_tokens) == (temperature, k)
        for index in range(min(_SAMPLES_PER_TASK, len(runs.response_ids)))
    ]


def tell(results: EvaluationResults, console: Console) -> None:
    """The rates of each checkpoint in the terminal, and what deserves a warning."""
    k, drafts = results.headline_k, results.checkpoints
    labels = [CHECKPOINT_LABELS.get(name, name) for name in drafts]
    columns = [
        "task",
        "T",
        *(f"{label} rate" for label in labels),
        *(f"{label} tok/pass" for label in labels),
    ]
    found = {
        (row.checkpoint, row.task, row.temperature): row
        for row in results.select(method="replay", num_speculative_tokens=k)
    }
    lines = []
    for task, temperature in dict.fromkeys(place[1:] for place in found):
        cells = [found.get((name, task, temperature)) for name in drafts]
        rates = [row and row.acceptance_rate for row in cells]
        efficiencies = [row and row.block_efficiency for row in cells]
        lines.append(
            [
                task[:16],
                f"{temperature:g}",
                *("-" if rate is None else f"{rate:.3f}" for rate in rates),
                *("-" if value is None else f"{value:.2f}" for value in efficiencies),
            ]
        )
    console.table(f"Acceptance rate and tokens per target pass, K = {k}, by replay", columns, lines)
    check = results.greedy_check
    if check and check.texts:
        equal = check.texts - check.different
        ties = f"; {check.near_ties} of the others are near-ties" if check.different else ""
        console.say(f"greedy exact runs equal to the target's own text: {equal} of {check.texts}{ties}")
        if check.different > check.near_ties:
            console.warn(
                "some greedy texts differ from the target's own by more than rounding; see greedy_check in results.json"
            )
    if results.by_position:
        for case in results.by_position.faded:
            console.warn(faded_sentence(case, results.by_position.context_length))
