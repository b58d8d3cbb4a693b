"""`lookup` of `results.json`: prompt lookup over the texts on which drafts are measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fastdraft.evaluation.results import LookupRow
from fastdraft.evaluation.rows import CostRatios, count_fields, interval_fields, prompt_groups
from fastdraft.evaluation.work import EvaluationWork, Replayed, looked_up
from fastdraft.forecast import mbsu, predicted_speedup
from fastdraft.functional import acceptance as columns
from fastdraft.functional.acceptance import Floats, counts_from_array, tidy, tidy_count
from fastdraft.functional.intervals import Groups, num_groups
from fastdraft.functional.lookup import lookup_counts


def lookup_rows(
    work: EvaluationWork, replayed: Mapping[tuple[str, str, float], Replayed], costs: CostRatios
) -> list[LookupRow]:
    """Of every task, temperature and K: lookup alone, then each checkpoint behind it."""
    ks, groups = work.config.num_speculative_tokens, prompt_groups(work)
    tables: dict[tuple[str | None, str, float], Floats] = {
        (None, *place): lookup_counts(looked_up(texts, ks), ks) for place, texts in work.texts.items()
    }
    tables |= {place: found.behind_lookup for place, found in replayed.items()}
    return [
        _row(checkpoint, task, t, k, table, costs, work.seed, groups[task, t])
        for (checkpoint, task, t), by_k in tables.items()
        for k, table in zip(ks, by_k, strict=True)
    ]


def _row(
    checkpoint: str | None,
    task: str,
    temperature: float,
    k: int,
    table: Floats,
    costs: CostRatios,
    seed: int,
    groups: Groups,
) -> LookupRow:
    total = table.sum(0)
    counts, lookups = counts_from_array(total[: columns.TOTALS + k]), float(total[-1])
    tau, latency = counts.block_efficiency, costs.latency
    finds = lookups / counts.num_drafts if counts.num_drafts else float("nan")
    # Looking up costs nothing beside a pass: only rounds without a find pay for the draft.
    drafted = 0.0 if checkpoint is None else k * (1 - finds)
    wall = None
    if latency and k + 1 in (seconds := latency.target_seconds):
        # Lookup alone reads a single token where it finds nothing.
        wide = seconds[k + 1] if checkpoint else float(np.interp(finds, (0, 1), (seconds[1], seconds[k + 1])))
        wall = tidy(predicted_speedup(tau, drafted, latency.draft_seconds, seconds[1], wide))
    return LookupRow(
        proposer="lookup_draft" if checkpoint else "lookup",
        checkpoint=checkpoint,
        task=task,
        temperature=temperature,
        num_speculative_tokens=k,
        num_prompts=len(table),
        num_conversations=num_groups(groups, len(table)),
        **count_fields(counts),
        num_accepted_tokens_per_pos=[tidy_count(value) for value in counts.num_accepted_tokens_per_pos],
        num_lookups=tidy_count(lookups),
        **interval_fields("acceptance_rate", table, columns.ACCEPTED, columns.PROPOSED, seed, groups),
        **interval_fields("block_efficiency", table, columns.GENERATED, columns.DRAFTS, seed, groups),
        mbsu_parameters=tidy(mbsu(tau, drafted, costs.parameters)),
        mbsu_bytes=tidy(mbsu(tau, drafted, costs.bytes)),
        mbsu_latency=tidy(mbsu(tau, drafted, latency.cost_ratio)) if latency else None,
        predicted_speedup=wall,
    )
