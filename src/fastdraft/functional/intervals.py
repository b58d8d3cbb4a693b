"""How sure a rate is: 95 % bootstrap intervals over prompts.

Decides that prompts are what is drawn again (tokens of one text depend on each other), that a rate is the ratio of two
sums (never a mean of ratios), and that two checkpoints are compared on the same prompts drawn together. Seeded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95


def resample_weights(num_prompts: int, seed: int, resamples: int = RESAMPLES) -> Floats:
    """How often each prompt is drawn in each bootstrap sample, [resamples, num_prompts]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=resamples).astype(np.float64)


def ratio_interval(parts_P: Floats, wholes_P: Floats, seed: int) -> tuple[float, float]:
    """The interval of sum(parts) / sum(wholes); NaN for fewer than two prompts.

    Args:
        parts_P: One number for each prompt, for example accepted tokens.
        wholes_P: For example proposed tokens.
        seed: Of the resampling.
    """
    if len(parts_P) < 2:
        return float("nan"), float("nan")
    return _quantiles(_ratios(resample_weights(len(parts_P), seed), parts_P, wholes_P))


def difference_interval(before: tuple[Floats, Floats], after: tuple[Floats, Floats], seed: int) -> tuple[float, float]:
    """The paired interval of ratio(after) - ratio(before), each a (parts_P, wholes_P) over the same prompts in the same order."""
    if len(before[0]) < 2:
        return float("nan"), float("nan")
    weights = resample_weights(len(before[0]), seed)
    return _quantiles(_ratios(weights, *after) - _ratios(weights, *before))


def _ratios(weights_RP: Floats, parts_P: Floats, wholes_P: Floats) -> Floats:
    sums_R2 = weights_RP @ np.stack([parts_P, wholes_P], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios: Floats = sums_R2[:, 0] / sums_R2[:, 1]
    return ratios


def _quantiles(values_R: Floats) -> tuple[float, float]:
    values_R = values_R[np.isfinite(values_R)]
    if not len(values_R):
        return float("nan"), float("nan")
    low, high = np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
