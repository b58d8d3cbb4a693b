"""Everything that a training run needs to go on exactly where it stopped, in `FOLDER/steps/step-00000100`.

Weights, optimiser state and random state are safetensors (no pickle), the counters `state.json`. Process 0
writes; folders appear whole or not at all, and a new one takes the place of the one before.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdraft.run_folder import atomic_folder, read_json, write_json

_WEIGHTS, _OPTIMIZER, _RANDOM = "model.safetensors", "optimizer.safetensors", "random.safetensors"
_STATE = "state.json"


@dataclass
class TrainingState:
    """The counters of a run."""

    step: int = 0  # finished, skipped ones included
    tokens: int = 0  # inputs so far, without padding
    trained_tokens: int = 0  # that had a loss
    seconds: float = 0.0  # spent in steps
    skipped: int = 0  # steps left out for a loss or gradient that was not finite
    skipped_in_a_row: int = 0
    best_step: int = -1  # of the best validation score; -1 before the first
    best_score: float | None = None

    def add(self, tokens: int, trained_tokens: int, seconds: float, finite: bool) -> None:
        """Counts a step."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.trained_tokens += trained_tokens if finite else 0
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1

    def summary(self) -> dict[str, Any]:
        """For the stage's manifest."""
        rate, seconds = round(self.tokens / max(self.seconds, 1e-9), 1), round(self.seconds, 1)
        found = {"tokens": self.tokens, "steps": self.step, "skipped_steps": self.skipped}
        return {**found, "tokens_per_second": rate, "seconds": seconds}


class Checkpoints:
    """The resume checkpoint of one stage in `folder/steps`, and beside it the best weights so far."""

    def __init__(self, folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self.folder, self._model, self._optimizers, self.saved_step = folder / "steps", model, optimizers, -1
        device = next(model.parameters()).device.type  # who holds random state: the CPU and the accelerator
        accelerator = {} if device == "cpu" else {device: torch.get_device_module(device)}
        self._random: dict[str, Any] = {"cpu": torch, **accelerator}

    def save(self, state: TrainingState) -> None:
        """Writes weights, optimiser state, random state and counters, then lets what is older go."""
        with atomic_folder(self.folder / f"step-{state.step:09d}") as folder:
            _write(dict(self._model.named_parameters()), folder / _WEIGHTS)
            _write(optimizer_tensors(self._model, self._optimizers), folder / _OPTIMIZER)
            random = {name: module.get_rng_state() for name, module in self._random.items()}
            _write(random, folder / _RANDOM)
            write_json(folder / _STATE, asdict(state))
        self.saved_step = state.step
        kept = (f"step-{state.step:09d}", f"best-{state.best_step:09d}")
        for folder in self.folder.iterdir():
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def save_best(self, step: int) -> None:
        """Keeps the weights as the best so far; older ones stay until `save`: the checkpoint names them."""
        with atomic_folder(self.folder / f"best-{step:09d}") as folder:
            _write(dict(self._model.named_parameters()), folder / _WEIGHTS)

    def load_best(self, step: int) -> None:
        _copy_weights(self._model, self.folder / f"best-{step:09d}" / _WEIGHTS)

    def load_latest(self) -> TrainingState:
        """Restores the newest checkpoint; a fresh state when there is none."""
        found = sorted(self.folder.glob("step-*"))
        if not found:
            return TrainingState()
        _copy_weights(self._model, found[-1] / _WEIGHTS)
        restore_optimizers(self._model, self._optimizers, load_file(found[-1] / _OPTIMIZER))
        for name, value in load_file(found[-1] / _RANDOM).items():
            if name in self._random:  # else the run moved to another kind of device
                self._random[name].set_rng_state(value)
        state = TrainingState(**read_json(found[-1] / _STATE))
        self.saved_step = state.step
        return state

    def discard(self) -> None:
        """Removes all of them, once the stage is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file(
        {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}, path
    )


@torch.no_grad()
def _copy_weights(model: nn.Module, path: Path) -> None:
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every tensor of the optimisers' state as `NUMBER/PARAMETER/KEY`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{number}/{names[parameter]}/{key}": value
        for number, optimizer in enumerate(optimizers)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def restore_optimizers(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Puts what `optimizer_tensors` gave back in place, bit for bit."""
    parameters = dict(model.named_parameters())
    for optimizer in optimizers:
        optimizer.state.clear()
    for name, value in tensors.items():
        number, parameter_name, key = name.split("/")
        optimizer, parameter = optimizers[int(number)], parameters[parameter_name]
        # AdamW's step counts stay on the CPU unless its kernels read them.
        on_cpu = key == "step" and not optimizer.defaults.get("fused")
        optimizer.state[parameter][key] = value.to("cpu" if on_cpu else parameter.device)
