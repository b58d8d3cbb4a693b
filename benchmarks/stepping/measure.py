"""What a training step is held against: the device's own matrix products; and in which operators a step on a CPU spends its time."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdraft.functional.losses import default_chunk
from fastdraft.training.fast_decoder import kept_memory
from stepping.contenders import Setting, our_step

# Dense bf16 products, by a part of the device's name, as its maker promises.
DATA_SHEET_TFLOPS = {
    "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.0,
}  # fmt: skip
ROUNDS = 3
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Of the process that profiles: threads that wait must not count as computing."""


def data_sheet(name: str) -> float | None:
    """Operations per second that the maker promises."""
    return next((value * 1e12 for part, value in DATA_SHEET_TFLOPS.items() if part in name), None)


def seconds_per_token(
    model: nn.Module, vocab: int, rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Time that the products of a token's training take by themselves: `forward`, and `all` three of every layer.

    Timed one by one in the layout of a step, with as many rows as a micro-batch (for the head: as a chunk of the loss) has.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head_rows = min(rows, 2048 if device.type == "cpu" else default_chunk(device.type, vocab))
    sizes = [
        (head_rows if one.out_features == vocab else rows, one.in_features, one.out_features)
        for one in linear
    ]
    totals = {"forward": 0.0, "all": 0.0}
    for n, d, o in sorted(set(sizes)):
        x, weight, grad = (torch.randn(*shape, device=device).to(dtype) for shape in ((n, d), (o, d), (n, o)))
        y, grad_x, grad_weight = (
            torch.empty(*s, device=device, dtype=dtype) for s in ((n, o), (n, d), (o, d))
        )
        repeats = max(1, int(2e9 // (2 * math.prod((n, d, o))))) if device.type == "cpu" else 20
        products = ((x, weight.t(), y), (grad, weight, grad_x), (grad.t(), x, grad_weight))
        forward, *back = (
            timed(lambda p=p: torch.mm(p[0], p[1], out=p[2]), repeats, device) for p in products
        )
        totals["forward"] += sizes.count((n, d, o)) * forward / n
        totals["all"] += sizes.count((n, d, o)) * (forward + sum(back)) / n
    return totals


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


class _Timed(TorchDispatchMode):
    """Adds up seconds and calls of every operator: of the calling thread, so that other work on the machine lengthens them little."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        found = operator(*args, **(kwargs or {}))
        seconds = time.thread_time() - start
        # `2d` for a first tensor of two dimensions tells the loss's softmax from attention's.
        name = f"{operator} {next((f'{arg.ndim}d' for arg in args if hasattr(arg, 'ndim')), '')}".strip()
        self.seconds[name] += seconds
        self.calls[name] += 1
        return found


def operators(setting: Setting) -> dict[str, Any]:
    """Seconds of a whole step, and of each operator in it with its share of all operators, the slowest first; least of three steps."""
    with kept_memory(setting.device):
        _, step, batches = our_step(replace(setting, name="ours"))

        def take() -> float:
            start = time.thread_time()
            step.gradients(batches)
            step.update(1.0)
            return time.thread_time() - start

        take()
        plain, rounds = min(take() for _ in range(ROUNDS)), []
        for _ in range(ROUNDS):
            with _Timed() as clock:
                take()
            rounds.append(clock)
    best = min(rounds, key=lambda clock: sum(clock.seconds.values()))
    whole = sum(best.seconds.values())
    rows = [
        {
            "operator": name,
            "seconds": round(seconds, 5),
            "share": round(seconds / whole, 4),
            "calls": best.calls[name],
        }
        for name, seconds in sorted(best.seconds.items(), key=lambda item: -item[1])
    ]
    return {"step_seconds": plain, "operators_seconds": whole, "operators": rows}
