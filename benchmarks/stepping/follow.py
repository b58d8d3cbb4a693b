"""Whether an accelerator's losses follow the CPU's: the same steps on both, and how far bf16 alone moves them.

The yardstick is the CPU's own difference between fp32 and bf16: the device's losses may differ from the CPU's in fp32 by twice that in
the mean, because its additions are in another order and every step carries the first rounding on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from fastdraft.training.batches import packed_batch
from stepping.contenders import Setting, our_step
from stepping.shapes import SHAPES, Shape, tokens

WITHIN = 2.0
"""Times the noise."""
EVERY = 10
WARM_UP = 20
"""Steps until the rate is at its peak."""


def follow(
    shape: str, device: torch.device, steps: int, length: int, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Losses of `steps` steps of one row of `length` tokens: CPU fp32, CPU bf16, device bf16, a step each in turn.

    `keep` is called every 10 steps, and at the end, with what is known by then. Where `device` is the CPU itself (a dry run), what
    runs on an accelerator runs there.
    """
    chosen, cpu = replace(SHAPES[shape], length=length), torch.device("cpu")
    runs = {
        "cpu_fp32": _losses(chosen, "ours_fp32", cpu, None),
        "cpu_bf16": _losses(chosen, "ours", cpu, torch.bfloat16),
        "device_bf16": _losses(chosen, "ours_modules", device, torch.bfloat16),
    }
    losses: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(1, steps + 1):
        for name, run in runs.items():
            losses[name].append(next(run))
        if step % EVERY == 0 or step == steps:
            about = {"shape": shape, "row": length, "steps_wanted": steps, "steps": step}
            keep({**about, **compare(losses), "losses": losses})


def compare(losses: dict[str, list[float]]) -> dict[str, Any]:
    """How far bf16 moves the CPU's losses, how far the device's are from both, and whether that is within the noise."""
    noise = _difference(losses["cpu_bf16"], losses["cpu_fp32"])
    from_fp32 = _difference(losses["device_bf16"], losses["cpu_fp32"])
    return {
        "bf16_noise": noise,
        "device_from_cpu_fp32": from_fp32,
        "device_from_cpu_bf16": _difference(losses["device_bf16"], losses["cpu_bf16"]),
        "allowed_times_noise": WITHIN,
        "within_noise": from_fp32["mean"] <= WITHIN * noise["mean"],
    }


def _difference(a: list[float], b: list[float]) -> dict[str, float]:
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return {"mean": sum(gaps) / len(gaps), "largest": max(gaps), "last": gaps[-1]}


def _losses(shape: Shape, name: str, device: torch.device, autocast: torch.dtype | None) -> Iterator[float]:
    """The loss of one step after another, all from the same first weights and the same rows."""
    _, step, _ = our_step(Setting(name, shape, device, shape.length, 1))
    step.autocast = autocast  # bf16 also where a CPU has to emulate it: what is compared are roundings
    number = 0
    while True:
        batch = packed_batch(tokens(shape, 1, number, learnable=True).numpy())
        loss = step.gradients([batch])[0]
        step.update(min(1.0, (number + 1) / WARM_UP))
        number += 1
        yield loss
