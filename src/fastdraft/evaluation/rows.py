"""From counts to what an evaluation found: rows of `results.json`, answers of `samples.json`, warnings.

What cannot be computed is null. Intervals are of a bootstrap over prompts, those of one group drawn together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fastdraft.console import Console
from fastdraft.data.filters import is_looping
from fastdraft.decoding.latency import Latency
from fastdraft.decoding.reader import Readable
from fastdraft.decoding.token_stream import text_pieces
from fastdraft.evaluation.results import (
    AnswerPiece,
    AnswerSample,
    DifferenceRow,
    EvaluationResults,
    FadedCase,
    GreedyCase,
    GreedyCheck,
    PositionResults,
    PositionRow,
    ResultRow,
    nearest_k,
)
from fastdraft.evaluation.work import EvaluationWork, ExactRuns, Replayed, Setting
from fastdraft.forecast import mbsu, predicted_speedup
from fastdraft.functional import acceptance as columns
from fastdraft.functional.acceptance import Counts, CountsTable, counts_from_array, tidy, tidy_count
from fastdraft.functional.intervals import (
    Groups,
    difference_interval,
    group_numbers,
    num_groups,
    ratio_interval,
)
from fastdraft.functional.positions import bucket_bounds
from fastdraft.functional.same_text import Judge, compare_texts

# A draft that reads beyond its trained lengths loses nearly all; texts of other lengths differ by far less.
_FADED = 0.5
_ENOUGH_TOKENS, _ENOUGH_CONVERSATIONS = 300, 4  # proposals and draws of a stretch of text that is judged
_SAMPLES_PER_TASK = 2

# By task and temperature which prompts are drawn together.
GroupsBySetting = Mapping[tuple[str, float], Groups]


@dataclass(frozen=True)
class CostRatios:
    """The draft's cost for one token over the target's, three ways."""

    parameters: float
    bytes: float
    latency: Latency | None = None


def findings(
    work: EvaluationWork,
    replayed: Mapping[tuple[str, str, float], Replayed],
    exact: Mapping[Setting, ExactRuns],
    costs: CostRatios,
    context_length: int,
) -> dict[str, Any]:
    """The fields of `EvaluationResults` that follow from the counts; replay's rows first."""
    seed, ks, groups = work.seed, work.config.num_speculative_tokens, prompt_groups(work)
    looping = {place: _looping([row.response_ids for row in texts]) for place, texts in work.texts.items()}
    tables = {
        Setting(name, task, "replay", t, k): table[:, : columns.TOTALS + k]
        for (name, task, t), found in replayed.items()
        for k, table in zip(ks, found.by_k, strict=True)
    }
    rows = []
    for s, table in tables.items():
        place = s.task, s.temperature
        rows.append(result_row(s, table, looping[place], costs, seed, groups[place]))
    for s, runs in exact.items():
        table = np.array(runs.counts, dtype=np.float64)
        together = groups[s.task, s.temperature][: len(table)]
        rows.append(result_row(s, table, _looping(runs.response_ids), costs, seed, together))
    headline = {s: table for s, table in tables.items() if s.num_speculative_tokens == nearest_k(ks)}
    by_position = {place: found.by_position for place, found in replayed.items()}
    return {
        "rows": rows,
        "differences": difference_rows(headline, seed, groups),
        "by_position": position_results(by_position, nearest_k(ks), context_length, seed, groups),
        "greedy_check": greedy_check(work, exact),
    }


def prompt_groups(work: EvaluationWork) -> GroupsBySetting:
    """Turns of a conversation, or answers to one prompt, belong together."""
    return {
        (task.name, t): group_numbers(task.groups or [row.prompt_key for row in work.texts[task.name, t]])
        for task, t in work.settings
    }


def _looping(texts: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    """For each text, whether it ran into a loop."""
    return np.array([is_looping(ids) for ids in texts], dtype=bool)


def result_row(
    setting: Setting,
    table: CountsTable,
    looping: NDArray[np.bool_],
    costs: CostRatios,
    seed: int,
    groups: Groups | None = None,
) -> ResultRow:
    """One entry of `rows`, from the counts of each prompt; `looping` tells whose text ran into a loop."""
    counts, k = counts_from_array(table.sum(0)), setting.num_speculative_tokens
    rest = counts_from_array(table[~looping].sum(0)) if (~looping).any() else Counts()
    tau, latency = counts.block_efficiency, costs.latency
    seconds = latency.target_seconds if latency else {}
    wall = None
    if latency and k + 1 in seconds:
        wall = tidy(predicted_speedup(tau, k, latency.draft_seconds, seconds[1], seconds[k + 1]))
    return ResultRow(
        **vars(setting),
        **count_fields(counts),
        **interval_fields("acceptance_rate", table, columns.ACCEPTED, columns.PROPOSED, seed, groups),
        **interval_fields("block_efficiency", table, columns.GENERATED, columns.DRAFTS, seed, groups),
        num_prompts=len(table),
        num_conversations=num_groups(groups, len(table)),
        num_accepted_tokens_per_pos=[tidy_count(value) for value in counts.num_accepted_tokens_per_pos],
        overlap=tidy(counts.overlap),
        mbsu_parameters=tidy(mbsu(tau, k, costs.parameters)),
        mbsu_bytes=tidy(mbsu(tau, k, costs.bytes)),
        mbsu_latency=tidy(mbsu(tau, k, latency.cost_ratio)) if latency else None,
        predicted_speedup=wall,
        looping_share=tidy(float(looping.mean())),
        acceptance_rate_without_looping=tidy(rest.acceptance_rate),
        block_efficiency_without_looping=tidy(rest.block_efficiency),
    )


def count_fields(counts: Counts) -> dict[str, Any]:
    """What every row says of its counts, in `benchmark.json` too."""
    names = ("drafts", "draft_tokens", "accepted_tokens", "generated_tokens", "examined_tokens")
    rates = ("acceptance_rate", "conditional_acceptance_rate", "block_efficiency")
    found = {f"num_{name}": tidy_count(getattr(counts, f"num_{name}")) for name in names}
    return found | {name: tidy(getattr(counts, name)) for name in rates}


def interval_fields(
    name: str, table: CountsTable, part: int, whole: int, seed: int, groups: Groups | None
) -> dict[str, Any]:
    """The 95 % interval of a rate of columns."""
    low, high = ratio_interval(table[:, part], table[:, whole], seed, groups)
    return {f"{name}_low": tidy(low), f"{name}_high": tidy(high)}


def difference_rows(
    tables: Mapping[Setting, CountsTable], seed: int, groups: GroupsBySetting
) -> list[DifferenceRow]:
    """Each checkpoint against the one before it, on the same prompts; `tables` in the order of training."""
    by_place: dict[tuple[str, float, int], list[tuple[str, CountsTable]]] = {}
    for s, table in tables.items():
        place = s.task, s.temperature, s.num_speculative_tokens
        by_place.setdefault(place, []).append((s.checkpoint, table))
    rows = []
    for (task, temperature, k), found in by_place.items():
        for (name, before), (next_name, after) in pairwise(found):
            old, new = ((table[:, columns.ACCEPTED], table[:, columns.PROPOSED]) for table in (before, after))
            rates = [counts_from_array(table.sum(0)).acceptance_rate for table in (before, after)]
            low, high = difference_interval(old, new, seed, groups[task, temperature])
            row = DifferenceRow(
                before=name,
                after=next_name,
                task=task,
                temperature=temperature,
                num_speculative_tokens=k,
                difference=tidy(rates[1] - rates[0]),
                difference_low=tidy(low),
                difference_high=tidy(high),
            )
            rows.append(row)
    return rows


def position_results(
    tables: Mapping[tuple[str, str, float], NDArray[np.float64]],
    num_speculative_tokens: int,
    context_length: int,
    seed: int,
    groups: GroupsBySetting | None = None,
) -> PositionResults:
    """Acceptance along the text, and where the final draft, the last checkpoint, fades.

    `tables`: by checkpoint, task and temperature the counts, [prompts, buckets, columns].
    """
    rows, faded, accepted = list[PositionRow](), list[FadedCase](), (columns.ACCEPTED, columns.PROPOSED)
    final = list(tables)[-1][0] if tables else ""
    for (checkpoint, task, temperature), table in tables.items():
        found = []
        for bucket in range(table.shape[1]):
            reached_P = table[:, bucket, columns.DRAFTS] > 0
            counts_PC = table[reached_P, bucket]
            together = groups[task, temperature][reached_P] if groups else None
            if not len(counts_PC):
                continue
            first, end = bucket_bounds(bucket)
            row = PositionRow(
                checkpoint=checkpoint,
                task=task,
                temperature=temperature,
                first=first,
                end=end,
                num_prompts=len(counts_PC),
                num_conversations=num_groups(together, len(counts_PC)),
                **count_fields(counts_from_array(counts_PC.sum(0))),
                **interval_fields("acceptance_rate", counts_PC, *accepted, seed, together),
            )
            found.append(row)
        rows += found
        faded += _faded(found) if checkpoint == final else []
    return PositionResults(
        num_speculative_tokens=num_speculative_tokens, context_length=context_length, rows=rows, faded=faded
    )


def _faded(rows: list[PositionRow]) -> list[FadedCase]:
    """The first stretch whose whole interval is under half of the rate in the best stretch before it."""
    best = 0.0
    for row in rows:
        if row.num_draft_tokens < _ENOUGH_TOKENS or row.num_conversations < _ENOUGH_CONVERSATIONS:
            continue
        rate, high = row.acceptance_rate or 0.0, row.acceptance_rate_high
        if high is not None and high < _FADED * best:
            place: Any = {"checkpoint": row.checkpoint, "task": row.task, "temperature": row.temperature}
            return [FadedCase(**place, first=row.first, acceptance_rate=rate, best_acceptance_rate=best)]
        best = max(best, rate)
    return []


def faded_sentences(found: PositionResults) -> Iterator[str]:
    """Warnings about a draft whose acceptance dies before the context ends."""
    for case in found.faded:
        before, rate = case.best_acceptance_rate, case.acceptance_rate
        rates = f"{rate:.3f} from position {case.first:,} on, {before:.3f} before"
        fix = "train on longer rows (prepare.row_length), prompts and answers, or serve shorter contexts"
        where = f"{case.task} at temperature {case.temperature:g}"
        yield f"{where}: acceptance {rates}, of a context of {found.context_length:,}; {fix}"


def greedy_check(work: EvaluationWork, exact: Mapping[Setting, ExactRuns]) -> GreedyCheck:
    """Compares every greedy exact text with the target's own, token by token."""
    names, texts, cases = {task.name: task.prompt_names for task in work.tasks}, 0, list[GreedyCase]()
    judge = next_token_judge(lambda: work.pair[0])  # opened where a text differs
    for s, runs in exact.items():
        if s.temperature != 0:
            continue
        rows = work.texts[s.task, 0]
        own = runs.target_ids or [row.response_ids for row in rows]
        for name, row, alone, ids in zip(names[s.task], rows, own, runs.response_ids, strict=False):
            texts += 1
            if found := compare_texts(row.prompt_ids, alone, ids, judge):
                case = GreedyCase(
                    task=s.task,
                    prompt=name,
                    num_speculative_tokens=s.num_speculative_tokens,
                    token=found.place,
                    logprob_gap=None if found.gap is None else tidy(found.gap),
                    near_tie=found.is_near_tie(work.precision),
                )
                cases.append(case)
    near_ties = sum(case.near_tie for case in cases)
    return GreedyCheck(texts=texts, different=len(cases), near_ties=near_ties, cases=cases)


def next_token_judge(target: Callable[[], Readable]) -> Judge:
    """Asks the target again, in one pass, how far apart it finds two next tokens."""

    def judge(ids: list[int], first: int, second: int) -> float:
        model = target()
        with torch.inference_mode():
            logits_1V = model.reader(len(ids)).read(torch.tensor(ids, device=model.device))
        logprobs_V = logits_1V[0].float().log_softmax(-1)
        return float(logprobs_V[first] - logprobs_V[second])

    return judge


def samples(
    work: EvaluationWork, exact: Mapping[Setting, ExactRuns], tokenizer: PreTrainedTokenizerBase
) -> list[AnswerSample]:
    """A few exact answers in pieces, accepted or not; of the lowest sampled temperature, else greedy."""
    ks, temperatures = work.config.exact.num_speculative_tokens, work.config.temperatures
    wanted = min((t for t in temperatures if t > 0), default=0.0), nearest_k(ks)
    tasks, found = {task.name: task for task in work.tasks}, []
    for s, runs in exact.items():
        if (s.temperature, s.num_speculative_tokens) != wanted:
            continue
        task = tasks[s.task]
        shown = zip(task.prompt_names, task.prompt_ids, runs.response_ids, runs.accepted, strict=False)
        for name, prompt, ids, accepted in list(shown)[:_SAMPLES_PER_TASK]:
            sample = AnswerSample(
                task=task.name,
                id=name,
                temperature=s.temperature,
                num_speculative_tokens=s.num_speculative_tokens,
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
            found = "greedy texts differ from the target's own by more than rounding"
            console.warn(f"{found}; see greedy_check in results.json")
    for sentence in faded_sentences(results.by_position) if results.by_position else ():
        console.warn(sentence)
