"""Everything that a training run needs to go on exactly where it stopped, in `FOLDER/steps/step-00000100`.

Weights, optimiser state and random state are safetensors (no pickle), the counters `state.json`. Process 0
writes; folders appear whole or not at all; the last two are kept, and the newest that can be read wins.
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

from fastdraft.console import Console
from fastdraft.errors import FastDraftError
from fastdraft.run_folder import atomic_folder, read_json, write_json

FOLDER, KEEP = "steps", 2
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
    micro_batch_limit: int = 0  # padded tokens of one micro-batch since memory ran out; 0: it never did
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
        return {
            "tokens": self.tokens,
            "steps": self.step,
            "skipped_steps": self.skipped,
            "micro_batch_limit": self.micro_batch_limit or None,
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1),
            "seconds": round(self.seconds, 1),
        }


class Checkpoints:
    """The resume checkpoints of one stage, in `folder/steps`."""

    def __init__(
        self, folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], console: Console
    ) -> None:
        self.folder, self._model, self._optimizers = folder / FOLDER, model, optimizers
        self._console, self._random = console, _random_modules(next(model.parameters()).device)
        self.saved_step = -1

    def save(self, state: TrainingState) -> None:
        """Writes weights, optimiser state, random state and counters, then lets older folders go."""
        with atomic_folder(self.folder / f"step-{state.step:09d}") as folder:
            _write(dict(self._model.named_parameters()), folder / _WEIGHTS)
            _write(optimizer_tensors(self._model, self._optimizers), folder / _OPTIMIZER)
            random = {name: module.get_rng_state() for name, module in self._random.items()}
            _write(random, folder / _RANDOM)
            write_json(folder / _STATE, asdict(state))
        self.saved_step = state.step
        self._prune(state)

    def save_best(self, step: int) -> None:
        """Keeps the weights as the best so far; older ones stay until no kept checkpoint speaks of them."""
        with atomic_folder(self.folder / f"best-{step:09d}") as folder:
            _write(dict(self._model.named_parameters()), folder / _WEIGHTS)

    def load_best(self, step: int) -> None:
        copy_weights(self._model, load_file(self.folder / f"best-{step:09d}" / _WEIGHTS))

    def load_latest(self) -> TrainingState:
        """Restores the newest checkpoint that can be read; a fresh state when there is none at all."""
        found = sorted(self.folder.glob("step-*"), reverse=True)
        for folder in found:
            try:
                state = TrainingState(**read_json(folder / _STATE))
                copy_weights(self._model, load_file(folder / _WEIGHTS))
                restore_optimizers(self._model, self._optimizers, load_file(folder / _OPTIMIZER))
                for name, value in load_file(folder / _RANDOM).items():
                    if name in self._random:  # else the run moved to another kind of device
                        self._random[name].set_rng_state(value)
            except Exception as error:  # whatever a torn file does to its reader
                self._console.warn(f"{folder}: unreadable ({error}); trying the one before")
                continue
            self.saved_step = state.step
            return state
        if found:
            fix = f"begin the stage anew with --redo {self.folder.parent.name}"
            raise FastDraftError(f"{self.folder}: every checkpoint is unreadable", fix)
        return TrainingState()

    def discard(self) -> None:
        """Removes all of them, once the stage is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prune(self, state: TrainingState) -> None:
        steps = sorted(self.folder.glob("step-*"))
        for folder in steps[:-KEEP]:
            shutil.rmtree(folder, ignore_errors=True)
        needed = {state.best_step, *(read_json(folder / _STATE)["best_step"] for folder in steps[-KEEP:])}
        for folder in self.folder.glob("best-*"):
            if int(folder.name.removeprefix("best-")) not in needed:
                shutil.rmtree(folder, ignore_errors=True)


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    on_cpu = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in on_cpu.items()}, path)


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
        on_cpu = key == "step" and not (
            optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        )
        optimizer.state[parameter][key] = value.to("cpu" if on_cpu else parameter.device)


@torch.no_grad()
def copy_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts whole weights in place, all of them."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != tensors.keys():
        raise KeyError(", ".join(sorted(parameters.keys() ^ tensors.keys())[:3]))
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def _random_modules(device: torch.device) -> dict[str, Any]:
    """Who holds random state, by kind of device: the CPU and the accelerator in use."""
    return {"cpu": torch} | ({} if device.type == "cpu" else {device.type: torch.get_device_module(device)})
