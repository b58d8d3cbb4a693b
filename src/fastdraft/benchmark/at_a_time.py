"""Up to how many texts at a time a draft pays: as it was measured, and on paper from the costs of passes.

A server verifies the proposals of all texts in one pass. With more texts that pass is bound by arithmetic
rather than by memory, proposals that are refused cost time, and at some number a draft no longer pays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

import numpy as np

from fastdraft.benchmark.rows import AtATimeRow, BenchmarkRow, PassesRow
from fastdraft.forecast import predicted_speedup

_SHOWN = (1, 2, 4, 8, 16, 32, 64)


def at_a_time(rows: Sequence[BenchmarkRow], passes: Sequence[PassesRow]) -> AtATimeRow | None:
    """Of one pair's rows, those of the sweep; None where nothing is told of passes over several texts."""
    swept = sorted((row for row in rows if row.part == "concurrency"), key=lambda row: row.concurrency)
    costs = next((each for each in passes if len(each.draft_seconds_by_texts) > 1), None)
    if not swept or costs is None or not swept[0].block_efficiency or not swept[0].num_speculative_tokens:
        return None
    k, efficiency = swept[0].num_speculative_tokens, swept[0].block_efficiency
    curve = {
        n: predicted_speedup(
            efficiency,
            k,
            seconds_of(costs.draft_seconds_by_texts, n),
            seconds_of(costs.target_seconds, n),
            seconds_of(costs.target_seconds, n * (k + 1)),
        )
        for n in _SHOWN
    }
    measured = {row.concurrency: row.speedup or 0.0 for row in swept}
    return AtATimeRow(
        runtime=costs.runtime,
        target_weights=costs.target_weights,
        draft_weights=costs.draft_weights,
        num_speculative_tokens=k,
        measured=pays_until(measured),
        predicted=pays_until(curve),
        measured_speedup=measured,
        predicted_speedup={n: round(value, 4) for n, value in curve.items()},
    )


def pays_until(speedups: Mapping[int, float]) -> int:
    """The largest of the numbers up to which every one gains; 0 where the first does not."""
    gains = [number for number, _ in takewhile(lambda item: item[1] > 1, sorted(speedups.items()))]
    return gains[-1] if gains else 0


def seconds_of(known: Mapping[int, float], tokens: int) -> float:
    """Of a pass over so many tokens: in proportion between measured ones, beyond the last as these rise."""
    sizes = sorted(known)
    if tokens > sizes[-1] and len(sizes) > 1:
        (low, high), seconds = sizes[-2:], known[sizes[-1]]
        return seconds + max(0.0, (seconds - known[low]) / (high - low)) * (tokens - high)
    return float(np.interp(tokens, sizes, [known[size] for size in sizes]))
