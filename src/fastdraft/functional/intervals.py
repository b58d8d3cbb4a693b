"""How sure a rate is: 95 % bootstrap intervals over prompts, seeded.

Prompts are what is drawn again, turns of a conversation and answers to one prompt together: they depend on each other. The
cluster bootstrap of Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Groups = NDArray[np.int64]
"""For each prompt the number of the group with which it is drawn."""
RESAMPLES = 2000
LEVEL = 0.95


def resample_weights(num_prompts: int, seed: int, resamples: int = RESAMPLES) -> Floats:
    """How often each prompt is drawn in each bootstrap sample, [resamples, num_prompts]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=resamples).astype(
        np.float64
    )


def ratio_interval(
    parts_P: Floats, wholes_P: Floats, seed: int, groups_P: Groups | None = None
) -> tuple[float, float]:
    """The interval of sum(parts) / sum(wholes), one of each for each prompt; NaN for fewer than two groups."""
    sums_G2 = _by_group(parts_P, wholes_P, groups_P)
    if len(sums_G2) < 2:
        return float("nan"), float("nan")
    return _quantiles(_ratios(resample_weights(len(sums_G2), seed), sums_G2))


def difference_interval(
    before: tuple[Floats, Floats], after: tuple[Floats, Floats], seed: int, groups_P: Groups | None = None
) -> tuple[float, float]:
    """The paired interval of ratio(after) - ratio(before), each a (parts_P, wholes_P) over the same prompts in the same order."""
    before_G2, after_G2 = _by_group(*before, groups_P), _by_group(*after, groups_P)
    if len(before_G2) < 2:
        return float("nan"), float("nan")
    weights = resample_weights(len(before_G2), seed)
    return _quantiles(_ratios(weights, after_G2) - _ratios(weights, before_G2))


def group_numbers(names: Iterable[Hashable]) -> Groups:
    """Numbers for names, equal ones for equal names, in the order in which names first appear."""
    found: dict[Hashable, int] = {}
    return np.array([found.setdefault(name, len(found)) for name in names], dtype=np.int64)


def num_groups(groups_P: Groups | None, num_prompts: int) -> int:
    """How many draws of a bootstrap there are among `num_prompts` prompts."""
    return int(num_prompts) if groups_P is None else len(set(groups_P.tolist()))


def _by_group(parts_P: Floats, wholes_P: Floats, groups_P: Groups | None) -> Floats:
    """Both summed over each group, [groups, 2]; groups in the order in which they first appear."""
    both_P2 = np.stack([parts_P, wholes_P], axis=1)
    if groups_P is None:
        return both_P2
    numbers_P = group_numbers(groups_P.tolist())
    sums_G2 = np.zeros((int(numbers_P.max(initial=-1)) + 1, 2))
    np.add.at(sums_G2, numbers_P, both_P2)
    return sums_G2


def _ratios(weights_RG: Floats, sums_G2: Floats) -> Floats:
    sums_R2 = weights_RG @ sums_G2
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios: Floats = sums_R2[:, 0] / sums_R2[:, 1]
    return ratios


def _quantiles(values_R: Floats) -> tuple[float, float]:
    values_R = values_R[np.isfinite(values_R)]
    if not len(values_R):
        return float("nan"), float("nan")
    low, high = np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
