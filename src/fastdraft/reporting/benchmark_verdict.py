"""The answer of the clock in one sentence, and how it stands beside the forecast.

Decides that a measured wall clock leads and the memory-bound forecast follows; that the benchmark's own sentence is used,
so that the stage and the page never say two things; and, where it has none, that a draft pays from `WORTH` on.
"""

from __future__ import annotations

import re
from typing import Literal

from fastdraft.reporting.benchmark_results import Benchmark, times, worth
from fastdraft.reporting.record import RunRecord
from fastdraft.reporting.results import Figures, interval, k_name, number
from fastdraft.reporting.verdict import Verdict, give_verdict, listing

TONES: dict[str, Literal["good", "mixed", "bad"]] = {"good": "good", "mixed": "mixed", "bad": "bad"}
LEAD = "Measured on this machine"


def headline(record: RunRecord) -> Verdict:
    """The verdict on a run: of the clock where it was measured, then the forecast; else the forecast alone."""
    measured = measured_verdict(Benchmark(record.benchmark)) if record.benchmark is not None else None
    if measured is None:
        return give_verdict(record.results)
    forecast = give_verdict(record.results, prediction=False)
    if forecast.tone == "none":
        return measured
    return Verdict(
        measured.sentence,
        f"Memory-bound forecast: {_lowered(forecast.sentence)} {forecast.detail}",
        measured.tone,
    )


def measured_verdict(benchmark: Benchmark) -> Verdict | None:
    """What the clock says; None when nothing was measured on which a verdict may rest."""
    told = benchmark.raw.get("verdict")
    told = told if isinstance(told, dict) else {}
    best = {task: item for task in benchmark.tasks if (item := benchmark.best(task)) is not None}
    if not best:
        return None
    gains = {task: item for task, item in best.items() if worth(number(item, "speedup") or 0.0) == "good"}
    sentence, tone = str(told.get("sentence") or "").strip(), TONES.get(str(told.get("tone")))
    if not sentence:
        sentence = _composed(gains, {task: item for task, item in best.items() if task not in gains})
    if not sentence.startswith("Measured"):
        sentence = f"{LEAD}: {_lowered(sentence.replace(': measured ', ': ', 1))}"
    sentence = _typeset(sentence)
    tone = tone or ("bad" if not gains else "good" if len(gains) == len(best) else "mixed")
    return Verdict(sentence, f"The measurement: {measured_with(benchmark)}, whole answers.", tone)


def measured_with(benchmark: Benchmark) -> str:
    """Runtime, device and weights in a few words."""
    return f"{benchmark.runtime_name} on {benchmark.device_name}, {pair_words(benchmark)}"


def pair_words(benchmark: Benchmark) -> str:
    """`int4 target with int8 draft`, of the deployed pair."""
    pair = benchmark.deployed
    return f"{pair.target} target with {pair.draft} draft" if pair else "weights not recorded"


def _composed(gains: dict[str, Figures], losses: dict[str, Figures]) -> str:
    if not gains:
        return f"do not use a draft here: even at the best K it reaches only {listing([_phrase(*entry) for entry in losses.items()])}."
    text = f"the draft brings {listing([_phrase(*entry) for entry in gains.items()])}"
    rest = (
        f"; do not use a draft on {listing([_phrase(*entry) for entry in losses.items()])}" if losses else ""
    )
    return f"{text}{rest}."


def _phrase(task: str, item: Figures) -> str:
    around = interval(item, "speedup")
    spread = f", {around[0]:.2f} to {around[1]:.2f}" if around else ""
    return f"{times(number(item, 'speedup'))} on\u00a0{task} ({k_name(number(item, 'num_speculative_tokens'))}{spread})"


def _typeset(sentence: str) -> str:
    """`1.62x` as `1.62×`; `K = 3` and `18 %` kept on one line."""
    sentence = re.sub(r"(?<=\d)x\b", "×", sentence)
    return re.sub(r"(?<=\d) (?=%)|(?<=K) (?==)|(?<==) (?=\d)", "\u00a0", sentence)


def _lowered(sentence: str) -> str:
    """The first word in small letters, unless it is a name."""
    first = sentence.split(" ", 1)[0]
    return sentence if first[1:] != first[1:].lower() else sentence[:1].lower() + sentence[1:]
