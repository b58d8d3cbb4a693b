"""From tables of counts, one line for each prompt, to the rows of `results.json`.

What cannot be computed is null. Intervals come from a bootstrap over prompts, those of one group number drawn together; two
checkpoints are compared on the same prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """What one row is about."""

    checkpoint: str
    task: str
    method: str
    """`exact` or `replay`."""
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
    """One entry of `rows`.

    Args:
        setting: What the row is about.
        table: Counts of each prompt.
        looping: For each prompt, whether its text ran into a loop.
        costs: For the memory-bound speed-ups and the predicted one.
        seed: Of the bootstrap.
        groups: None draws each prompt by itself.
    """
    counts = counts_from_array(table.sum(0))
    rest = counts_from_array(table[~looping].sum(0)) if (~looping).any() else Counts()
    rate = ratio_interval(table[:, ACCEPTED], table[:, PROPOSED], seed, groups)
    efficiency = ratio_interval(table[:, GENERATED], table[:, DRAFTS], seed, groups)
    return ResultRow(
        **vars(setting),
        **_figures(counts),
        **_speedups(counts.block_efficiency, setting.num_speculative_tokens, costs),
        num_prompts=len(table),
        num_conversations=num_groups(groups, len(table)),
        num_accepted_tokens_per_pos=[tidy_count(value) for value in counts.num_accepted_tokens_per_pos],
        overlap=tidy(counts.overlap),
        acceptance_rate_low=tidy(rate[0]),
        acceptance_rate_high=tidy(rate[1]),
        block_efficiency_low=tidy(efficiency[0]),
        block_efficiency_high=tidy(efficiency[1]),
        looping_share=tidy(float(looping.mean())),
        acceptance_rate_without_looping=tidy(rest.acceptance_rate),
        block_efficiency_without_looping=tidy(rest.block_efficiency),
    )


def _figures(counts: Counts) -> dict[str, Any]:
    """What every row says of its counts."""
    names = ("drafts", "draft_tokens", "accepted_tokens", "generated_tokens", "examined_tokens")
    rates = ("acceptance_rate", "conditional_acceptance_rate", "block_efficiency")
    return {f"num_{name}": tidy_count(getattr(counts, f"num_{name}")) for name in names} | {
        name: tidy(getattr(counts, name)) for name in rates
    }


def _speedups(block_efficiency: float, k: int, costs: CostRatios) -> dict[str, float | None]:
    found = {
        "mbsu_parameters": tidy(mbsu(block_efficiency, k, costs.parameters)),
        "mbsu_bytes": tidy(mbsu(block_efficiency, k, costs.bytes)),
    }
    latency = costs.latency
    if latency is None:
        return found
    found["mbsu_latency"] = tidy(mbsu(block_efficiency, k, latency.cost_ratio))
    seconds = latency.target_seconds
    if k + 1 in seconds:
        predicted = predicted_speedup(block_efficiency, k, latency.draft_seconds, seconds[1], seconds[k + 1])
        found["predicted_speedup"] = tidy(predicted)
    return found


def difference_rows(
    tables: Mapping[Setting, CountsTable], seed: int, groups: GroupsBySetting | None = None
) -> list[DifferenceRow]:
    """Each checkpoint against the one before it on the same texts: the change of acceptance rate with its interval.

    Args:
        tables: Counts of every checkpoint, by replay, in the order of training.
        seed: Of the bootstrap.
        groups: None draws each prompt by itself.
    """
    ladders: dict[tuple[str, float, int], list[tuple[str, CountsTable]]] = {}
    for setting, table in tables.items():
        where = setting.task, setting.temperature, setting.num_speculative_tokens
        ladders.setdefault(where, []).append((setting.checkpoint, table))
    rows = []
    for (task, temperature, k), ladder in ladders.items():
        for (name, before), (next_name, after) in pairwise(ladder):
            pairs = [(table[:, ACCEPTED], table[:, PROPOSED]) for table in (before, after)]
            rates = [counts_from_array(table.sum(0)).acceptance_rate for table in (before, after)]
            low, high = difference_interval(
                pairs[0], pairs[1], seed, groups[task, temperature] if groups else None
            )
            rows.append(
                DifferenceRow(
                    before=name,
                    after=next_name,
                    task=task,
                    temperature=temperature,
                    num_speculative_tokens=k,
                    difference=tidy(rates[1] - rates[0]),
                    difference_low=tidy(low),
                    difference_high=tidy(high),
                )
            )
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
        together = groups[task, temperature] if groups else None
        found = [
            _position_row(checkpoint, task, temperature, bucket, table[:, bucket], seed, together)
            for bucket in range(table.shape[1])
            if table[:, bucket, DRAFTS].any()
        ]
        rows += found
        faded += _faded(found) if checkpoint == final else []
    return PositionResults(
        num_speculative_tokens=num_speculative_tokens, context_length=context_length, rows=rows, faded=faded
    )


def _position_row(  # noqa: PLR0917
    checkpoint: str,
    task: str,
    temperature: float,
    bucket: int,
    counts_PC: CountsTable,
    seed: int,
    groups_P: Groups | None,
) -> PositionRow:
    reached = counts_PC[:, DRAFTS] > 0
    groups = groups_P[reached] if groups_P is not None else None
    low, high = ratio_interval(counts_PC[reached, ACCEPTED], counts_PC[reached, PROPOSED], seed, groups)
    first, end = bucket_bounds(bucket)
    return PositionRow(
        checkpoint=checkpoint,
        task=task,
        temperature=temperature,
        first=first,
        end=end,
        num_prompts=int(reached.sum()),
        num_conversations=num_groups(groups, reached.sum()),
        acceptance_rate_low=tidy(low),
        acceptance_rate_high=tidy(high),
        **_figures(counts_from_array(counts_PC.sum(0))),
    )


def _faded(rows: list[PositionRow]) -> list[FadedCase]:
    """The first stretch of one task and temperature in which the draft has faded: the upper end of its interval is under
    half of the rate in the best stretch before it. Empty without one."""
    best = 0.0
    for row in rows:
        if row.num_draft_tokens < _ENOUGH_TOKENS or row.num_conversations < _ENOUGH_CONVERSATIONS:
            continue
        rate, high = row.acceptance_rate, row.acceptance_rate_high
        if rate is not None and high is not None and high < _FADED * best:
            return [
                FadedCase(
                    checkpoint=row.checkpoint,
                    task=row.task,
                    temperature=row.temperature,
                    first=row.first,
                    acceptance_rate=rate,
                    best_acceptance_rate=best,
                )
            ]
        best = max(best, rate or 0.0)
    return []


def faded_sentence(case: FadedCase, context_length: int) -> str:
    """One case of `faded` as a warning."""
    rates = (
        f"{case.acceptance_rate:.3f} from position {case.first:,} on, {case.best_acceptance_rate:.3f} before"
    )
    remedy = "train on longer rows (prepare.row_length) and on longer prompts and answers, or serve with a shorter context"
    return f"{case.task} at temperature {case.temperature:g}: acceptance {rates}, of a context of {context_length:,}; {remedy}"
