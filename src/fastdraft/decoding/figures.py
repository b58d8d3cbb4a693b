"""From counts to the rows of `results.json`.

Decides which rates stand in a row and how they follow from its counts, that what cannot be computed is null, that
intervals come from a bootstrap over prompts (turns of a conversation drawn together), and how two checkpoints are compared.
A table of counts is an array with one line for each prompt, its columns those of `functional.acceptance.counts_to_array`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdraft.decoding.latency import Latency
from fastdraft.forecast import mbsu, predicted_speedup
from fastdraft.functional.acceptance import (
    ACCEPTED,
    DRAFTS,
    GENERATED,
    PROPOSED,
    Counts,
    counts_from_array,
    counts_to_array,
)
from fastdraft.functional.intervals import Groups, difference_interval, num_groups, ratio_interval

CountsTable = NDArray[np.float64]


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


def counts_table(counts: Sequence[Counts]) -> CountsTable:
    """One line for each prompt."""
    return np.stack([counts_to_array(c) for c in counts])


def result_row(
    setting: Setting,
    table: CountsTable,
    looping: NDArray[np.bool_],
    costs: CostRatios,
    seed: int,
    *,
    groups: Groups | None = None,
) -> dict[str, Any]:
    """One entry of `rows` in `results.json`.

    Args:
        setting: What the row is about.
        table: Counts of each prompt.
        looping: For each prompt, whether its text ran into a loop (data/looping.py).
        costs: For the memory-bound speed-ups and the predicted one.
        seed: Of the bootstrap.
        groups: Prompts of one number are drawn together, as turns of a conversation are; None draws each by itself.
    """
    counts, k = counts_from_array(table.sum(0)), setting.num_speculative_tokens
    row: dict[str, Any] = {
        "checkpoint": setting.checkpoint,
        "task": setting.task,
        "method": setting.method,
        "temperature": setting.temperature,
        "num_speculative_tokens": k,
        "num_prompts": len(table),
        "num_conversations": num_groups(groups, len(table)),
        "num_drafts": tidy_count(counts.num_drafts),
        "num_draft_tokens": tidy_count(counts.num_draft_tokens),
        "num_accepted_tokens": tidy_count(counts.num_accepted_tokens),
        "num_accepted_tokens_per_pos": [tidy_count(value) for value in counts.num_accepted_tokens_per_pos],
        "num_generated_tokens": tidy_count(counts.num_generated_tokens),
        "acceptance_rate": tidy(counts.acceptance_rate),
        "conditional_acceptance_rate": tidy(counts.conditional_acceptance_rate),
        "overlap": tidy(counts.overlap),
        "block_efficiency": tidy(counts.block_efficiency),
        **_speedups(counts.block_efficiency, k, costs),
        "num_examined_tokens": tidy_count(counts.num_examined_tokens),
    }
    for name, part, whole in (
        ("acceptance_rate", ACCEPTED, PROPOSED),
        ("block_efficiency", GENERATED, DRAFTS),
    ):
        low, high = ratio_interval(table[:, part], table[:, whole], seed, groups)
        row |= {f"{name}_low": tidy(low), f"{name}_high": tidy(high)}
    rest = counts_from_array(table[~looping].sum(0)) if (~looping).any() else Counts()
    row["looping_share"] = tidy(float(looping.mean()))
    row["acceptance_rate_without_looping"] = tidy(rest.acceptance_rate)
    row["block_efficiency_without_looping"] = tidy(rest.block_efficiency)
    return row


def _speedups(block_efficiency: float, k: int, costs: CostRatios) -> dict[str, float | None]:
    latency = costs.latency
    measured: dict[str, float | None] = {"mbsu_latency": None, "predicted_speedup": None}
    if latency is not None:
        measured["mbsu_latency"] = tidy(mbsu(block_efficiency, k, latency.cost_ratio))
        if k + 1 in latency.target_seconds:
            seconds = latency.target_seconds
            measured["predicted_speedup"] = tidy(
                predicted_speedup(block_efficiency, k, latency.draft_seconds, seconds[1], seconds[k + 1])
            )
    return {
        "mbsu_parameters": tidy(mbsu(block_efficiency, k, costs.parameters)),
        "mbsu_bytes": tidy(mbsu(block_efficiency, k, costs.bytes)),
        **measured,
    }


def difference_rows(
    tables: Mapping[Setting, CountsTable], seed: int, groups: Mapping[tuple[str, float], Groups] | None = None
) -> list[dict[str, Any]]:
    """Each checkpoint against the one before it on the same texts, by replay: the change of acceptance rate with its interval.

    Args:
        tables: Counts of every checkpoint.
        seed: Of the bootstrap.
        groups: By task and temperature which prompts are drawn together; None draws each by itself.
    """
    rows = []
    by_place: dict[tuple[str, float, int], list[tuple[str, CountsTable]]] = {}
    for setting, table in tables.items():
        if setting.method == "replay":
            by_place.setdefault(
                (setting.task, setting.temperature, setting.num_speculative_tokens), []
            ).append((setting.checkpoint, table))
    for (task, temperature, k), ladder in by_place.items():
        for (name, before), (next_name, after) in pairwise(ladder):
            pairs = [(table[:, ACCEPTED], table[:, PROPOSED]) for table in (before, after)]
            rates = [
                float(part.sum() / whole.sum()) if whole.sum() else float("nan") for part, whole in pairs
            ]
            low, high = difference_interval(
                pairs[0], pairs[1], seed, groups[task, temperature] if groups else None
            )
            place = {"task": task, "temperature": temperature, "num_speculative_tokens": k}
            change = {
                "difference": tidy(rates[1] - rates[0]),
                "difference_low": tidy(low),
                "difference_high": tidy(high),
            }
            rows.append({"from": name, "to": next_name, **place, **change})
    return rows


def tidy(value: float) -> float | None:
    """For JSON: six decimals, null for what is not a number."""
    return round(value, 6) if math.isfinite(value) else None


def tidy_count(value: float) -> float | int:
    """For JSON: whole counts, as every exact run gives, as such; expected ones to six decimals."""
    return int(value) if value == int(value) else round(value, 6)
