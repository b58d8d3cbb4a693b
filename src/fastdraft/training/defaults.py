"""What a recipe leaves open: rates, decay and batch by the draft's size, precision and compilation by the device, cadence by length.

settings = resolve(config.optimizer, "pretrain", model, device, ...); step = build_step(model, settings, objective, device)
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from fastdraft.modeling.heads import split_head
from fastdraft.recipe.base import format_count
from fastdraft.recipe.run import Compile, Precision
from fastdraft.recipe.training import CosineConfig, OptimizerConfig, WSDConfig
from fastdraft.training.fast_decoder import fast_decoder
from fastdraft.training.objective import Objective
from fastdraft.training.optimizer import build_optimizers
from fastdraft.training.schedule import cosine_factor, decay_start, wsd_factor
from fastdraft.training.step import TrainStep, autocast_dtype, default_micro_batch_tokens

Phase = Literal["pretrain", "align"]

# Centres at 1 M, 50 M and 150 M parameters, with log-log interpolation between them, from published configurations (SmolLM2-135M,
# AMD-Llama-135m, OLMo-core's ladder rule, Moonlight for Muon); FastDraft publishes none.
_SIZES = (1e6, 50e6, 150e6)
_MATRIX_RATES: dict[tuple[Phase, str], tuple[float, float, float]] = {
    ("pretrain", "adamw"): (3e-3, 2e-3, 1.5e-3),
    ("pretrain", "muon"): (5e-3, 2e-3, 2e-3),
    ("align", "adamw"): (1e-3, 5e-4, 4e-4),
    ("align", "muon"): (1e-3, 5e-4, 5e-4),
}
_EMBEDDING_RATES: dict[tuple[Phase, str], tuple[float, float, float]] = {
    ("pretrain", "muon"): (3e-3, 2e-3, 1.5e-3),
    ("align", "muon"): (1e-3, 3e-4, 3e-4),
}
_BATCH_TOKENS: dict[Phase, tuple[float, float, float]] = {
    "pretrain": (16_384, 262_144, 524_288),
    "align": (16_384, 65_536, 65_536),
}
MIN_STEPS = 200
"""An open batch size is lowered until a run has about this many steps."""
LARGE_BATCH = 524_288
"""From here on AdamW's second moment may forget sooner: smaller batches are noisier."""
MIN_COMPILED_TOKENS = 50_000_000
"""Training tokens below which an accelerator is done before a compilation has paid."""


@dataclass(frozen=True)
class TrainingSettings:
    """The settings that a run really had."""

    optimizer: Literal["adamw", "muon"]
    learning_rate: float
    embedding_learning_rate: float
    weight_decay: float
    beta2: float
    batch_tokens: int
    micro_batch_tokens: int
    precision: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rate = f"{self.learning_rate:g}"
        if self.embedding_learning_rate != self.learning_rate:
            rate += f" (embeddings {self.embedding_learning_rate:g})"
        return f"{self.optimizer} at {rate}, batches of {format_count(self.batch_tokens)} tokens, {self.precision}"


def learning_rate(phase: Phase, optimizer: str, parameters: int) -> float:
    """Peak rate of the matrices (of everything, under AdamW)."""
    return float(f"{_interpolate(_MATRIX_RATES[phase, optimizer], parameters):.2g}")


def embedding_learning_rate(phase: Phase, optimizer: str, parameters: int) -> float | None:
    """Peak rate of embeddings, head, gains and biases beside Muon; None where one rate serves all."""
    centres = _EMBEDDING_RATES.get((phase, optimizer))
    return None if centres is None else float(f"{_interpolate(centres, parameters):.2g}")


def batch_tokens(phase: Phase, parameters: int, tokens: int) -> int:
    """Tokens of one optimiser step: a power of two, at most what leaves `MIN_STEPS` steps in `tokens`, at least 2048."""
    wanted = _interpolate(_BATCH_TOKENS[phase], parameters)
    wanted = max(2048.0, min(wanted, tokens / MIN_STEPS * math.sqrt(2)))
    return int(2 ** round(math.log2(wanted)))


def _interpolate(centres: tuple[float, float, float], parameters: int) -> float:
    size = math.log(min(max(parameters, _SIZES[0]), _SIZES[-1]))
    logs = [math.log(value) for value in _SIZES]
    left = 0 if size <= logs[1] else 1
    share = (size - logs[left]) / (logs[left + 1] - logs[left])
    return math.exp((1 - share) * math.log(centres[left]) + share * math.log(centres[left + 1]))


def count_parameters(model: torch.nn.Module) -> int:
    """Weights, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def resolve(
    optimizer: OptimizerConfig,
    phase: Phase,
    model: torch.nn.Module,
    device: torch.device,
    *,
    batch_tokens: int,
    micro_batch_tokens: int | None,
    precision: Precision,
    halved: bool = False,
) -> TrainingSettings:
    """Fills in what the recipe left open. `halved`: training goes on from decayed weights, so the open rates are half."""
    parameters, scale = count_parameters(model), 0.5 if halved else 1.0
    rate = optimizer.learning_rate or scale * learning_rate(phase, optimizer.kind, parameters)
    embedding_rate = optimizer.embedding_learning_rate
    if embedding_rate is None and optimizer.learning_rate is None:
        suggested = embedding_learning_rate(phase, optimizer.kind, parameters)
        embedding_rate = None if suggested is None else scale * suggested
    decay = (
        (0.1 if phase == "pretrain" else 0.0) if optimizer.weight_decay is None else optimizer.weight_decay
    )
    return TrainingSettings(
        optimizer=optimizer.kind,
        learning_rate=rate,
        embedding_learning_rate=rate if embedding_rate is None else embedding_rate,
        weight_decay=decay,
        beta2=optimizer.beta2 or (0.99 if batch_tokens < LARGE_BATCH else 0.95),
        batch_tokens=batch_tokens,
        micro_batch_tokens=micro_batch_tokens or default_micro_batch_tokens(device),
        precision="bf16" if autocast_dtype(precision, device) is not None else "fp32",
    )


def build_step(
    model: PreTrainedModel,
    settings: TrainingSettings,
    objective: Objective,
    device: torch.device,
    *,
    compiled: bool = False,
) -> TrainStep:
    """The optimisers and the step over a model whose weights are fp32 and on `device`."""
    decoder, head_VD = split_head(model)
    optimizers = build_optimizers(
        model,
        kind=settings.optimizer,
        learning_rate=settings.learning_rate,
        embedding_learning_rate=settings.embedding_learning_rate,
        weight_decay=settings.weight_decay,
        beta2=settings.beta2,
        low=settings.precision == "bf16",
    )
    runs = fast_decoder(decoder, device, compiled=compiled)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return TrainStep(
        runs, head_VD, parameters, optimizers, objective, device, autocast_dtype(settings.precision, device)
    )


def rate_factor(config: WSDConfig | CosineConfig, steps: int) -> Callable[[int], float]:
    """The schedule of a recipe as a function of the 0-based step."""
    if isinstance(config, WSDConfig):
        return lambda step: wsd_factor(step, steps, config.warmup, config.decay)
    return lambda step: cosine_factor(step, steps, config.warmup)


def undecayed_step(config: WSDConfig | CosineConfig, steps: int) -> int:
    """After how many steps the un-decayed weights are kept; -1 where the schedule has none."""
    return max(1, decay_start(steps, config.decay)) if isinstance(config, WSDConfig) else -1


def validate_every(asked: int | None, steps: int) -> int:
    """Left open: ten times a run."""
    return max(1, steps // 10) if asked is None else asked


def checkpoint_every(asked: int | None, steps: int) -> int:
    """Left open: twenty times a run, at least every 500 steps, at most every 10."""
    return min(500, max(10, steps // 20)) if asked is None else asked


def compiles(asked: Compile, device: torch.device, tokens: int) -> tuple[bool, str]:
    """Whether `run.compile` compiles the decoder of a stage of that many tokens, and one line for the log (empty: nothing to tell).

    A wish that cannot be met is said, not an error: the numbers are the same either way.
    """
    if asked is False:
        return False, "not compiled: run.compile is false"
    if asked == "auto":
        # Never on a CPU: the layers written out need no compiler, and are faster than compiled modules.
        if device.type != "cuda":
            return False, "" if device.type == "cpu" else "not compiled: auto compiles on CUDA devices only"
        if tokens < MIN_COMPILED_TOKENS:
            return False, f"not compiled: {tokens / 1e6:.0f}M tokens are done before it pays"
    missing = ""
    if device.type == "cuda":
        missing = "" if importlib.util.find_spec("triton") else "torch.compile needs the package triton here"
    elif device.type != "cpu":
        missing = f"torch.compile is not used on {device.type}"
    else:
        compilers = [
            os.environ.get("CXX", ""),
            *(["cl"] if sys.platform == "win32" else ["g++", "clang++", "c++"]),
        ]
        if not any(name and shutil.which(name) for name in compilers):
            missing = "torch.compile needs a C++ compiler here, and none was found"
    return (
        not missing,
        f"not compiled: {missing}" if missing else "compiled: the first steps take up to some minutes",
    )
