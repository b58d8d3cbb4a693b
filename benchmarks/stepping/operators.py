"""Which operators a step of ours on a CPU spends its time in.

Decides how that is measured: by the time that the calling thread computes (its own share of every parallel operator; threads that wait
sleep), so that other work on the machine lengthens it little. Each operator is timed where it is called, the least of three steps counts.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fastdraft.training.allocator import kept_memory
from stepping.contenders import Setting, our_step

ROUNDS = 3
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Of the process that measures: threads that wait must not count as computing."""


class _Timed(TorchDispatchMode):
    """Adds up seconds and calls of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        found = operator(*args, **(kwargs or {}))
        seconds = time.thread_time() - start
        name = f"{operator} {_dimensions(args)}".strip()
        self.seconds[name] += seconds
        self.calls[name] += 1
        return found


def _dimensions(args: Any) -> str:
    """`2d` for a first tensor of two dimensions: tells the loss's softmax from attention's."""
    return next((f"{arg.ndim}d" for arg in args if hasattr(arg, "ndim")), "")


def operators(setting: Setting) -> dict[str, Any]:
    """Seconds of a whole step, and of each operator in it with its share of all operators; the slowest first."""
    with kept_memory(setting.device):
        _, step, batches = our_step(replace(setting, name="ours"))

        def take() -> float:
            start = time.thread_time()
            step.gradients(batches)
            step.update(1.0)
            return time.thread_time() - start

        take()
        plain = min(take() for _ in range(ROUNDS))
        rounds = []
        for _ in range(ROUNDS):
            with _Timed() as timed:
                take()
            rounds.append(timed)
    best = min(rounds, key=lambda timed: sum(timed.seconds.values()))
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
