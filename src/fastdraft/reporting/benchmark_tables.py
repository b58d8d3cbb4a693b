"""The tables of a measured wall clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdraft.benchmark.rows import BenchmarkResults, BenchmarkRow, TextDifference
from fastdraft.functional.same_text import near_tie
from fastdraft.reporting.definitions import byte_size, duration, percent, times
from fastdraft.reporting.tables import Cell, Column, Table, table
from fastdraft.reporting.verdict import worth

SHARES = {"target_seconds": "target", "draft_seconds": "draft", "other_seconds": "runtime around them"}
"""Where the time of a speculative run goes."""


def pair_name(row: Any) -> str:
    """`int4 + int8`, kept on one line: the target's weights, then the draft's."""
    return f"{row.target_weights}\u00a0+\u00a0{row.draft_weights}"


def measured(benchmark: BenchmarkResults) -> Table:
    """The deployed pair at each task's best K; in small print ranges, quotients of measured over promised, and times without the draft."""

    def promise(key: str, quotient: str) -> Callable[[BenchmarkRow], Cell]:
        def shown(row: BenchmarkRow) -> Cell:
            found = getattr(row, quotient)
            return Cell(times(getattr(row, key)), "" if found is None else f"quotient {found:.2f}")

        return shown

    def seconds(key: str) -> Callable[[BenchmarkRow], Cell]:
        ends = f"{key}_with_draft", f"{key}_alone"
        return lambda row: Cell(duration(getattr(row, ends[0])), f"{duration(getattr(row, ends[1]))} without")

    columns: dict[str, Column] = {
        "Task": "task",
        "Best K": "num_speculative_tokens",
        "Tokens per target pass": "block_efficiency .2f",
        "Measured": _measured,
        "Predicted": promise("predicted_speedup", "predicted_quotient"),
        "Behind the first token": promise("decode_speedup", "decode_quotient"),
        "MBSU by bytes": promise("mbsu_bytes", "mbsu_quotient"),
        "Time to first token": seconds("first_token_seconds"),
        "Time per output token": seconds("seconds_per_output_token"),
        "Same greedy text": lambda row: "-" if row.same_text is None else f"{row.same_text} of {row.texts}",
    }
    return table(benchmark.fastest_of_each(), columns)


def _measured(row: BenchmarkRow) -> Cell:
    around = row.interval("speedup")
    parts = [f"{around[0]:.2f} to {around[1]:.2f}"] if around else []
    parts += [] if row.lossless else ["not lossless"]
    return Cell(times(row.speedup), ", ".join(parts), worth(row.speedup) if row.lossless else "")


def breakdown(benchmark: BenchmarkResults) -> Table:
    """Where the time of a speculative run goes, by the runtime's own clock."""

    def share(key: str) -> Callable[[Any], str]:
        return lambda row: percent(getattr(row, key) / row.total_seconds)

    columns: dict[str, Column] = {"Weights": pair_name, "K": "num_speculative_tokens"}
    columns |= {words.capitalize(): share(key) for key, words in SHARES.items()}
    rows = [row for row in benchmark.breakdown if row.total_seconds]
    return table(rows, columns | {"In all": "total_seconds seconds"})


def passes(benchmark: BenchmarkResults) -> Table:
    """What one pass of each model takes alone: what the prediction rests on."""
    columns: dict[str, Column] = {"Weights": pair_name, "Context, tokens": "prefix_tokens ,"}
    columns |= {"Draft, 1 token": "draft_seconds seconds"}
    widths = sorted({width for row in benchmark.latencies for width in row.target_seconds})
    for width in widths if len(widths) <= 6 else [*widths[:4], widths[len(widths) // 2 + 1], widths[-1]]:
        columns[f"Target, {width}"] = lambda row, width=width: duration(row.target_seconds.get(width))
    return table(benchmark.latencies, columns)


def memory(benchmark: BenchmarkResults) -> Table:
    """Bytes on disk, and peak memory of the process above what it held before loading."""
    sizes = {(model.role, model.weights): model.bytes for model in benchmark.models}

    def added(row: Any) -> str:
        known = row.alone_bytes is not None and row.with_draft_bytes is not None
        return byte_size(row.with_draft_bytes - row.alone_bytes if known else None)

    columns: dict[str, Column] = {
        "Weights": pair_name,
        "Target on disk": lambda row: byte_size(sizes.get(("target", row.target_weights))),
        "Draft on disk": lambda row: byte_size(sizes.get(("draft", row.draft_weights))),
        "Peak memory alone": "alone_bytes bytes",
        "Peak with the draft": "with_draft_bytes bytes",
        "The draft adds": added,
    }
    return table(benchmark.memory, columns)


def all_measurements(benchmark: BenchmarkResults) -> Table:
    columns: dict[str, Column] = {
        "Part": lambda row: row.part.replace("_", " "),
        "Task": "task",
        "Weights": pair_name,
        "T": "temperature g",
        "K": "num_speculative_tokens",
        "At a time": "concurrency",
        "Prompt": "prompt_tokens .0f",
        "Output": "max_new_tokens",
        "AR": "acceptance_rate .3f",
        "Tokens per pass": "block_efficiency .2f",
        "Measured": _measured,
        "Behind first": "decode_speedup ×",
        "Predicted": "predicted_speedup ×",
        "Tokens/s alone": "tokens_per_second_alone ,.1f",
        "Tokens/s with draft": "tokens_per_second_with_draft ,.1f",
        "First token alone": "first_token_seconds_alone seconds",
        "First token with draft": "first_token_seconds_with_draft seconds",
    }
    return table(benchmark.rows, columns)


def different_texts(benchmark: BenchmarkResults) -> Table:
    """Every greedy text that differs: once for each place at which it does, with the widest gap between the log-probs there."""
    places: dict[tuple[str, str, int], TextDifference] = {}
    for row in benchmark.rows:
        for case in row.differences:
            known = places.setdefault((row.task, case.prompt, case.token), case)
            if (case.logprob_gap or 0.0) > (known.logprob_gap or 0.0):
                places[row.task, case.prompt, case.token] = case

    def gap(item: tuple[Any, TextDifference]) -> Cell:
        found = item[1].logprob_gap
        if found is None:
            return Cell("-", "not computed", "bad")
        tie = found < near_tie(benchmark.runtime.precision)
        return Cell(f"{found:.4f}", "near-tie" if tie else "no near-tie", "" if tie else "bad")

    columns: dict[str, Column] = {
        "Task": lambda item: item[0][0],
        "Prompt": lambda item: item[1].prompt,
        "Token": lambda item: str(item[1].token),
        "Gap": gap,
    }
    return table(places.items(), columns)


def launch_line(benchmark: BenchmarkResults) -> str:
    """Python that runs the deployed pair at the measured best K; empty for another runtime or no best K."""
    k, runtime = benchmark.best.num_speculative_tokens, benchmark.runtime
    if runtime.name != "openvino" or k is None:
        return ""
    target, draft = benchmark.pairs[0]
    return f"""import openvino_genai

draft = openvino_genai.draft_model("path/to/draft-{draft}", "{runtime.draft_device}")
pipeline = openvino_genai.LLMPipeline("path/to/target-{target}", "{runtime.device}", draft_model=draft)
config = openvino_genai.GenerationConfig(max_new_tokens=256, num_assistant_tokens={k})
print(pipeline.generate("Once upon a time", config))"""
