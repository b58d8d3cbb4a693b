"""Whether an accelerator's losses follow the CPU's: the same steps on both, and how far bf16 alone moves them.

Decides the yardstick: the CPU's own difference between fp32 and bf16 over the same steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastdraft.training.batches import packed_batch
from stepping.contenders import Setting, our_step
from stepping.shapes import SHAPES, tokens


def follow(shape: str, device: torch.device, steps: int, length: int) -> dict[str, Any]:
    """Losses of `steps` steps of one row: CPU fp32, CPU bf16 and, where there is another device, that device in bf16."""
    runs = {"cpu_fp32": ("ours_fp32", "cpu"), "cpu_bf16": ("ours", "cpu")}
    if device.type != "cpu":
        runs["device_bf16"] = ("ours", str(device))
    losses = {name: _losses(shape, contender, torch.device(where), steps, length) for name, (contender, where) in runs.items()}
    found: dict[str, Any] = {"shape": shape, "steps": steps, "row": length, "losses": losses}
    noise = _difference(losses["cpu_bf16"], losses["cpu_fp32"])
    found["bf16_noise"] = noise
    if "device_bf16" in losses:
        found["device_from_cpu"] = _difference(losses["device_bf16"], losses["cpu_bf16"])
        found["within_noise"] = found["device_from_cpu"]["mean"] <= 2 * noise["mean"]
    return found


def _losses(shape: str, name: str, device: torch.device, steps: int, length: int) -> list[float]:
    chosen = replace(SHAPES[shape], length=length)
    _, step, _ = our_step(Setting(name, chosen, device, length, 1))
    found = []
    for number in range(steps):
        batch = packed_batch(tokens(chosen, 1, number, learnable=True).numpy())
        found.append(step.gradients([batch])[0])
        step.update(min(1.0, (number + 1) / 20))
    return found


def _difference(a: list[float], b: list[float]) -> dict[str, float]:
    gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return {"mean": sum(gaps) / len(gaps), "largest": max(gaps), "last": gaps[-1]}
