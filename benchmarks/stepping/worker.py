"""A process for each contender, since the allocator's settings, compiled code and peak memory belong to a process.

It takes steps only in its turn: the parent writes a number of steps, the worker answers with a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdraft.training.fast_decoder import kept_memory
from fastdraft.training.step import autocast_dtype, default_micro_batch_tokens
from stepping.contenders import Setting, drive, our_step
from stepping.measure import operators, seconds_per_token, timed
from stepping.shapes import SHAPES, build_model

MARK = "@turn "


class Contender:
    """The parent's end: starts the process, gives turns, stops it."""

    def __init__(
        self, script: Path, name: str, options: dict[str, Any], environment: dict[str, str] | None = None
    ) -> None:
        command = [sys.executable, str(script), "--worker", json.dumps({"name": name, **options})]
        chosen = {**os.environ, **(environment or {})}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=chosen
        )

    def turn(self, steps: int) -> dict[str, Any] | None:
        """What the worker says after so many steps; None when it is gone."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except OSError:
            return None
        for line in self.process.stdout:
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line[len(MARK) :])
                return found
        return None

    def stop(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def main(options: dict[str, Any]) -> None:
    """The worker's end."""
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    device = torch.device(options["device"])
    setting = Setting(
        options["name"],
        SHAPES[options["shape"]],
        device,
        options["batch"],
        options["rows"],
        options["backend"],
    )
    found: dict[str, Any] = {}
    if setting.name == "matmuls":
        _ceiling(setting)
    elif setting.name == "parts":
        _parts(setting)
    elif setting.name == "operators":
        while sys.stdin.readline().strip():
            _say(**operators(setting))
    else:
        drive(setting, _turns(device, found), found)


def _say(**found: Any) -> None:
    print(MARK + json.dumps(found), flush=True)


def _turns(device: torch.device, found: dict[str, Any]) -> Any:
    left, steps, start = 0, 0, 0.0

    def wait() -> bool:
        nonlocal left, steps, start
        if left == 0:
            if steps:
                if device.type != "cpu":
                    torch.accelerator.synchronize()
                _say(seconds=(time.perf_counter() - start) / steps, memory_gb=peak_memory(device), **found)
            line = sys.stdin.readline()
            if not line.strip():
                return False
            left = steps = int(line)
            start = time.perf_counter()
        left -= 1
        return True

    return wait


def _ceiling(setting: Setting) -> None:
    model, rows = build_model(setting.shape), (setting.rows * setting.shape.length) or None
    dtype = autocast_dtype("auto", setting.device) or torch.float32
    rows = min(rows or default_micro_batch_tokens(setting.device), setting.batch)
    while sys.stdin.readline().strip():
        _say(**seconds_per_token(model, setting.shape.vocab, rows, dtype, setting.device))


def _parts(setting: Setting) -> None:
    """Seconds per optimiser step of each part of ours by itself."""
    plain = replace(setting, name="ours")
    _, step, batches = our_step(plain)
    count, batch, device = len(batches), batches[0].to(setting.device), setting.device
    step.gradients(batches)
    hidden_ND = torch.randn(batch.num_trained, setting.shape.hidden, device=device, requires_grad=True)

    def decoder(backward: bool) -> None:
        with (
            torch.set_grad_enabled(backward),
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=step.autocast is not None),
        ):
            hidden = step.decoder(**batch.inputs, use_cache=False).last_hidden_state
        if backward:
            torch.autograd.backward(hidden, torch.ones_like(hidden))

    def loss() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=step.autocast is not None):
            torch.autograd.backward(step.objective.loss(hidden_ND, step.head, batch))

    def update() -> None:
        for optimizer in step.optimizers:
            optimizer.step()

    works: dict[str, tuple[Any, int]] = {
        "decoder_forward": (lambda: decoder(False), count),
        "decoder_forward_and_backward": (lambda: decoder(True), count),
        "loss_with_its_gradients": (loss, count),
        "clip": (lambda: torch.nn.utils.clip_grad_norm_(step.parameters, 1.0), 1),
        "update": (update, 1),
    }
    with kept_memory(device):
        while sys.stdin.readline().strip():
            _say(**{name: timed(work, 1, device, 3) * times for name, (work, times) in works.items()})


def peak_memory(device: torch.device) -> float | None:
    """GB at most so far: of the device for CUDA, else of the process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return None
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    )
