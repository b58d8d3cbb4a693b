"""From counts by position to `by_position` of `results.json`, and the warning about a draft that fades before the context ends.

Decides that positions are told at one K (3 or the nearest) by replay, that intervals come from a bootstrap over prompts (turns of a
conversation together), and when a draft has faded: the upper end of a bucket's interval is under half of the acceptance rate in the
best bucket before it. At half the rate half of what the draft brings is gone, while texts of different lengths differ by far less; a
draft that reads beyond the lengths it was trained on loses nearly all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdraft.decoding.figures import tidy, tidy_count
from fastdraft.functional.acceptance import ACCEPTED, DRAFTS, PROPOSED, counts_from_array
from fastdraft.functional.intervals import Groups, num_groups, ratio_interval
from fastdraft.functional.positions import bucket_bounds

Positions = NDArray[np.float64]
"""Counts of each prompt in each bucket, [prompts, buckets, columns of `counts_to_array`]."""
Place = tuple[str, str, float]
"""Checkpoint, task, temperature."""
FADED = 0.5
"""A bucket's rate over the best before it, under which a draft has faded."""
ENOUGH_TOKENS, ENOUGH_CONVERSATIONS = 300, 4
"""Proposals, and prompts drawn by themselves, that a bucket needs before it is judged."""


def position_results(
    tables: Mapping[Place, Positions],
    num_speculative_tokens: int,
    context_length: int,
    seed: int,
    groups: Mapping[tuple[str, float], Groups] | None = None,
) -> dict[str, Any]:
    """The object `by_position` of `results.json`.

    Args:
        tables: Counts of every checkpoint, task and temperature; the last checkpoint is the final draft.
        num_speculative_tokens: K of these counts.
        context_length: Tokens that target and draft can read.
        seed: Of the bootstrap.
        groups: By task and temperature which prompts are drawn together; None draws each by itself.
    """
    rows = [
        row
        for place, table in tables.items()
        for row in _rows(place, table, seed, groups[place[1:]] if groups else None)
    ]
    final = list(tables)[-1][0] if tables else ""
    return {
        "num_speculative_tokens": num_speculative_tokens,
        "context_length": context_length,
        "rows": rows,
        "faded": [case for place in tables if place[0] == final for case in _faded(place, rows)],
    }


def _rows(place: Place, table: Positions, seed: int, groups_P: Groups | None) -> list[dict[str, Any]]:
    found = []
    for bucket in range(table.shape[1]):
        counts_PC = table[:, bucket]
        reached = counts_PC[:, DRAFTS] > 0
        if not reached.any():
            continue
        counts = counts_from_array(counts_PC.sum(0))
        groups = groups_P[reached] if groups_P is not None else None
        low, high = ratio_interval(counts_PC[reached, ACCEPTED], counts_PC[reached, PROPOSED], seed, groups)
        first, end = bucket_bounds(bucket)
        found.append(
            {
                "checkpoint": place[0],
                "task": place[1],
                "temperature": place[2],
                "from": first,
                "to": end,
                "num_prompts": int(reached.sum()),
                "num_conversations": num_groups(groups, reached.sum()),
                "num_drafts": tidy_count(counts.num_drafts),
                "num_draft_tokens": tidy_count(counts.num_draft_tokens),
                "num_accepted_tokens": tidy_count(counts.num_accepted_tokens),
                "num_examined_tokens": tidy_count(counts.num_examined_tokens),
                "num_generated_tokens": tidy_count(counts.num_generated_tokens),
                "acceptance_rate": tidy(counts.acceptance_rate),
                "acceptance_rate_low": tidy(low),
                "acceptance_rate_high": tidy(high),
                "conditional_acceptance_rate": tidy(counts.conditional_acceptance_rate),
                "block_efficiency": tidy(counts.block_efficiency),
            }
        )
    return found


def _faded(place: Place, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first bucket of this task and temperature in which the draft has faded; empty without one."""
    best: dict[str, Any] | None = None
    for row in rows:
        if (row["checkpoint"], row["task"], row["temperature"]) != place:
            continue
        if row["num_draft_tokens"] < ENOUGH_TOKENS or row["num_conversations"] < ENOUGH_CONVERSATIONS:
            continue
        if best and row["acceptance_rate_high"] < FADED * best["acceptance_rate"]:
            case = {"checkpoint": place[0], "task": place[1], "temperature": place[2], "from": row["from"]}
            return [
                {
                    **case,
                    "acceptance_rate": row["acceptance_rate"],
                    "best_acceptance_rate": best["acceptance_rate"],
                }
            ]
        best = row if not best or row["acceptance_rate"] > best["acceptance_rate"] else best
    return []


def faded_sentence(case: Mapping[str, Any], context_length: int) -> str:
    """One case of `faded` as a warning."""
    rates = f"{case['acceptance_rate']:.3f} from position {case['from']:,} on, {case['best_acceptance_rate']:.3f} before"
    remedy = "train on longer rows (prepare.row_length) and on longer prompts and answers, or serve with a shorter context"
    return f"{case['task']} at temperature {case['temperature']:g}: acceptance {rates}, of a context of {context_length:,}; {remedy}"
