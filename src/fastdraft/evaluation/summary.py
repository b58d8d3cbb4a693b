"""What an evaluation found, put together: the rows of `results.json`, the answers of `samples.json`, the table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdraft.console import Console
from fastdraft.decoding.token_stream import text_pieces
from fastdraft.evaluation.results import AnswerPiece, AnswerSample, EvaluationResults, nearest_k
from fastdraft.evaluation.rows import (
    CostRatios,
    Setting,
    difference_rows,
    faded_sentences,
    position_results,
    result_row,
)
from fastdraft.evaluation.work import EvaluationWork, ExactRuns, Replayed, looping_flags

_SAMPLES_PER_TASK = 2


def findings(
    work: EvaluationWork,
    replayed: Mapping[tuple[str, str, float], Replayed],
    exact: Mapping[Setting, ExactRuns],
    costs: CostRatios,
    context_length: int,
) -> dict[str, Any]:
    """The fields of `EvaluationResults` that follow from the counts: replay first, then exact, each in the order of the plan."""
    (groups, looping), seed, k = work.marks(), work.plan.seed, nearest_k(work.plan.num_speculative_tokens)
    tables, rows = work.tables(replayed), []
    for s, table in tables.items():
        place = s.task, s.temperature
        rows.append(result_row(s, table, looping[place], costs, seed, groups[place]))
    for s, runs in exact.items():
        together = groups[s.task, s.temperature][: len(runs.table)]
        rows.append(result_row(s, runs.table, looping_flags(runs.response_ids), costs, seed, together))
    headline = {s: table for s, table in tables.items() if s.num_speculative_tokens == k}
    by_position = {place: found.by_position for place, found in replayed.items()}
    return {
        "rows": rows,
        "differences": difference_rows(headline, seed, groups),
        "by_position": position_results(by_position, k, context_length, seed, groups),
        "greedy_check": work.greedy_check(exact),
    }


def samples(
    work: EvaluationWork, exact: Mapping[Setting, ExactRuns], tokenizer: PreTrainedTokenizerBase
) -> list[AnswerSample]:
    """A few exact answers in pieces, each marked accepted or not; the lowest sampled temperature, else greedy."""
    temperature = min((t for t in work.plan.temperatures if t > 0), default=0.0)
    k, tasks = (
        nearest_k(work.plan.exact_num_speculative_tokens),
        {task.name: task for task in work.plan.tasks},
    )
    found = []
    for setting, runs in exact.items():
        if (setting.temperature, setting.num_speculative_tokens) != (temperature, k):
            continue
        task = tasks[setting.task]
        shown = zip(task.prompt_names, task.prompt_ids, runs.response_ids, runs.accepted, strict=False)
        for name, prompt, ids, accepted in list(shown)[:_SAMPLES_PER_TASK]:
            sample = AnswerSample(
                task=task.name,
                id=name,
                temperature=temperature,
                num_speculative_tokens=k,
                prompt=str(tokenizer.decode(prompt, skip_special_tokens=False)),
                pieces=[AnswerPiece.from_json(piece) for piece in text_pieces(tokenizer, ids, accepted)],
            )
            found.append(sample)
    return found


def tell(results: EvaluationResults, console: Console) -> None:
    """What deserves a word or a warning in the terminal."""
    check = results.greedy_check
    if check and check.texts:
        equal = check.texts - check.different
        ties = f"; {check.near_ties} of the others are near-ties" if check.different else ""
        console.say(f"greedy exact runs equal to the target's own text: {equal} of {check.texts}{ties}")
        if check.different > check.near_ties:
            console.warn(
                "some greedy texts differ from the target's own by more than rounding; see greedy_check in results.json"
            )
    for sentence in faded_sentences(results.by_position) if results.by_position else ():
        console.warn(sentence)
