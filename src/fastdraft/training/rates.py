"""Learning rates and batch sizes for a draft of a given size, where a recipe leaves them open.

Decides the defaults: log-log interpolation between centres at 1 M, 50 M and 150 M parameters. The centres come from published
configurations (SmolLM2-135M, AMD-Llama-135m, OLMo-core's ladder rule, Moonlight for Muon); FastDraft publishes none. What was
chosen is written to the log and the manifest.
"""

from __future__ import annotations

import math
from typing import Literal

Phase = Literal["pretrain", "align"]

_SIZES = (1e6, 50e6, 150e6)
_MATRIX_RATES: dict[tuple[Phase, str], tuple[float, float, float]] = {
    ("pretrain", "adamw"): (3e-3, 2e-3, 1.5e-3),
    ("pretrain", "muon"): (5e-3, 2e-3, 2e-3),
    ("align", "adamw"): (1e-3, 5e-4, 4e-4),
    ("align", "muon"): (1e-3, 5e-4, 5e-4),
}
_EMBEDDING_RATES: dict[tuple[Phase, str], tuple[float, float, float]] = {
    ("pretrain", "muon"): (3e-3, 2e-3, 1.5e-3),
    ("align", "muon"): (1e-3, 3e-4, 3e-4),
}
_BATCH_TOKENS: dict[Phase, tuple[float, float, float]] = {
    "pretrain": (16_384, 262_144, 524_288),
    "align": (16_384, 65_536, 65_536),
}
MIN_STEPS = 200
"""An open batch size is lowered until a run has about this many steps."""


def learning_rate(phase: Phase, optimizer: str, parameters: int) -> float:
    """Peak rate of the matrices (of everything, under AdamW)."""
    return _rounded(_interpolate(_MATRIX_RATES[phase, optimizer], parameters))


def embedding_learning_rate(phase: Phase, optimizer: str, parameters: int) -> float | None:
    """Peak rate of embeddings, head and gains beside Muon; None where one rate serves all."""
    centres = _EMBEDDING_RATES.get((phase, optimizer))
    return None if centres is None else _rounded(_interpolate(centres, parameters))


def batch_tokens(phase: Phase, parameters: int, tokens: int) -> int:
    """Tokens of one optimiser step: a power of two, at most what leaves `MIN_STEPS` steps in `tokens`, at least 2048."""
    wanted = _interpolate(_BATCH_TOKENS[phase], parameters)
    wanted = max(2048.0, min(wanted, tokens / MIN_STEPS * math.sqrt(2)))
    return int(2 ** round(math.log2(wanted)))


def _interpolate(centres: tuple[float, float, float], parameters: int) -> float:
    size = math.log(min(max(parameters, _SIZES[0]), _SIZES[-1]))
    logs = [math.log(value) for value in _SIZES]
    left = 0 if size <= logs[1] else 1
    share = (size - logs[left]) / (logs[left + 1] - logs[left])
    return math.exp((1 - share) * math.log(centres[left]) + share * math.log(centres[left + 1]))


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")
