"""How fast a device multiplies the matrices of a model: the ceiling that a training step is held against.

Decides what the ceiling is: every product that one token's training needs, those of the forward pass and both of the backward pass, in
the layout in which a step has them, timed one by one with as many rows as a micro-batch (for the head: as a chunk of the loss) has; the
whole time against the whole number of operations. On paper there is the device's data sheet.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastdraft.functional.losses import default_chunk

DATA_SHEET_TFLOPS = {
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "4090": 165.0,
}
"""Dense bf16 products, by a part of the device's name."""


def data_sheet(name: str) -> float | None:
    """Operations per second that the maker promises."""
    return next((value * 1e12 for part, value in DATA_SHEET_TFLOPS.items() if part in name), None)


def seconds_per_token(
    model: nn.Module, vocab: int, rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Time that the products of a token's training take by themselves: `forward`, and `all` three of every layer."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head_rows = min(rows, 2048 if device.type == "cpu" else default_chunk(device.type, vocab))
    sizes = [
        (head_rows if module.out_features == vocab else rows, module.in_features, module.out_features)
        for module in linear
    ]
    totals = {"forward": 0.0, "all": 0.0}
    for size in sorted(set(sizes)):
        forward, both = _time_layer(size, dtype, device)
        totals["forward"] += sizes.count(size) * forward / size[0]
        totals["all"] += sizes.count(size) * (forward + both) / size[0]
    return totals


def _time_layer(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Seconds of the forward product, and of the two of the backward pass."""
    n, d, o = size
    x, weight, grad = (torch.randn(*shape, device=device).to(dtype) for shape in ((n, d), (o, d), (n, o)))
    y, grad_x, grad_weight = (
        torch.empty(*shape, device=device, dtype=dtype) for shape in ((n, o), (n, d), (o, d))
    )
    repeats = max(1, int(2e9 // (2 * math.prod(size)))) if device.type == "cpu" else 20
    forward = timed(lambda: torch.mm(x, weight.t(), out=y), repeats, device)
    into = timed(lambda: torch.mm(grad, weight, out=grad_x), repeats, device)
    return forward, into + timed(lambda: torch.mm(grad.t(), x, out=grad_weight), repeats, device)


def timed(work: Callable[[], Any], repeats: int, device: torch.device, rounds: int = 5) -> float:
    """Median seconds of one call, over rounds of `repeats` calls after a round that is not counted."""
    found = []
    for number in range(rounds + 1):
        if device.type != "cpu":
            torch.accelerator.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        if number:
            found.append((time.perf_counter() - start) / repeats)
    return sorted(found)[len(found) // 2]
