"""From the units of a benchmark to the rows of `benchmark.json`.

Decides how times become figures. A speed-up is seconds per token alone over seconds per token with the draft, of the two
runs of the same repeat; the row says the median over the repeats and the smallest and largest. `decode_speedup` leaves out
each text's first token, which no draft can hasten; `speedup_without_looping` leaves out texts that run into loops, which a
draft predicts easily. Rates follow from added counts. The prediction takes the passes measured at the prefix nearest to the
middle of the row's texts; it holds for one text at a time and a fixed K, and is null elsewhere. What cannot be computed is
null.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdraft.data.filters import is_looping
from fastdraft.functional.acceptance import tidy, tidy_count
from fastdraft.decoding.latency import Latency
from fastdraft.forecast import mbsu, predicted_speedup
from fastdraft.functional.acceptance import Counts, counts_from_array
from fastdraft.runtimes.wall_clock_runs import ALONE, Measured, Setting

NAN = float("nan")


@dataclass(frozen=True)
class PairCosts:
    """What is known about a pair before its texts are timed."""

    latencies: Sequence[Latency]
    """One for each prefix measured."""
    cost_ratio_bytes: float
    """Bytes of weights that the draft reads for one token, over the target's, each at its own weights."""

    def at(self, position: float) -> Latency:
        """The passes measured nearest to a place in a text."""
        return min(self.latencies, key=lambda latency: abs(latency.prefix_tokens - position))


def rows_of(measured: Measured, costs: PairCosts) -> list[dict[str, Any]]:
    """One row for each setting of a finished measurement, in its order."""
    return [_row(measured, setting, costs) for setting in measured.measurement.settings]


def _row(measured: Measured, setting: Setting, costs: PairCosts) -> dict[str, Any]:
    work, label = measured.measurement, setting.label
    texts = measured.counts["texts"][label]
    numbers = [row for row in texts["counts"] if row is not None]
    counts = counts_from_array(np.sum(np.array(numbers, dtype=np.float64), axis=0)) if numbers else Counts()
    times = _times(measured, label)
    # A device whose runtime adapts K by itself counts rounds of varying length, whatever was asked for.
    k = setting.num_speculative_tokens
    fixed = not setting.confidence_threshold and len(counts.num_accepted_tokens_per_pos) == k
    position = (
        statistics.fmean(measured.counts["prompt_tokens"])
        + statistics.fmean(map(len, texts["response_ids"])) / 2
    )
    return {
        "part": work.part,
        "task": work.prompts.task,
        "target_weights": work.target_weights,
        "draft_weights": work.draft_weights,
        "temperature": work.temperature,
        "num_speculative_tokens": None if setting.confidence_threshold else setting.num_speculative_tokens,
        "confidence_threshold": setting.confidence_threshold,
        "concurrency": work.concurrency,
        "prompt_tokens": tidy(statistics.fmean(measured.counts["prompt_tokens"])),
        "max_new_tokens": work.prompts.max_new_tokens,
        "num_prompts": len(work.prompts.prompt_ids),
        "repeats": work.repeats,
        **_count_fields(counts, dynamic=not fixed),
        **times,
        **_expectations(counts, k if fixed else 0, costs, position, times, one_text=work.concurrency == 1),
        **_text_fields(measured, label),
        "speedup_without_looping": tidy(_without_looping(measured, label)) if work.concurrency == 1 else None,
    }


def _count_fields(counts: Counts, *, dynamic: bool) -> dict[str, Any]:
    """Named as in evaluate's `results.json`; null what the runtime does not count of rounds of varying length."""
    per_pos = list(counts.num_accepted_tokens_per_pos)
    while dynamic and per_pos and not per_pos[-1]:
        per_pos.pop()
    return {
        "num_drafts": _count(counts.num_drafts),
        "num_draft_tokens": _count(counts.num_draft_tokens),
        "num_accepted_tokens": _count(counts.num_accepted_tokens),
        "num_accepted_tokens_per_pos": [_count(value) for value in per_pos],
        "num_generated_tokens": _count(counts.num_generated_tokens),
        "num_examined_tokens": _count(counts.num_examined_tokens),
        "acceptance_rate": tidy(counts.acceptance_rate),
        "conditional_acceptance_rate": tidy(counts.conditional_acceptance_rate),
        "block_efficiency": tidy(counts.block_efficiency),
    }


@dataclass(frozen=True)
class _Repeat:
    """One contender's times in one repeat, added up over its batches."""

    seconds: float
    tokens: int
    decode_seconds: float
    """Behind each text's first token."""
    decode_tokens: int


def _times(measured: Measured, label: str) -> dict[str, Any]:
    """Everything that follows from the clock."""
    alone, drafted = ([_repeat(unit["runs"][name]) for unit in measured.repeats] for name in (ALONE, label))
    speedups = [
        _quotient(a.seconds, a.tokens, d.seconds, d.tokens) for a, d in zip(alone, drafted, strict=True)
    ]
    decode = [
        _quotient(a.decode_seconds, a.decode_tokens, d.decode_seconds, d.decode_tokens)
        for a, d in zip(alone, drafted, strict=True)
    ]
    fields: dict[str, Any] = {"num_tokens_alone": alone[0].tokens, "num_tokens_with_draft": drafted[0].tokens}
    for name, repeats in (("alone", alone), ("with_draft", drafted)):
        seconds = [repeat.seconds for repeat in repeats]
        fields |= {f"seconds_{name}": tidy(statistics.median(seconds))}
        fields |= {f"seconds_{name}_low": tidy(min(seconds)), f"seconds_{name}_high": tidy(max(seconds))}
    for name, repeats in (("alone", alone), ("with_draft", drafted)):
        rates = [_ratio(repeat.tokens, repeat.seconds) for repeat in repeats]
        fields[f"tokens_per_second_{name}"] = tidy(statistics.median(rates))
    fields |= {
        "speedup": tidy(statistics.median(speedups)),
        "speedup_low": tidy(min(speedups)),
        "speedup_high": tidy(max(speedups)),
    }
    fields["decode_speedup"] = tidy(statistics.median(decode))
    first, each = zip(*(_text_times(measured, name) for name in (ALONE, label)), strict=True)
    for field, values in (("first_token_seconds", first), ("seconds_per_output_token", each)):
        fields |= {f"{field}_alone": tidy(values[0]), f"{field}_with_draft": tidy(values[1])}
    return fields


def _without_looping(measured: Measured, label: str) -> float:
    """The median speed-up of those texts that do not loop in the target's own words, which a draft predicts easily; NaN if none."""
    own = measured.counts["texts"][ALONE]["response_ids"]
    places = [place for place, ids in enumerate(own) if not is_looping(ids)]

    def totals(unit: Mapping[str, Any], name: str) -> tuple[float, float]:
        texts = _texts(unit["runs"][name])
        return sum(texts[place][1] for place in places), sum(texts[place][0] for place in places)

    quotients = [_quotient(*totals(unit, ALONE), *totals(unit, label)) for unit in measured.repeats]
    return statistics.median(quotients)


def _repeat(batches: Sequence[Mapping[str, Any]]) -> _Repeat:
    texts = _texts(batches)
    return _Repeat(
        seconds=sum(batch["seconds"] for batch in batches),
        tokens=sum(tokens for tokens, _, _ in texts),
        decode_seconds=sum(seconds - first for tokens, seconds, first in texts if tokens > 1),
        decode_tokens=sum(tokens - 1 for tokens, _, _ in texts if tokens > 1),
    )


def _texts(batches: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
    """Tokens, seconds and seconds to the first token of every text."""
    names = ("num_tokens", "text_seconds", "first_token_seconds")
    return [text for batch in batches for text in zip(*(batch[name] for name in names), strict=True)]


def _text_times(measured: Measured, label: str) -> tuple[float, float]:
    """Medians over the texts of all repeats: seconds to the first token, and for each token after it."""
    texts = [text for unit in measured.repeats for text in _texts(unit["runs"][label])]
    each = [(seconds - first) / (tokens - 1) for tokens, seconds, first in texts if tokens > 1]
    return statistics.median(first for _, _, first in texts), statistics.median(each) if each else NAN


def _quotient(
    seconds_alone: float, tokens_alone: float, seconds_with_draft: float, tokens_with_draft: float
) -> float:
    return _ratio(_ratio(seconds_alone, tokens_alone), _ratio(seconds_with_draft, tokens_with_draft))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else NAN


def _expectations(
    counts: Counts, k: int, costs: PairCosts, position: float, times: Mapping[str, Any], *, one_text: bool
) -> dict[str, Any]:
    """What was to be expected, and the measured speed-ups over it; nothing for a K of 0, which stands for rounds of varying length."""
    bound, predicted = NAN, NAN
    if k:
        bound = mbsu(counts.block_efficiency, k, costs.cost_ratio_bytes)
    if k and one_text and costs.latencies:
        latency = costs.at(position)
        seconds = latency.target_seconds
        if k + 1 in seconds:
            predicted = predicted_speedup(
                counts.block_efficiency, k, latency.draft_seconds, seconds[1], seconds[k + 1]
            )
    speedup, decode = (NAN if times[name] is None else times[name] for name in ("speedup", "decode_speedup"))
    return {
        "predicted_speedup": tidy(predicted),
        "predicted_quotient": tidy(_ratio(speedup, predicted)),
        "decode_quotient": tidy(_ratio(decode, predicted)),
        "mbsu_bytes": tidy(bound),
        "mbsu_quotient": tidy(_ratio(speedup, bound)),
    }


def _text_fields(measured: Measured, label: str) -> dict[str, Any]:
    """Whether the texts are the target's own, and how many run into loops."""
    texts, differences = (
        measured.counts["texts"][label]["response_ids"],
        measured.counts["differences"][label],
    )
    return {
        "texts": len(texts),
        "same_text": None if differences is None else len(texts) - len(differences),
        "differences": [{**found, "logprob_gap": _gap(found["logprob_gap"])} for found in differences or []],
        "looping_share": tidy(statistics.fmean(is_looping(ids) for ids in texts)),
        "lossless": bool(measured.counts["lossless"][label]),
    }


def _count(value: float) -> float | int | None:
    return tidy_count(value) if math.isfinite(value) else None


def _gap(value: float | None) -> float | None:
    return None if value is None else tidy(value)
