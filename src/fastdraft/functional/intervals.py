"""How sure a rate is: 95 % bootstrap intervals over prompts, seeded.

Turns of a conversation and answers to one prompt depend on each other, so they are drawn together: the
cluster bootstrap of Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Groups = NDArray[np.int64]  # for each prompt the number of the group with which it is drawn
RESAMPLES = 2000
LEVEL = 0.95


def ratio_interval(
    parts_P: Floats, wholes_P: Floats, seed: int, groups_P: Groups | None = None
) -> tuple[float, float]:
    """The interval of sum(parts) / sum(wholes), given by prompt; NaN for fewer than two groups."""
    return _quantiles(_ratios(_by_group(parts_P, wholes_P, groups_P), seed))


def difference_interval(
    before: tuple[Floats, Floats], after: tuple[Floats, Floats], seed: int, groups_P: Groups | None = None
) -> tuple[float, float]:
    """The interval of ratio(after) - ratio(before), each a (parts_P, wholes_P), paired by prompt."""
    ratios_R = [_ratios(_by_group(*each, groups_P), seed) for each in (after, before)]
    return _quantiles(ratios_R[0] - ratios_R[1])


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


def _ratios(sums_G2: Floats, seed: int) -> Floats:
    """The ratio in each bootstrap sample; none for fewer than two groups."""
    groups = len(sums_G2)
    if groups < 2:
        return np.zeros(0)
    # How often each group is drawn in each sample.
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES)
    sums_R2 = drawn.astype(np.float64) @ sums_G2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums_R2[:, 0] / sums_R2[:, 1])


def _quantiles(values_R: Floats) -> tuple[float, float]:
    values_R = values_R[np.isfinite(values_R)]
    if not len(values_R):
        return math.nan, math.nan
    low, high = np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
