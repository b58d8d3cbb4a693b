"""What every figure means, how it is written, and the paper's own results to stand beside."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from fastdraft.console import format_count
from fastdraft.evaluation.results import CHECKPOINT_LABELS, TASK_ORDER

TEMPLATES = resources.files("fastdraft.reporting").joinpath("templates")
_LINES = TEMPLATES.joinpath("definitions.txt").read_text(encoding="utf-8").splitlines()
DEFINITIONS: dict[str, str] = dict(line.split(": ", 1) for line in _LINES)  # in reading order
# Our task -> the set on which the paper measured it.
PAPER_SETS = dict(zip(TASK_ORDER, ("HumanEval", "CNN-DM", "TinyStories", "Dolly"), strict=True))
# Acceptance rates at K = 3 and temperature 0.6 (FastDraft, arXiv 2411.11055): pair -> task -> PT, CP, FT.
_PHI = (0.229, 0.561, 0.562), (0.311, 0.304, 0.369), (0.277, 0.287, 0.306), (0.245, 0.226, 0.370)
_LLAMA = (0.248, 0.606, 0.649), (0.280, 0.280, 0.307), (0.227, 0.235, 0.266), (0.247, 0.273, 0.334)
PAPER_RATES = {
    pair: dict(zip(TASK_ORDER, rates, strict=True))
    for pair, rates in (("Phi-3-mini 50M", _PHI), ("Llama-3.1-8B 150M", _LLAMA))
}


def label(checkpoint: str) -> str:
    """`align` -> `FT`, as in the paper's tables."""
    return CHECKPOINT_LABELS.get(checkpoint, checkpoint)


def k_is(k: float | None) -> str:
    """`K = 3`, kept on one line."""
    return f"K\u00a0=\u00a0{k:g}" if k is not None else "K unknown"


def at_temperature(temperature: float) -> str:
    """0 -> `greedy`, 0.6 -> `temperature 0.6`."""
    return f"temperature {temperature:g}" if temperature else "greedy"


def count(value: float | None) -> str:
    """`9,999`, then three digits: `1.05M`."""
    return "-" if value is None else f"{value:,.0f}" if value < 10_000 else format_count(value)


def show(value: float | None, form: str = "{:.3f}") -> str:
    """A figure in this form, `-` when there is none."""
    return "-" if value is None else form.format(value)


def times(value: float | None) -> str:
    """`1.62×`."""
    return show(value, "{:.2f}×")


def percent(share: float | None, digits: int = 0) -> str:
    """`18 %`, kept on one line."""
    return "-" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def stretch(first: int) -> str:
    """0 -> `0–512`, 1024 -> `1k–2k`."""
    ends = (first, first * 2 or 512)
    return "–".join(f"{end // 1024}k" if end and end % 1024 == 0 else str(end) for end in ends)


def listing(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def duration(seconds: float | None) -> str:
    """`0.412 ms`, `19.3 ms`, `183 ms`, `2.41 s`."""
    return "-" if seconds is None else _scaled(seconds, ((1, "s"), (1e-3, "ms")))


def byte_size(count: float | None) -> str:
    """`5.20 MB`, `692 MB`, `1.31 GB` (decimal)."""
    return "-" if count is None else _scaled(count, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Three digits in the largest unit that the value fills, else in the last."""
    size, unit = next((pair for pair in units if abs(value) >= pair[0] * 0.9995), units[-1])
    shown = abs(value) / size
    digits = 0 if shown >= 99.95 else 1 if shown >= 9.995 else 2 if shown >= 0.9995 else 3
    return f"{'−' if value < 0 else ''}{shown:.{digits}f} {unit}"
