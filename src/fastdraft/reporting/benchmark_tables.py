"""The tables of a measured wall clock.

Decides their columns, what stands in small print, and that a figure which could not be computed is a dash.
"""

from __future__ import annotations

from fastdraft.reporting.benchmark_charts import SHARES, shares_of
from fastdraft.reporting.benchmark_results import Benchmark, byte_size, milliseconds, pair_of, times, worth
from fastdraft.reporting.benchmark_verdict import pair_words
from fastdraft.reporting.document import Cell, Row, Table, row
from fastdraft.reporting.results import Figures, interval, k_name, number, temperature_name
from fastdraft.reporting.summary import show


def best_table(benchmark: Benchmark) -> Table:
    """The deployed pair at each task's best K: measured, predicted, their quotients, latencies and the check of the text."""
    columns = (
        "Task",
        "Best K",
        "Tokens per target pass",
        "Measured",
        "Behind the first token",
        "Predicted",
        "MBSU by bytes",
        "Time to first token",
        "Time per output token",
        "Same greedy text",
    )
    rows = []
    for task in benchmark.tasks:
        item = benchmark.best(task)
        rows.append(
            row(
                task,
                show(number(item, "num_speculative_tokens"), "{:g}"),
                show(number(item, "block_efficiency"), "{:.2f}"),
                _measured_cell(item),
                _quotient_cell(item, "decode_speedup", "decode_quotient"),
                _quotient_cell(item, "predicted_speedup", "predicted_quotient"),
                _quotient_cell(item, "mbsu_bytes", "mbsu_quotient"),
                _with_and_alone(item, "first_token_seconds"),
                _with_and_alone(item, "seconds_per_output_token"),
                _same_text(item),
            )
        )
    note = (
        "Quotients in small print are measured over predicted or over MBSU, and behind the first token over predicted: 1 means "
        "that the clock keeps the promise. Times are with the draft, in small print without."
    )
    caption = (
        f"Measured speed-up at the best K, {pair_words(benchmark)}, {temperature_name(benchmark.temperature)}"
    )
    return Table(columns, tuple(rows), caption, note)


def compact_table(benchmark: Benchmark) -> Table:
    """The same in few columns, for the model card."""
    columns = (
        "Task",
        "Best K",
        "Tokens per target pass",
        "Measured speed-up",
        "Predicted",
        "Measured / predicted",
        "Same greedy text",
    )
    rows = []
    for task in benchmark.tasks:
        item = benchmark.best(task)
        cells: list[str | Cell] = [
            show(number(item, "num_speculative_tokens"), "{:g}"),
            show(number(item, "block_efficiency"), "{:.2f}"),
            _measured_cell(item),
        ]
        cells += [
            times(number(item, "predicted_speedup")),
            show(number(item, "predicted_quotient"), "{:.2f}"),
            _same_text(item),
        ]
        rows.append(row(task, *cells))
    return Table(columns, tuple(rows))


def breakdown_table(benchmark: Benchmark) -> Table | None:
    """Where the time of a speculative run goes, by the runtime's own clock."""
    rows = []
    for item in benchmark.items("breakdown"):
        shares = shares_of(item)
        if shares:
            k = show(number(item, "num_speculative_tokens"), "{:g}")
            rows.append(
                row(
                    pair_of(item).name,
                    k,
                    *(f"{share:.0%}" for share in shares),
                    milliseconds(number(item, "total_seconds")),
                )
            )
    if not rows:
        return None
    return Table(
        ("Weights", "K", *(words.capitalize() for _, _, words, _ in SHARES), "In all"),
        tuple(rows),
        "Where the time goes",
    )


def passes_table(benchmark: Benchmark) -> Table | None:
    """What one pass of each model takes alone: what the prediction rests on."""
    found = [item for item in benchmark.items("latencies") if isinstance(item.get("target_seconds"), dict)]
    widths = sorted(
        {int(width) for item in found for width in item["target_seconds"] if str(width).isdigit()}
    )
    if not found or not widths:
        return None
    shown = widths if len(widths) <= 6 else [*widths[:4], widths[len(widths) // 2 + 1], widths[-1]]
    rows = []
    for item in found:
        passes = [
            number(item, "draft_seconds"),
            *(number(item["target_seconds"], str(width)) for width in shown),
        ]
        rows.append(
            row(
                pair_of(item).name, show(number(item, "prefix_tokens"), "{:,.0f}"), *map(milliseconds, passes)
            )
        )
    note = "Timed alone. A round with K proposals is K passes of the draft and one of the target over K + 1 tokens."
    columns = (
        "Weights",
        "Context, tokens",
        "Draft, 1 token",
        *(f"Target, {width} token{'s' if width > 1 else ''}" for width in shown),
    )
    return Table(columns, tuple(rows), "What one pass takes", note)


def memory_table(benchmark: Benchmark) -> Table | None:
    """Bytes on disk and peak memory with and without the draft."""
    sizes = {
        (str(item.get("role")), str(item.get("weights"))): number(item, "bytes")
        for item in benchmark.items("models")
    }
    peaks = {pair_of(item): item for item in benchmark.items("memory")}
    rows = []
    for pair in dict.fromkeys([*benchmark.pairs, *peaks]):
        alone, both = number(peaks.get(pair), "alone_bytes"), number(peaks.get(pair), "with_draft_bytes")
        disk = [sizes.get(("target", pair.target)), sizes.get(("draft", pair.draft))]
        figures = [*disk, alone, both, both - alone if alone is not None and both is not None else None]
        if any(figure is not None for figure in figures):
            rows.append(
                row(
                    pair.name,
                    *(
                        byte_size(figure).replace("-", "−") if figure is not None else "-"
                        for figure in figures
                    ),
                )
            )
    if not rows:
        return None
    columns = (
        "Weights",
        "Target on disk",
        "Draft on disk",
        "Peak memory alone",
        "Peak with the draft",
        "The draft adds",
    )
    return Table(
        columns, tuple(rows), "Memory", "Peak memory of the process above what it held before loading."
    )


def dynamic_table(benchmark: Benchmark) -> Table:
    """Rounds that end where the draft's confidence falls below a threshold, beside the best fixed K."""
    rows = []
    for item in benchmark.dynamic:
        fixed = benchmark.best(str(item.get("task")), pair_of(item))
        threshold, k = number(item, "confidence_threshold"), number(item, "num_speculative_tokens")
        beside = Cell(
            times(number(fixed, "speedup")), k_name(number(fixed, "num_speculative_tokens")) if fixed else ""
        )
        at = f"{temperature_name(number(item, 'temperature'))}, {pair_of(item).name}"
        rows.append(
            row(
                str(item.get("task")),
                at,
                show(threshold, "{:g}"),
                show(k, "{:g}"),
                _measured_cell(item),
                beside,
            )
        )
    columns = ("Task", "At", "Confidence threshold", "Largest K", "Measured", "Best fixed K")
    return Table(columns, tuple(rows), "Dynamic draft length beside the best fixed K")


def full_table(benchmark: Benchmark) -> Table:
    """Every row of the file, the charts' figures among them."""
    columns = (
        "Part",
        "Task",
        "Weights",
        "At",
        "K",
        "Threshold",
        "At a time",
        "Prompt",
        "Output",
        "AR",
        "Tokens per pass",
        "Measured",
        "Behind first",
        "Predicted",
        "Tokens/s alone",
        "With draft",
        "First token alone",
        "With draft",
    )
    return Table(columns, tuple(_full_row(item) for item in benchmark.rows))


def _measured_cell(item: Figures | None) -> Cell:
    value, around = number(item, "speedup"), interval(item, "speedup")
    if value is None:
        return Cell("-")
    detail = f"{around[0]:.2f} to {around[1]:.2f}" if around else ""
    if item is not None and item.get("lossless") is False:
        return Cell(times(value), ", ".join(part for part in (detail, "not lossless") if part))
    return Cell(times(value), detail, worth(value))


def _quotient_cell(item: Figures | None, key: str, quotient: str) -> Cell:
    ratio = number(item, quotient)
    return Cell(times(number(item, key)), f"quotient {ratio:.2f}" if ratio is not None else "")


def _with_and_alone(item: Figures | None, key: str) -> Cell:
    both, alone = number(item, f"{key}_with_draft"), number(item, f"{key}_alone")
    return Cell(milliseconds(both), f"{milliseconds(alone)} without" if alone is not None else "")


def _same_text(item: Figures | None) -> Cell:
    texts, same = number(item, "texts"), number(item, "same_text")
    if texts is None or same is None:
        return Cell("-")
    return Cell(f"{same:g} of {texts:g}", "", "good" if same == texts else "")


def _full_row(item: Figures) -> Row:
    names = [str(item.get("part", "-")).replace("_", " "), str(item.get("task", "-")), pair_of(item).name]
    shown = [
        ("num_speculative_tokens", "{:g}"),
        ("confidence_threshold", "{:g}"),
        ("concurrency", "{:g}"),
        ("prompt_tokens", "{:.0f}"),
        ("max_new_tokens", "{:g}"),
        ("acceptance_rate", "{:.3f}"),
        ("block_efficiency", "{:.2f}"),
    ]
    gains = [times(number(item, key)) for key in ("decode_speedup", "predicted_speedup")]
    rates = [show(number(item, f"tokens_per_second_{end}"), "{:,.1f}") for end in ("alone", "with_draft")]
    first = [milliseconds(number(item, f"first_token_seconds_{end}")) for end in ("alone", "with_draft")]
    counts = [
        show(number(item, key) if key != "confidence_threshold" else number(item, key) or None, form)
        for key, form in shown
    ]
    return row(
        *names,
        temperature_name(number(item, "temperature")),
        *counts,
        _measured_cell(item),
        *gains,
        *rates,
        *first,
    )
