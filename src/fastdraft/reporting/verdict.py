"""Whether a draft pays, in one sentence: `give_verdict(results, benchmark)`; the clock leads where one ran.

The terminal, the report, the model card and `benchmark.json` show the same words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fastdraft.benchmark.rows import PROPOSERS, BenchmarkResults, BenchmarkRow, Pair, PassesRow, best_proposer
from fastdraft.evaluation.results import SPEEDUPS, EvaluationResults, ProposedRow
from fastdraft.forecast import WORTH
from fastdraft.reporting.definitions import (
    at_temperature,
    duration,
    k_is,
    label,
    listing,
    percent,
    show,
    times,
)

RUNTIMES = {
    "openvino": "OpenVINO",
    "llamacpp": "llama.cpp",
    "vllm": "vLLM",
    "fastdraft": "our decoder over OpenVINO",
}
SUBJECTS = {
    "lookup": "prompt lookup",
    "draft": "this draft",
    "lookup_draft": "prompt lookup and, where it finds nothing, this draft",
}
_BESIDE = {
    "lookup": "Prompt lookup, which needs no draft, does no worse on its own:",
    "lookup_draft": "Prompt lookup with the draft where it finds nothing is better:",
}
# A needed share of accepted proposals above this is beyond what small drafts reach: the costs are then the
# reason.
WITHIN_REACH = 0.6
# Share of time; a runtime that takes more for itself is the reason where less was measured than predicted.
SMALL_OVERHEAD = 0.15
Tone = Literal["", "good", "mixed", "bad", "none"]


@dataclass(frozen=True)
class Verdict:
    """One sentence, a second one with what it rests on, and how good the news is (`none`: unknown)."""

    sentence: str
    detail: str
    tone: Tone


def give_verdict(results: EvaluationResults | None, benchmark: BenchmarkResults | None) -> Verdict:
    """On a run: of the clock where it was measured, with the forecast behind it; else the forecast alone."""
    if benchmark is None or not benchmark.judged():
        return forecast_verdict(results)
    measured, forecast = measured_verdict(benchmark), forecast_verdict(results, predicted=False)
    if forecast.tone == "none":
        return measured
    detail = f"{measured.detail} Memory-bound forecast: {forecast.sentence} {forecast.detail}"
    return replace(measured, detail=detail)


def measured_verdict(benchmark: BenchmarkResults) -> Verdict:
    """What the clock says about the deployed pair of weights."""
    pair, detail = (
        benchmark.pairs[0] if benchmark.pairs else None,
        " ".join([f"Whole answers, {measured_with(benchmark)}.", *(r.sentence for r in benchmark.at_a_time)]),
    )
    named = best_proposer(benchmark.rows, pair) if pair else None
    if named is None:
        sentence = "No verdict: no measured text is the target's own; measure at temperature 0."
        return Verdict(sentence, detail, "mixed")
    kind, k = named
    rows, better = benchmark.judged(pair, kind), faster_ones(benchmark, kind, k)
    at_k = [row for row in rows if row.num_speculative_tokens == k]
    rows = [row for row in at_k if row.task not in better] or at_k
    good = [row for row in rows if (row.speedup or 0.0) >= WORTH]
    poor = [row for row in rows if row not in good]
    target, draft = rows[0].weights
    where = f"({benchmark.runtime.device}, {target} target" + (
        f", {draft} draft)" if kind != "lookup" else ")"
    )
    more = _elsewhere(better)
    # "Train nothing" is the truth only where no draft is worth it beside lookup.
    use = f"Use {SUBJECTS[kind]} with {k_is(k)}" + (
        ", train nothing" if kind == "lookup" and not more else ""
    )
    if not poor:
        lowest = min(row.speedup_low or row.speedup or 0.0 for row in good)
        again = f", but {times(lowest)} in one repeat: measure again on a quiet machine" if lowest < 1 else ""
        sentence = f"{use}: measured {_each(good)} {where}{again}.{more}"
        return Verdict(sentence, detail, "mixed" if again or more or kind == "lookup" else "good")
    reason = _reason(min(poor, key=lambda row: row.speedup or 0.0), benchmark)
    if good:
        found = f"measured {_each(good)}, but {_each(poor)} {where}; there {reason}"
        return Verdict(f"{use} where it pays: {found}.{more}", detail, "mixed")
    little = all((row.speedup or 0.0) >= 1 for row in poor)
    start = "A draft brings next to nothing here" if little else "Do not use a draft here"
    found = f"{start}: measured {_each(poor)} at best {k_is(k)} {where}; {reason}.{more}"
    return Verdict(found, detail, "mixed" if little else "bad")


def worth_most(speedups: Mapping[str, float]) -> str:
    """The proposer to use: a draft only where it is worth its trouble beside lookup, both beside either."""
    best = ""
    for kind in (kind for kind in PROPOSERS if kind in speedups):
        if speedups[kind] >= WORTH * speedups.get(best, 1.0):
            best = kind
    return best


def fastest_by_task(benchmark: BenchmarkResults, pair: Pair) -> dict[str, dict[str, BenchmarkRow]]:
    """By task and proposer the judged row at the best K."""
    found: dict[str, dict[str, BenchmarkRow]] = {}
    for kind in PROPOSERS:
        for row in benchmark.fastest_of_each(pair, kind):
            found.setdefault(row.task, {})[kind] = row
    return found


def faster_ones(benchmark: BenchmarkResults, kind: str, k: int) -> dict[str, tuple[str, str]]:
    """By task another proposer than the named one, where it is worth it there, and what it reaches."""
    own = {r.task: r.speedup or 0.0 for r in benchmark.judged(None, kind) if r.num_speculative_tokens == k}
    better: dict[str, tuple[str, str]] = {}
    for task, rows in fastest_by_task(benchmark, benchmark.pairs[0]).items():
        others = {name: row.speedup or 0.0 for name, row in rows.items() if name != kind}
        chosen = worth_most(others)
        if chosen and others[chosen] >= WORTH * max(own.get(task, 0.0), 1.0):
            told = f"{times(others[chosen])} on\u00a0{task} ({k_is(rows[chosen].num_speculative_tokens)})"
            better[task] = (chosen, told)
    return better


def _elsewhere(better: Mapping[str, tuple[str, str]]) -> str:
    parts = [
        f"{SUBJECTS[kind]} reaches {listing([told for name, told in better.values() if name == kind])}"
        for kind in dict.fromkeys(name for name, _ in better.values())
    ]
    return f" Better by task: {'; '.join(parts)}." if parts else ""


def forecast_verdict(results: EvaluationResults | None, *, predicted: bool = True) -> Verdict:
    """What acceptance and cost promise; `predicted` adds what times measured in the evaluation say."""
    if results is None or not results.speedups:
        sentence = "This draft has not been evaluated yet: nothing can be said about its speed-up."
        return Verdict(sentence, "Run `fastdraft evaluate` on its recipe.", "none")
    key = results.speedups[0]
    rows = best_rows(results, key)
    gains = [_phrase(row, key) for row in rows if getattr(row, key) > 1]
    losses = [_phrase(row, key) for row in rows if getattr(row, key) <= 1]
    at = f"at this cost ratio ({results.cost_ratio_parameters:.3g})"
    detail = (
        f"The memory-bound speed-up {SPEEDUPS[key]} at {at_temperature(results.temperatures[0])}, checkpoint "
        f"{label(results.checkpoints[-1])}: counted acceptance combined with relative cost, not a wall clock."
    )
    if predicted:
        detail += _predicted(results)
    chosen = _chosen(results, key)
    if set(chosen) == {"lookup"}:
        draft = listing([f"{times(getattr(row, key))} on\u00a0{row.task}" for row in rows])
        free = f"it reaches a memory-bound {listing(chosen['lookup'])} without a draft"
        return Verdict(f"Use prompt lookup, train nothing: {free}, the draft {draft}.", detail, "mixed")
    more = "".join(f" {_BESIDE[kind]} {listing(told)}." for kind, told in chosen.items() if kind in _BESIDE)
    if not gains:
        low = f"its memory-bound speed-up stays under 1 even at the best K, {listing(losses)}"
        return Verdict(f"Do not use this draft {at}: {low}.{more}", detail, "bad")
    sentence = f"At its best K the draft reaches {listing(gains)}"
    if losses:
        sentence += f", but stays under 1 with {listing(losses)}: do not use a draft there {at}"
    return Verdict(f"{sentence}.{more}", detail, "mixed" if losses else "good")


def _chosen(results: EvaluationResults, speedup: str) -> dict[str, list[str]]:
    """By proposer the tasks on which it is worth it, with its speed-up; empty without lookup's counts."""
    found: dict[str, list[str]] = {}
    for task in results.tasks if results.lookup else ():
        rows = best_of_each(results, task, results.temperatures[0], speedup)
        reached = {kind: float(getattr(row, speedup)) for kind, row in rows.items()}
        if kind := worth_most(reached):
            found.setdefault(kind, []).append(f"{times(reached[kind])} on\u00a0{task}")
    return dict(sorted(found.items()))


def best_of_each(
    results: EvaluationResults, task: str, temperature: float, speedup: str
) -> dict[str, ProposedRow]:
    """By proposer the row at the best K for a kind of speed-up."""
    found = {kind: results.best(task, temperature, speedup, kind) for kind in PROPOSERS}
    return {kind: row for kind, row in found.items() if row}


def best_rows(results: EvaluationResults, speedup: str) -> list[ProposedRow]:
    """Every task's row of the final draft at its best K and the headline temperature, the fastest first."""
    found = [results.best(task, results.temperatures[0], speedup) for task in results.tasks]
    return sorted([row for row in found if row], key=lambda row: -getattr(row, speedup))


def worth(speedup: float | None) -> Tone:
    """good: a draft pays; bad: it is slower than none; neither between the two."""
    return "" if speedup is None else "good" if speedup >= WORTH else "bad" if speedup < 1 else ""


def runtime_name(benchmark: BenchmarkResults) -> str:
    """`OpenVINO 2026.4.1`."""
    return f"{RUNTIMES.get(benchmark.runtime.name, benchmark.runtime.name)} {benchmark.runtime.version}"


def measured_with(benchmark: BenchmarkResults) -> str:
    """Runtime, device and weights in a few words."""
    used, (_, target, draft) = benchmark.runtime, benchmark.pairs[0]
    device = f"{used.device_name} ({used.device})"
    return f"{runtime_name(benchmark)} on {device}, {target} target with {draft} draft"


def _phrase(row: ProposedRow, speedup: str) -> str:
    efficiency, k = row.block_efficiency or 0.0, k_is(row.num_speculative_tokens)
    return f"{times(getattr(row, speedup))} on\u00a0{row.task} ({efficiency:.2f} tokens per target pass, {k})"


def _each(rows: Sequence[BenchmarkRow]) -> str:
    return listing([f"{times(row.speedup)} on\u00a0{row.task}" for row in rows])


def _predicted(results: EvaluationResults) -> str:
    key = next((name for name in ("predicted_speedup", "mbsu_latency") if name in results.speedups), None)
    if key is None or key == results.speedups[0]:
        return ""
    rows = best_rows(results, key)
    over = [f"{times(getattr(row, key))} on {row.task}" for row in rows if getattr(row, key) > 1]
    under = [row.task for row in rows if getattr(row, key) <= 1]
    where = f" ({timed.device}, {timed.target_dtype})" if (timed := results.latency) else ""
    # Not the runtime that serves: on one machine a draft may lose here and gain in OpenVINO.
    by = f" In transformers{where}, whose passes the evaluation timed, the prediction is"
    if not over:
        return f"{by} under 1 on every task: do not use a draft there (`benchmark` times other runtimes)."
    rest = f", and under 1 on {listing(under)}: do not use a draft there" if under else ""
    return f"{by} {listing(over)}{rest}."


def _reason(row: BenchmarkRow, benchmark: BenchmarkResults) -> str:
    """The figure that explains most of why this row gains nothing, in words."""
    passes = next((each for each in benchmark.latencies if each.key == row.key), None)
    if row.proposer != "draft":
        return f"a pass of the target brings {show(row.block_efficiency, '{:.2f}')} tokens"
    if row.predicted_speedup is None or passes is None:
        return f"the target accepts {percent(row.acceptance_rate)} of what is proposed"
    if row.predicted_speedup < WORTH:
        return _costs(row, passes)
    promised = f"its passes alone promised {times(row.predicted_speedup)}"
    if not benchmark.breakdown:
        return f"{promised}, the rest is the runtime's overhead"
    share = benchmark.breakdown[0].shares[2]
    if share < SMALL_OVERHEAD:
        return f"{promised}, but inside the runtime the passes take longer"
    return f"{promised}, but {percent(share)} of the time is the runtime's own"


def _costs(row: BenchmarkRow, passes: PassesRow) -> str:
    """Where passes alone promised nothing: costs too high for any acceptance, or acceptance too low."""
    seconds, k = passes.target_seconds, row.num_speculative_tokens or 1
    width = k + 1 if k + 1 in seconds else min(width for width in seconds if width > 1)
    draft, verify = passes.draft_seconds / seconds[1], (seconds[width] / seconds[1] - 1) / (width - 1)
    # A round pays where each proposal is accepted more often than it costs, in passes of the target over one
    # token.
    needed, rate = draft + verify, row.conditional_acceptance_rate
    if needed <= WITHIN_REACH and rate is not None and rate >= needed:
        return (
            f"a round costs as much as the accepted tokens gain ({percent(rate)} of the proposals looked at)"
        )
    if needed <= WITHIN_REACH:
        digits = int(percent(rate) == percent(needed))  # so that the difference can be seen
        found = f"the acceptance is too low: {percent(rate, digits)} of the proposals looked at"
        return f"{found}, and costs ask for more than {percent(needed, digits)}"
    one = duration(seconds[1])
    if draft >= verify:
        return f"the target answers in {one} a token and the draft needs {duration(passes.draft_seconds)}"
    wide = f"a pass of the target over {width} tokens takes {duration(seconds[width])}"
    return f"verifying is too dear: {wide}, over one {one}"
