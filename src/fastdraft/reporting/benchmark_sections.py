"""The chapter made from `benchmark.json`: what the clock of a real runtime says, beside what was promised.

Decides what the chapter says and in which order: the best K of each task, where the figures come from, the charts, where
the time and the memory go, and what a reader has to know before believing them. What was not measured is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastdraft.reporting.benchmark_charts import (
    SHARES,
    breakdown_chart,
    pair_charts,
    sweep_charts,
    wall_clock_charts,
)
from fastdraft.reporting.benchmark_notes import differences_table, notes
from fastdraft.reporting.benchmark_results import Benchmark
from fastdraft.reporting.benchmark_tables import (
    best_table,
    breakdown_table,
    dynamic_table,
    full_table,
    memory_table,
    passes_table,
)
from fastdraft.reporting.benchmark_verdict import measured_verdict, pair_words
from fastdraft.reporting.document import Block, Charts, Details, Section, Text
from fastdraft.reporting.record import RunRecord
from fastdraft.reporting.results import number

TITLE, ANCHOR = "Wall clock", "wall-clock"


def wall_clock_section(record: RunRecord) -> Section | str | None:
    """Everything measured; None for a run without a benchmark, a line when the benchmark holds no figures."""
    if record.benchmark is None:
        return None
    benchmark = Benchmark(record.benchmark)
    if not benchmark.rows:
        return "Wall clock: the benchmark measured nothing."
    blocks: list[Block] = []
    if benchmark.tasks:
        blocks.append(best_table(benchmark))
    blocks.append(Text(setting(benchmark), "muted"))
    blocks += _charts(benchmark)
    blocks += [
        table
        for table in (breakdown_table(benchmark), passes_table(benchmark), memory_table(benchmark))
        if table is not None
    ]
    if benchmark.dynamic:
        blocks.append(dynamic_table(benchmark))
    blocks += notes(benchmark)
    blocks.append(Details("All measurements", table=full_table(benchmark)))
    differing = differences_table(benchmark)
    if differing is not None:
        blocks.append(Details("Texts that differ with the draft", table=differing))
    hint = launch_hint(benchmark)
    if hint:
        verdict = measured_verdict(benchmark)
        paying = verdict is not None and verdict.tone != "bad"
        blocks.append(
            Details(
                "Use it with OpenVINO GenAI" if paying else "Try it with OpenVINO GenAI on another device",
                text=hint,
            )
        )
    lead = (
        "Seconds per token without the draft over seconds per token with it, whole answers, first token included. Predicted is "
        "tokens per target pass over the cost of a round, from passes timed alone on the same device."
    )
    return Section(TITLE, ANCHOR, tuple(blocks), lead)


def setting(benchmark: Benchmark) -> str:
    """Where and how the clock ran, in a sentence or two."""
    runtime = benchmark.runtime
    device, draft_device, threads = (
        str(runtime.get("device") or ""),
        str(runtime.get("draft_device") or ""),
        number(runtime, "threads"),
    )
    parts = [f"Measured with {benchmark.runtime_name} on {benchmark.device_name}"]
    parts += [f"the draft on {draft_device}"] if draft_device and draft_device != device else []
    parts += [f"precision {runtime['precision']}"] if runtime.get("precision") else []
    parts += (
        [
            "threads chosen by the runtime"
            if threads == 0
            else f"{threads:g} thread{'s' if threads != 1 else ''}"
        ]
        if threads is not None
        else []
    )
    item = (
        next((found for task in benchmark.tasks if (found := benchmark.best(task))), None)
        or benchmark.rows[0]
    )
    runs = [
        words.format(value)
        for key, words in (
            ("num_prompts", "{:g} prompts of each task"),
            ("max_new_tokens", "up to {:g} new tokens"),
            ("concurrency", "{:g} at a time"),
            ("repeats", "{:g} repeats"),
        )
        if (value := number(item, key)) is not None
    ]
    return f"{', '.join(parts)}. {', '.join(runs)}, without and with the draft in turn; medians, and ranges over repeats."


def launch_hint(benchmark: Benchmark) -> str:
    """Python that runs the deployed pair in OpenVINO GenAI at the measured best K; empty for another runtime or no best K."""
    k, pair = benchmark.best_k, benchmark.deployed
    if benchmark.runtime.get("name") != "openvino" or k is None or pair is None:
        return ""
    device = str(benchmark.runtime.get("device") or "CPU")
    draft_device = str(benchmark.runtime.get("draft_device") or device)
    return f"""import openvino_genai

draft = openvino_genai.draft_model("path/to/draft-{pair.draft}", "{draft_device}")
pipeline = openvino_genai.LLMPipeline("path/to/target-{pair.target}", "{device}", draft_model=draft)
config = openvino_genai.GenerationConfig(max_new_tokens=256, num_assistant_tokens={k})
print(pipeline.generate("Once upon a time", config))"""


def _charts(benchmark: Benchmark) -> Sequence[Charts]:
    """The drawings, those without material left out."""
    found = []
    drawn = wall_clock_charts(benchmark)
    if drawn:
        caption = (
            f"Speed-up against K, {pair_words(benchmark)}. Solid: measured, with the range over repeats, the best K marked; dashed: "
            "predicted from passes timed alone; dotted: as fast as without a draft."
        )
        found.append(Charts(drawn, caption))
    drawn = pair_charts(benchmark)
    if drawn:
        found.append(
            Charts(
                drawn,
                "Measured speed-up at the best K by weights, the target's + the draft's; each over its own target alone.",
            )
        )
    drawn = sweep_charts(benchmark)
    if drawn:
        found.append(Charts(drawn, "Measured speed-up at the best K when one thing changes."))
    drawing = breakdown_chart(benchmark.items("breakdown"))
    if drawing is not None:
        keys = tuple((variable, words) for _, variable, words, _ in SHARES)
        found.append(
            Charts((drawing,), "Where the time of a speculative run goes, by the runtime's own clock.", keys)
        )
    return found
