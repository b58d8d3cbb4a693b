"""Whether an accelerator's losses follow the CPU's: the same steps on both, and how far bf16 moves them.

The yardstick is the CPU's own difference between fp32 and bf16: the device's losses may differ from the CPU's
in fp32 by twice that in the mean, because its additions are in another order and every step carries the first
rounding on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from fastdraft.training.batches import packed_batch
from stepping.contenders import SHAPES, Setting, Shape, our_step

WITHIN = 2.0  # times the noise
EVERY = 10
WARM_UP = 20  # steps until the rate is at its peak


def follow(
    shape: str, device: torch.device, steps: int, length: int, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Losses of `steps` steps of one row of `length` tokens: CPU fp32, CPU bf16, device bf16, in turn.

    `keep` is called every 10 steps, and at the end, with what is known by then. Where `device` is the CPU
    itself (a dry run), what runs on an accelerator runs there.
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
    """How far bf16 moves the CPU's losses, how far the device's are from both, whether within the noise."""

    def between(a: str, b: str) -> dict[str, float]:
        gaps = [abs(x - y) for x, y in zip(losses[a], losses[b], strict=True)]
        return {"mean": sum(gaps) / len(gaps), "largest": max(gaps), "last": gaps[-1]}

    noise, from_fp32 = between("cpu_bf16", "cpu_fp32"), between("device_bf16", "cpu_fp32")
    return {
        "bf16_noise": noise,
        "device_from_cpu_fp32": from_fp32,
        "device_from_cpu_bf16": between("device_bf16", "cpu_bf16"),
        "allowed_times_noise": WITHIN,
        "within_noise": from_fp32["mean"] <= WITHIN * noise["mean"],
    }


def _losses(shape: Shape, name: str, device: torch.device, autocast: torch.dtype | None) -> Iterator[float]:
    """The loss of one step after another, all from the same first weights and the same rows."""
    _, step, _ = our_step(Setting(name, shape, device, shape.length, 1))
    step.autocast = autocast  # bf16 also where a CPU has to emulate it: what is compared are roundings
    number = 0
    while True:
        yield step.gradients([packed_batch(_walk(shape, number).numpy())])[0]
        number += 1
        step.update(min(1.0, number / WARM_UP))


def _walk(shape: Shape, step: int) -> torch.Tensor:
    """A row [1, length + 1]: a random walk over 256 ids that a model learns quickly."""
    follows = torch.randint(0, 256, (256, 4), generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(1000 + step)
    walk = [torch.randint(0, 256, (1,), generator=generator)]
    for choice in torch.randint(0, 4, (shape.length,), generator=generator):
        walk.append(follows[walk[-1], choice])
    return torch.stack(walk, dim=1)
