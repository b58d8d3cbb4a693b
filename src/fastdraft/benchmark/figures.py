"""Measured texts and times -> rows of `benchmark.json`: `rows_of(measured, passes, cost_ratio_bytes)`.

A speed-up is seconds per token alone over seconds per token with the draft, of the two runs of one repeat;
the row says the median over the repeats and the range. Rates follow from added counts. What cannot be
computed is null.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastdraft.benchmark.plan import ALONE
from fastdraft.benchmark.rows import BenchmarkRow, PassesRow, TextDifference
from fastdraft.benchmark.runs import Measured
from fastdraft.data.filters import is_looping
from fastdraft.evaluation.rows import count_fields
from fastdraft.forecast import lookup_speedup, mbsu, predicted_speedup
from fastdraft.functional.acceptance import TOTALS, Counts, counts_from_array, tidy, tidy_count
from fastdraft.runtimes.runtime import Proposer

NAN = float("nan")
# What follows from the number of proposals.
_OF_PROPOSALS = (
    *("num_draft_tokens", "num_examined_tokens"),
    *("acceptance_rate", "conditional_acceptance_rate"),
)
Text = tuple[int, float, float]  # tokens, seconds and seconds to the first token of one answer


def rows_of(measured: Measured, passes: Sequence[PassesRow], cost_ratio_bytes: float) -> list[BenchmarkRow]:
    """One row for each proposer and K of a finished measurement.

    `passes` are the pair's single passes by prefix; `cost_ratio_bytes` the bytes of weights that the draft
    reads for one token over the target's, each at its own weights.
    """
    return [_row(measured, each, passes, cost_ratio_bytes) for each in measured.work.proposers]


def _row(
    measured: Measured, proposer: Proposer, passes: Sequence[PassesRow], cost_ratio_bytes: float
) -> BenchmarkRow:
    work, prompts, label = measured.work, measured.work.prompts, str(proposer)
    k, drafting = proposer.num_speculative_tokens, proposer.kind == "draft"
    texts = measured.counts["texts"][label]
    numbers = [row for row in texts["counts"] if row is not None]
    counts = counts_from_array(np.sum(np.array(numbers, dtype=np.float64), axis=0)) if numbers else Counts()
    tau = counts.block_efficiency
    prompt_tokens = statistics.fmean(measured.counts["prompt_tokens"])
    differences = measured.counts["differences"][label]
    times = _times(measured, label)
    # Single passes predict one text at a time; those are taken that were measured nearest to the middle of
    # the texts.
    middle = prompt_tokens + statistics.fmean(map(len, texts["response_ids"])) / 2
    near = min(passes, key=lambda each: abs(each.prefix_tokens - middle), default=None)
    predicted, bound, at_once = NAN, mbsu(tau, k, cost_ratio_bytes) if drafting else NAN, prompts.concurrency
    line = measured.replayed.get(label) or []
    most, n = proposer.most, proposer.lookup_tokens
    replayed = counts_from_array(np.array(line[: TOTALS + most])) if line else Counts()
    late, lookups = line[TOTALS + most :] or (0.0, 0.0)
    if near is not None and {at_once * (k + 1), at_once * (n + 1)} <= near.target_seconds.keys():
        drafts, seconds = {1: near.draft_seconds, **near.draft_seconds_by_texts}, near.target_seconds
        if drafting and at_once in drafts:
            costs = drafts[at_once], seconds[at_once], seconds[at_once * (k + 1)]
            predicted = predicted_speedup(tau, k, *costs)
        elif not drafting and at_once == 1 and replayed.num_drafts:
            # In which rounds lookup found anything replay tells, no runtime does.
            caught_up = late * near.draft_seconds_more / replayed.num_drafts
            of_draft = (near.draft_seconds, caught_up) if proposer.kind == "lookup_draft" else (0.0, 0.0)
            predicted = lookup_speedup(tau, k, lookups / replayed.num_drafts, seconds, *of_draft, n)
    figures = times | {
        "prompt_tokens": prompt_tokens,
        "predicted_speedup": predicted,
        "predicted_quotient": _ratio(times["speedup"], predicted),
        "decode_quotient": _ratio(times["decode_speedup"], predicted),
        "mbsu_bytes": bound,
        "mbsu_quotient": _ratio(times["speedup"], bound),
        "looping_share": statistics.fmean(is_looping(ids) for ids in texts["response_ids"]),
        "speedup_without_looping": _without_looping(measured, label) if prompts.concurrency == 1 else NAN,
    }
    rounded: dict[str, Any] = {name: tidy(value) for name, value in figures.items()}
    counted = count_fields(counts)
    if not drafting:
        counted |= dict.fromkeys(_OF_PROPOSALS)
    return BenchmarkRow(
        part=prompts.part,
        task=prompts.task,
        target_weights=work.weights[0],
        draft_weights=work.weights[1],
        temperature=work.temperature,
        num_speculative_tokens=k,
        num_lookup_tokens=proposer.num_lookup_tokens,
        concurrency=prompts.concurrency,
        max_new_tokens=prompts.max_new_tokens,
        num_prompts=len(prompts.prompts),
        repeats=len(measured.repeats),
        **counted,
        num_accepted_tokens_per_pos=[tidy_count(value) for value in counts.num_accepted_tokens_per_pos],
        **rounded,
        num_tokens_alone=sum(tokens for tokens, _, _ in _texts(measured.repeats[0], ALONE)),
        num_tokens_with_draft=sum(tokens for tokens, _, _ in _texts(measured.repeats[0], label)),
        texts=len(texts["response_ids"]),
        same_text=None if differences is None else len(texts["response_ids"]) - len(differences),
        differences=[TextDifference.from_json(found) for found in differences or []],
        lossless=bool(measured.counts["lossless"][label]),
        runtime=work.runtime,
        proposer=proposer.kind,
        replayed_accepted_tokens=tidy_count(replayed.num_accepted_tokens) if line else None,
        replayed_block_efficiency=tidy(replayed.block_efficiency),
    )


def _times(measured: Measured, label: str) -> dict[str, float]:
    """Everything that follows from the clock, by the row's field."""
    fields: dict[str, float] = {}
    whole: dict[str, list[float]] = {}
    decode: dict[str, list[float]] = {}
    for name, which in (("alone", ALONE), ("with_draft", label)):
        seconds = [sum(batch["seconds"] for batch in unit["runs"][which]) for unit in measured.repeats]
        texts = [_texts(unit, which) for unit in measured.repeats]
        tokens = [sum(count for count, _, _ in each) for each in texts]
        whole[name] = [_ratio(s, n) for s, n in zip(seconds, tokens, strict=True)]
        # Behind each text's first token, which no draft can hasten.
        behind = [[(n - 1, s - first) for n, s, first in each if n > 1] for each in texts]
        decode[name] = [_ratio(sum(s for _, s in each), sum(n for n, _ in each)) for each in behind]
        each_token = [s / n for each in behind for n, s in each]
        fields |= {
            f"seconds_{name}": statistics.median(seconds),
            f"seconds_{name}_low": min(seconds),
            f"seconds_{name}_high": max(seconds),
            f"tokens_per_second_{name}": statistics.median(_ratio(1, value) for value in whole[name]),
            f"first_token_seconds_{name}": statistics.median(first for each in texts for _, _, first in each),
            f"seconds_per_output_token_{name}": statistics.median(each_token) if each_token else NAN,
        }
    speedups, decode_speedups = (
        [_ratio(alone, drafted) for alone, drafted in zip(found["alone"], found["with_draft"], strict=True)]
        for found in (whole, decode)
    )
    return fields | {
        "speedup": statistics.median(speedups),
        "speedup_low": min(speedups),
        "speedup_high": max(speedups),
        "decode_speedup": statistics.median(decode_speedups),
    }


def _without_looping(measured: Measured, label: str) -> float:
    """The median speed-up of texts whose target does not loop, which a draft predicts easily; NaN if none."""
    own = measured.counts["texts"][ALONE]["response_ids"]
    places = [place for place, ids in enumerate(own) if not is_looping(ids)]

    def seconds_per_token(unit: dict[str, Any], name: str) -> float:
        texts = _texts(unit, name)
        return _ratio(sum(texts[place][1] for place in places), sum(texts[place][0] for place in places))

    pairs = [(seconds_per_token(unit, ALONE), seconds_per_token(unit, label)) for unit in measured.repeats]
    return statistics.median(_ratio(*pair) for pair in pairs)


def _texts(unit: dict[str, Any], label: str) -> list[Text]:
    names = ("num_tokens", "text_seconds", "first_token_seconds")
    return [text for batch in unit["runs"][label] for text in zip(*(batch[n] for n in names), strict=True)]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else NAN
