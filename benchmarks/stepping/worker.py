"""A process for each contender: allocator settings, compiled code and peak memory belong to a process.

It takes steps only in its turn: the parent writes a number of steps, the worker answers with a line of JSON.
The worker `matmuls` gives the seconds of a token's own matrix products, which a step is held against.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import synchronize
from torch import nn

from fastdraft.functional.losses import default_chunk
from fastdraft.training.step import autocast_dtype, default_micro_batch_tokens
from stepping.contenders import SHAPES, Setting, drive

MARK = "@turn "


class Contender:
    """The parent's end: starts the process, gives turns, stops it."""

    def __init__(self, script: Path, name: str, options: dict[str, Any]) -> None:
        command = [sys.executable, str(script), "--worker", json.dumps({"name": name, **options})]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)

    def turn(self, steps: int) -> dict[str, Any] | None:
        """What the worker says after so many steps; None when it is gone."""
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except OSError:
            return None
        said = next((line for line in self.process.stdout if line.startswith(MARK)), None)
        return said and json.loads(said[len(MARK) :])

    def stop(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def main(options: dict[str, Any]) -> None:
    """The worker's end."""
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    name, shape, device = options["name"], SHAPES[options["shape"]], torch.device(options["device"])
    setting = Setting(name, shape, device, options["batch"], options["rows"], options["backend"])
    if name == "matmuls":
        model = shape.build()
        while sys.stdin.readline().strip():
            print(MARK + json.dumps(seconds_per_token(model, setting)), flush=True)
        return
    found: dict[str, Any] = {}
    left, steps, start = 0, 0, 0.0

    def wait() -> bool:
        nonlocal left, steps, start
        if left == 0:
            if steps:
                synchronize(device)
                taken = {"seconds": (time.perf_counter() - start) / steps, "memory_gb": peak_memory(device)}
                print(MARK + json.dumps({**taken, **found}), flush=True)
            left = steps = int(sys.stdin.readline().strip() or 0)
            start = time.perf_counter()
        left -= 1
        return steps > 0

    drive(setting, wait, found)


def seconds_per_token(model: nn.Module, setting: Setting) -> dict[str, float]:
    """Seconds of the products of a token's training by themselves: `forward`, and `all` three of a layer.

    Timed one by one in the layout of a step, with as many rows as a micro-batch (for the head: as a chunk of
    the loss) has.
    """
    device, shape = setting.device, setting.shape
    dtype = autocast_dtype("auto", device) or torch.float32
    rows = min(setting.rows * shape.length or default_micro_batch_tokens(device), setting.batch)
    head_rows = min(rows, 2048 if device.type == "cpu" else default_chunk(device.type, shape.vocab))
    layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
    is_head = [part.out_features == shape.vocab for part in layers]
    sizes = [
        (head_rows if head else rows, part.in_features, part.out_features)
        for part, head in zip(layers, is_head, strict=True)
    ]
    totals = {"forward": 0.0, "all": 0.0}
    for n, d, o in sorted(set(sizes)):
        x, weight, grad = (torch.randn(*size, device=device).to(dtype) for size in ((n, d), (o, d), (n, o)))
        repeats = max(1, int(1e9 // math.prod((n, d, o)))) if device.type == "cpu" else 20
        pairs = ((x, weight.t()), (grad, weight), (grad.t(), x))
        outs = [a @ b for a, b in pairs]
        forward, *back = (
            timed(lambda p=p, out=out: torch.mm(*p, out=out), repeats, device)
            for p, out in zip(pairs, outs, strict=True)
        )
        totals["forward"] += sizes.count((n, d, o)) * forward / n
        totals["all"] += sizes.count((n, d, o)) * (forward + sum(back)) / n
    return totals


def timed(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median seconds of one call, over five rounds of `repeats` calls after a round that is not counted."""
    found = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        found.append((time.perf_counter() - start) / repeats)
    return statistics.median(found[1:])


def peak_memory(device: torch.device) -> float | None:
    """GB at most so far: of the device for CUDA, else of the process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
