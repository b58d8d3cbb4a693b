"""`lookup` of `results.json`: prompt lookup over the texts on which drafts are measured, and for real."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fastdraft.decoding.proposers import ProposerKind
from fastdraft.evaluation.results import LookupRow
from fastdraft.evaluation.rows import CostRatios, count_fields, interval_fields, prompt_groups
from fastdraft.evaluation.work import EvaluationWork, ExactRuns, Replayed, Setting, looked_up
from fastdraft.forecast import lookup_speedup, mbsu
from fastdraft.functional import acceptance as columns
from fastdraft.functional.acceptance import Floats, counts_from_array, tidy, tidy_count
from fastdraft.functional.intervals import Groups, num_groups
from fastdraft.functional.lookup import lookup_counts

# Where a row is: the checkpoint, None for lookup alone; the task, method, temperature and K.
_Place = tuple[str | None, str, str, float, int]


def lookup_rows(
    work: EvaluationWork,
    replayed: Mapping[tuple[str, str, float], Replayed],
    exact: Mapping[ProposerKind, Mapping[Setting, ExactRuns]],
    costs: CostRatios,
) -> list[LookupRow]:
    """Of every task, temperature and K: lookup alone, each checkpoint behind it, then the exact runs."""
    ks, groups = work.config.num_speculative_tokens, prompt_groups(work)
    found: dict[tuple[str | None, str, float], Floats] = {
        (None, *place): lookup_counts(looked_up(texts, ks), ks) for place, texts in work.texts.items()
    }
    found |= {place: each.behind_lookup for place, each in replayed.items()}
    tables: dict[_Place, Floats] = {
        (checkpoint, task, "replay", t, k): table
        for (checkpoint, task, t), by_k in found.items()
        for k, table in zip(ks, by_k, strict=True)
    }
    for kind, by_setting in exact.items():
        for s, runs in by_setting.items():
            more = np.array([runs.num_caught_up, runs.num_lookups], dtype=np.float64).T
            place = None if kind == "lookup" else s.checkpoint, s.task, s.method, s.temperature
            table = np.concatenate([np.array(runs.counts, dtype=np.float64), more], axis=1)
            tables[*place, s.num_speculative_tokens] = table
    return [
        _row(place, table, costs, work.seed, groups[place[1], place[3]][: len(table)])
        for place, table in tables.items()
    ]


def _row(place: _Place, table: Floats, costs: CostRatios, seed: int, groups: Groups) -> LookupRow:
    checkpoint, task, method, temperature, k = place
    total = table.sum(0)
    counts = counts_from_array(total[: columns.TOTALS + k])
    caught_up, lookups = float(total[-2]), float(total[-1])
    tau, latency = counts.block_efficiency, costs.latency
    finds = lookups / counts.num_drafts if counts.num_drafts else float("nan")
    # Looking up costs nothing beside a pass: only rounds without a find pay for the draft.
    drafted = 0.0 if checkpoint is None else k * (1 - finds)
    wall = None
    if latency and k + 1 in (seconds := latency.target_seconds):
        # The draft's first pass behind lookup reads more than one token, each at what a wider pass adds.
        late = caught_up / counts.num_drafts * latency.draft_seconds_more if counts.num_drafts else 0.0
        of_draft = (latency.draft_seconds, late) if checkpoint else (0.0, 0.0)
        wall = tidy(lookup_speedup(tau, k, finds, seconds, *of_draft))
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
        method=method,
        num_caught_up_tokens=tidy_count(caught_up) if checkpoint else None,
        **interval_fields("acceptance_rate", table, columns.ACCEPTED, columns.PROPOSED, seed, groups),
        **interval_fields("block_efficiency", table, columns.GENERATED, columns.DRAFTS, seed, groups),
        mbsu_parameters=tidy(mbsu(tau, drafted, costs.parameters)),
        mbsu_bytes=tidy(mbsu(tau, drafted, costs.bytes)),
        mbsu_latency=tidy(mbsu(tau, drafted, latency.cost_ratio)) if latency else None,
        predicted_speedup=wall,
    )
