"""Everything that a training run needs to go on exactly where it stopped, on disk.

Decides the format: a folder `steps/step-00000100` with weights, optimiser state and random state as safetensors (no pickle), weights and
state in one file each or, where processes hold parts, in one of each process; and `state.json`, which holds the counters and the
checksums of the others. Folders appear whole or not at all; the last two are kept; a damaged one is passed over for the one before.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdraft.console import Console
from fastdraft.errors import FastDraftError
from fastdraft.machine import disk_errors
from fastdraft.run_folder import atomic_folder, read_json, write_json
from fastdraft.training.distributed import World
from fastdraft.training.tensor_files import (
    RANDOM,
    STATE,
    StoredTensors,
    check_files,
    describe_files,
    file_name,
    layout,
    write_part,
    write_tensors,
)

FOLDER, KEEP = "steps", 2
_WEIGHTS, _OPTIMIZER = file_name("model"), file_name("optimizer")
_LIMIT = "micro_batch_limit.json"


@dataclass
class TrainingState:
    """The counters of a run."""

    step: int = 0
    """Finished steps, skipped ones included."""
    tokens: int = 0
    """Input tokens so far, without padding."""
    trained_tokens: int = 0
    """Tokens that had a loss."""
    seconds: float = 0.0
    """Time spent in steps by all processes together."""
    skipped: int = 0
    """Steps left out for a loss or gradient that was not finite."""
    skipped_in_a_row: int = 0
    micro_batch_limit: int = 0
    """Padded tokens that one micro-batch may hold since memory ran out; 0: it never did."""
    best_step: int = -1
    """Step of the best validation score; -1 before the first."""
    best_score: float | None = None


class Checkpoints:
    """The resume checkpoints of one stage, in `folder/steps`."""

    def __init__(
        self, folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], console: Console
    ) -> None:
        self.folder, self._model, self._optimizers, self._console = (
            folder / FOLDER,
            model,
            optimizers,
            console,
        )
        self.saved_step = -1

    def sweep(self) -> None:
        """Removes what a killed save left half-written; only the process that saves may do it."""
        for leftover in self.folder.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, state: TrainingState) -> None:
        """Commits whole weights, the optimisers' state and the random state, then lets older folders go."""
        with atomic_folder(self._step_folder(state.step)) as folder:
            write_tensors(dict(self._model.named_parameters()), folder / _WEIGHTS)
            write_tensors(optimizer_tensors(self._model, self._optimizers), folder / _OPTIMIZER)
            self._write_state(folder, state, describe_files(folder, (_WEIGHTS, _OPTIMIZER)))
        self.saved_step = state.step
        self._prune(state)

    def save_parts(self, state: TrainingState, world: World) -> None:
        """The same of weights in parts: every process writes its own, process 0 the rest; call it in all.

        Raises:
            FastDraftError: in all processes, where one cannot write. FastDraftError: where one does not see the folder.
        """
        tensors: dict[str, dict[str, Tensor]] = {
            "model": dict(self._model.named_parameters()),
            "optimizer": optimizer_tensors(self._model, self._optimizers),
        }
        with contextlib.ExitStack() as commit:
            begun = world.on_main(
                lambda: str(commit.enter_context(atomic_folder(self._step_folder(state.step))))
            )
            folder, failed, own = Path(begun), None, {}
            try:
                if not folder.is_dir():
                    rule, remedy = "all machines must see one folder", "set run.folder to a shared disk"
                    raise FastDraftError(folder, "not on this machine", rule, remedy)
                with disk_errors(folder):
                    own = {
                        kind: write_part(folder, kind, tensors[kind], world.rank, world.size)
                        for kind in tensors
                    }
            except FastDraftError as error:
                failed = error
            world.raise_first(failed)
            written = world.everyone(own)

            def finish() -> None:
                records = {kind: [record[kind] for record in written] for kind in tensors}
                files = {
                    name: about
                    for kind in records
                    for record in records[kind]
                    for name, about in record["files"].items()
                }
                self._write_state(
                    folder,
                    state,
                    files,
                    {"size": world.size, **{kind: layout(records[kind]) for kind in records}},
                )
                commit.close()
                self._prune(state)

            world.on_main(finish)
        self.saved_step = state.step

    def _write_state(
        self, folder: Path, state: TrainingState, files: dict[str, Any], parts: dict[str, Any] | None = None
    ) -> None:
        write_tensors(_random_tensors(self._device), folder / RANDOM)
        record = {
            "schema": 1,
            "state": asdict(state),
            "files": {**files, **describe_files(folder, (RANDOM,))},
        }
        write_json(folder / STATE, {**record, "parts": parts} if parts else record)

    def save_best(self, step: int, model: nn.Module) -> None:
        """Keeps a model's whole weights as the best so far; older best ones stay until no kept checkpoint speaks of them."""
        with atomic_folder(self._best_folder(step)) as folder:
            write_tensors(dict(model.named_parameters()), folder / _WEIGHTS)
            write_json(folder / STATE, {"schema": 1, "files": describe_files(folder, (_WEIGHTS,))})

    def load_best(self, step: int, model: nn.Module) -> None:
        """Puts the best weights into `model`.

        Raises:
            FastDraftError: when they are damaged.
        """
        folder = self._best_folder(step)
        check_files(folder, read_json(folder / STATE))
        with _fitting(folder):
            copy_weights(model, load_file(folder / _WEIGHTS))

    def load_latest(self) -> TrainingState:
        """Restores the newest whole checkpoint; a fresh state when there is none at all.

        Raises:
            FastDraftError: when there are checkpoints but every one is damaged.
        """
        found = sorted(self.folder.glob("step-*"), reverse=True)
        for folder in found:
            try:
                state = self._load(folder)
            except FastDraftError as error:
                self._console.warn(f"{error}; trying the one before")
                continue
            self.saved_step = state.step
            state.micro_batch_limit = self._noted_limit(state.micro_batch_limit)
            return state
        if found:
            remedy = f"begin the stage anew with --redo {self.folder.parent.name}"
            raise FastDraftError(
                self.folder, "every checkpoint is damaged", "one whole checkpoint is needed to go on", remedy
            )
        return TrainingState(micro_batch_limit=self._noted_limit(0))

    def note_limit(self, limit: int) -> None:
        """Keeps a micro-batch size for whoever goes on from the latest checkpoint, where the step itself cannot be tried again."""
        write_json(self.folder / _LIMIT, {"micro_batch_limit": limit})

    def _noted_limit(self, limit: int) -> int:
        """The smaller of a checkpoint's limit and one noted since; 0 where there is neither."""
        noted = 0
        if (self.folder / _LIMIT).exists():
            with contextlib.suppress(FastDraftError, KeyError, TypeError, ValueError):
                noted = int(read_json(self.folder / _LIMIT)["micro_batch_limit"])
        return min(filter(None, (limit, noted)), default=0)

    def discard(self) -> None:
        """Removes all of them, once the stage is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _load(self, folder: Path) -> TrainingState:
        record = read_json(folder / STATE)
        check_files(folder, record)
        with _fitting(folder):
            state = _training_state(record["state"])
            if state.best_step >= 0:
                check_files(
                    self._best_folder(state.best_step), read_json(self._best_folder(state.best_step) / STATE)
                )
            with (
                StoredTensors(folder, "model", record) as weights,
                StoredTensors(folder, "optimizer", record) as optimizer,
            ):
                load_weights(self._model, weights)
                restore_optimizers(self._model, self._optimizers, optimizer)
            _restore_random(load_file(folder / RANDOM), self._device)
        return state

    def _prune(self, state: TrainingState) -> None:
        steps = sorted(self.folder.glob("step-*"))
        for folder in steps[:-KEEP]:
            shutil.rmtree(folder, ignore_errors=True)
        needed = {state.best_step}
        for folder in steps[-KEEP:]:
            with contextlib.suppress(FastDraftError, KeyError, TypeError):
                needed.add(read_json(folder / STATE)["state"]["best_step"])
        for folder in self.folder.glob("best-*"):
            number = folder.name.removeprefix("best-")
            if number.isdecimal() and int(number) not in needed:
                shutil.rmtree(folder, ignore_errors=True)

    def _step_folder(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def _best_folder(self, step: int) -> Path:
        return self.folder / f"best-{step:09d}"


@contextlib.contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Whatever is raised where files are whole but not of this run, as one line."""
    try:
        yield
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OSError,
        SafetensorError,
    ) as error:
        raise FastDraftError(
            folder, f"does not fit ({error})", "must be a checkpoint of this run", "delete it"
        ) from error


def _training_state(record: Any) -> TrainingState:
    """The counters, each of its kind.

    Raises:
        TypeError: when one is missing, unknown or of another kind. ValueError: when one is not finite or below -1.
    """
    state = TrainingState(**record)
    for name, value in asdict(state).items():
        whole, optional = name not in ("seconds", "best_score"), name == "best_score"
        if not (optional and value is None) and (
            isinstance(value, bool) or not isinstance(value, int if whole else (int, float))
        ):
            raise TypeError(f"{name} is a {type(value).__name__}")
        if value is not None and (not math.isfinite(value) or (value < -1 and not optional)):
            raise ValueError(f"{name} is {value}")
    return state


def optimizer_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every tensor of the optimisers' state as `NUMBER/PARAMETER/KEY`: AdamW's step and moments, Muon's momentum."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for number, optimizer in enumerate(optimizers):
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                if not isinstance(value, Tensor):
                    raise TypeError(f"optimiser state {key} is no tensor")
                tensors[f"{number}/{names[parameter]}/{key}"] = value
    return tensors


def restore_optimizers(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], stored: StoredTensors
) -> None:
    """Puts what `optimizer_tensors` gave back in place, bit for bit; AdamW's step counts go where its kind wants them.

    Raises:
        LookupError: for a name that is not of this model and its optimisers.
        ValueError: for a tensor of another shape or kind, or where an optimiser knows some of its weights and not the others.
    """
    parameters = dict(model.named_parameters())
    for optimizer in optimizers:
        optimizer.state.clear()
    for name in sorted(stored.keys()):
        number, parameter_name, key = name.split("/")
        optimizer, parameter = optimizers[int(number)], parameters[parameter_name]
        on_cpu = key == "step" and not (
            optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        )
        value = stored.like(name, parameter)
        _check_alike(name, value, stored.shape(name), [] if key == "step" else list(parameter.shape))
        optimizer.state[parameter][key] = (value.cpu() if on_cpu else value).clone()
    for optimizer in optimizers:
        owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if len({frozenset(optimizer.state.get(parameter, ())) for parameter in owned}) > 1:
            raise ValueError(f"{type(optimizer).__name__} lacks the state of some weights")


def copy_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts whole weights in place, all of them.

    Raises:
        KeyError: when the names are not the model's. ValueError: when a shape is another, or a tensor holds whole numbers.
    """
    with torch.no_grad():
        for name, parameter in _named(model, set(tensors)).items():
            _check_alike(name, tensors[name], list(tensors[name].shape), list(parameter.shape))
            parameter.copy_(tensors[name])


def load_weights(model: nn.Module, stored: StoredTensors) -> None:
    """Puts stored weights in place; where the model is in parts, this process's parts.

    Raises:
        KeyError: when the names are not the model's. ValueError: when a shape is another, or a tensor holds whole numbers.
    """
    with torch.no_grad():
        for name, parameter in _named(model, stored.keys()).items():
            value = stored.like(name, parameter)
            _check_alike(name, value, stored.shape(name), list(parameter.shape))
            parameter.copy_(value)


def _check_alike(name: str, value: Tensor, stored: list[int], shape: list[int]) -> None:
    """Torch would spread a smaller tensor over a larger one, and take integers for weights, without a word."""
    if stored != shape or not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype} {stored} where {shape} stood")


def _named(model: nn.Module, names: set[str]) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters())
    if parameters.keys() != names:
        raise KeyError(", ".join(sorted(parameters.keys() ^ names)[:3]))
    return parameters


def _random_tensors(device: torch.device) -> dict[str, Tensor]:
    """The random state of the CPU and of the accelerator in use, by kind of device."""
    tensors = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        tensors[device.type] = torch.get_device_module(device).get_rng_state(*_which(device))
    return tensors


def _restore_random(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Puts it back; a run moved to another kind of device goes on without that device's old state."""
    torch.set_rng_state(tensors["cpu"])
    if device.type != "cpu" and device.type in tensors:
        torch.get_device_module(device).set_rng_state(tensors[device.type], *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """Apple's module knows one device and takes no argument for it."""
    return () if device.type == "mps" else (device,)
