"""From tables of counts, one line for each prompt, to the rows of `results.json`.

What cannot be computed is null. Intervals come from a bootstrap over prompts, those of one group number drawn together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdraft.decoding.latency import Latency
from fastdraft.evaluation.results import DifferenceRow, FadedCase, PositionResults, PositionRow, ResultRow
from fastdraft.forecast import mbsu, predicted_speedup
from fastdraft.functional.acceptance import (
    ACCEPTED,
    DRAFTS,
    GENERATED,
    PROPOSED,
    Counts,
    CountsTable,
    counts_from_array,
    tidy,
    tidy_count,
)
from fastdraft.functional.intervals import Groups, difference_interval, num_groups, ratio_interval
from fastdraft.functional.positions import bucket_bounds

# At half the rate half of what a draft brings is gone, while texts of different lengths differ by far less; a draft that
# reads beyond the lengths it was trained on loses nearly all.
_FADED = 0.5
_ENOUGH_TOKENS, _ENOUGH_CONVERSATIONS = (
    300,
    4,
)  # proposals and draws that a stretch of text needs before it is judged

GroupsBySetting = Mapping[tuple[str, float], Groups]
"""By task and temperature which prompts are drawn together."""


@dataclass(frozen=True)
class CostRatios:
    """The draft's cost for one token over the target's, three ways."""

    parameters: float
    bytes: float
    latency: Latency | None = None


@dataclass(frozen=True)
class Setting:
    """What one row is about; `method` is exact or replay."""

    checkpoint: str
    task: str
    method: str
    temperature: float
    num_speculative_tokens: int


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
    return ResultRow(
        **vars(setting),
        **_figures(counts),
        **_interval("acceptance_rate", table, ACCEPTED, PROPOSED, seed, groups),
        **_interval("block_efficiency", table, GENERATED, DRAFTS, seed, groups),
        num_prompts=len(table),
        num_conversations=num_groups(groups, len(table)),
        num_accepted_tokens_per_pos=[tidy_count(value) for value in counts.num_accepted_tokens_per_pos],
        overlap=tidy(counts.overlap),
        mbsu_parameters=tidy(mbsu(tau, k, costs.parameters)),
        mbsu_bytes=tidy(mbsu(tau, k, costs.bytes)),
        mbsu_latency=tidy(mbsu(tau, k, latency.cost_ratio)) if latency else None,
        predicted_speedup=tidy(predicted_speedup(tau, k, latency.draft_seconds, seconds[1], seconds[k + 1]))
        if latency and k + 1 in seconds
        else None,
        looping_share=tidy(float(looping.mean())),
        acceptance_rate_without_looping=tidy(rest.acceptance_rate),
        block_efficiency_without_looping=tidy(rest.block_efficiency),
    )


def _figures(counts: Counts) -> dict[str, Any]:
    """What every row says of its counts."""
    names = ("drafts", "draft_tokens", "accepted_tokens", "generated_tokens", "examined_tokens")
    rates = ("acceptance_rate", "conditional_acceptance_rate", "block_efficiency")
    found = {f"num_{name}": tidy_count(getattr(counts, f"num_{name}")) for name in names}
    return found | {name: tidy(getattr(counts, name)) for name in rates}


def _interval(
    name: str, table: CountsTable, part: int, whole: int, seed: int, groups: Groups | None
) -> dict[str, float | None]:
    low, high = ratio_interval(table[:, part], table[:, whole], seed, groups)
    return {f"{name}_low": tidy(low), f"{name}_high": tidy(high)}


def difference_rows(
    tables: Mapping[Setting, CountsTable], seed: int, groups: GroupsBySetting | None = None
) -> list[DifferenceRow]:
    """Each checkpoint against the one before it, on the same prompts drawn together; `tables` in the order of training."""
    ladders: dict[tuple[str, float, int], list[tuple[str, CountsTable]]] = {}
    for setting, table in tables.items():
        place = setting.task, setting.temperature, setting.num_speculative_tokens
        ladders.setdefault(place, []).append((setting.checkpoint, table))
    rows = []
    for (task, temperature, k), ladder in ladders.items():
        for (name, before), (next_name, after) in pairwise(ladder):
            pairs = [(table[:, ACCEPTED], table[:, PROPOSED]) for table in (before, after)]
            rates = [counts_from_array(table.sum(0)).acceptance_rate for table in (before, after)]
            low, high = difference_interval(*pairs, seed, groups[task, temperature] if groups else None)
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
    """Acceptance along the text, and where the final draft fades.

    Args:
        tables: By checkpoint, task and temperature the counts of each prompt in each bucket, [prompts, buckets, columns];
            the last checkpoint is the final draft.
        num_speculative_tokens: K of these counts.
        context_length: Tokens that target and draft can read.
        seed: Of the bootstrap.
        groups: None draws each prompt by itself.
    """
    rows, faded = list[PositionRow](), list[FadedCase]()
    final = list(tables)[-1][0] if tables else ""
    for (checkpoint, task, temperature), table in tables.items():
        found = []
        for bucket in range(table.shape[1]):
            reached_P = table[:, bucket, DRAFTS] > 0
            if not reached_P.any():
                continue
            counts_PC, together = (
                table[reached_P, bucket],
                groups[task, temperature][reached_P] if groups else None,
            )
            first, end = bucket_bounds(bucket)
            row = PositionRow(
                checkpoint=checkpoint,
                task=task,
                temperature=temperature,
                first=first,
                end=end,
                num_prompts=len(counts_PC),
                num_conversations=num_groups(together, len(counts_PC)),
                **_figures(counts_from_array(counts_PC.sum(0))),
                **_interval("acceptance_rate", counts_PC, ACCEPTED, PROPOSED, seed, together),
            )
            found.append(row)
        rows += found
        faded += _faded(found) if checkpoint == final else []
    return PositionResults(
        num_speculative_tokens=num_speculative_tokens, context_length=context_length, rows=rows, faded=faded
    )


def _faded(rows: list[PositionRow]) -> list[FadedCase]:
    """The first stretch of one task and temperature in which the draft has faded: the upper end of its interval is under half of
    the rate in the best stretch before it. Empty without one."""
    best = 0.0
    for row in rows:
        if row.num_draft_tokens < _ENOUGH_TOKENS or row.num_conversations < _ENOUGH_CONVERSATIONS:
            continue
        rate, high = row.acceptance_rate or 0.0, row.acceptance_rate_high
        if high is not None and high < _FADED * best:
            place = {"checkpoint": row.checkpoint, "task": row.task, "temperature": row.temperature}
            return [FadedCase(**place, first=row.first, acceptance_rate=rate, best_acceptance_rate=best)]
        best = max(best, rate)
    return []


def faded_sentences(found: PositionResults) -> Iterator[str]:
    """Warnings about a draft whose acceptance dies before the context ends."""
    for case in found.faded:
        rates = f"{case.acceptance_rate:.3f} from position {case.first:,} on, {case.best_acceptance_rate:.3f} before"
        fix = "train on longer rows (prepare.row_length) and on longer prompts and answers, or serve with a shorter context"
        where = f"{case.task} at temperature {case.temperature:g}"
        yield f"{where}: acceptance {rates}, of a context of {found.context_length:,}; {fix}"
