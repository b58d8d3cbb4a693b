"""The learning rate over the steps of a run, as a factor of its peak. No state: resuming needs nothing."""

from __future__ import annotations

import math


def warmup_steps(steps: int, warmup: float) -> int:
    """Steps of linear warm-up: the share `warmup` of all steps, rounded up."""
    return math.ceil(steps * warmup - 1e-9)


def decay_start(steps: int, decay: float) -> int:
    """Number of steps before the decay begins; the weights after that many steps are the un-decayed ones."""
    return steps - round(steps * decay)


def wsd_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Of a 0-based step: up linearly, 1, then down linearly; it would reach 0 one step after the last."""
    rising = warmup_steps(steps, warmup)
    start = decay_start(steps, decay)
    factor = min(1.0, (step + 1) / rising) if rising else 1.0
    return min(factor, (steps - step) / (steps - start + 1)) if step >= start else factor


def cosine_factor(step: int, steps: int, warmup: float) -> float:
    """Of a 0-based step: up linearly, then half a cosine from 1 down to 0."""
    rising = warmup_steps(steps, warmup)
    if step < rising:
        return (step + 1) / rising
    share = (step - rising + 1) / (steps - rising + 1)
    return 0.5 * (1 + math.cos(math.pi * share))
