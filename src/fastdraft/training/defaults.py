"""What a recipe leaves open: rates, batch, precision, compilation, cadence.

settings = resolve(config, "pretrain", model, tokens, precision)
step = build_step(model, settings, objective)
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from fastdraft.console import format_count
from fastdraft.modeling.heads import split_head
from fastdraft.recipe.run import Compile, Precision
from fastdraft.recipe.training import AlignConfig, PretrainConfig, WSDConfig
from fastdraft.training.fast_decoder import fast_decoder
from fastdraft.training.objective import Objective
from fastdraft.training.optimizer import build_optimizers
from fastdraft.training.schedule import cosine_factor, decay_start, wsd_factor
from fastdraft.training.step import TrainStep, autocast_dtype, default_micro_batch_tokens
from fastdraft.training.trainer import TrainingSchedule

Phase = Literal["pretrain", "align"]

# Centres at 1 M, 50 M and 150 M parameters, with log-log interpolation between them, from published
# configurations (SmolLM2-135M, AMD-Llama-135m, OLMo-core's ladder rule, Moonlight); FastDraft publishes none.
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
MIN_STEPS = 200  # an open batch size is lowered until a run has about this many
LARGE_BATCH = 524_288  # from here on AdamW's second moment may forget sooner: smaller batches are noisier
MIN_COMPILED_TOKENS = 50_000_000  # below it an accelerator is done before a compilation has paid


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

    def __str__(self) -> str:
        rate = f"{self.learning_rate:g}"
        if self.embedding_learning_rate != self.learning_rate:
            rate += f" (embeddings {self.embedding_learning_rate:g})"
        batch = format_count(self.batch_tokens)
        return f"{self.optimizer} at {rate}, batches of {batch} tokens, {self.precision}"


def learning_rate(phase: Phase, optimizer: str, parameters: int) -> float:
    """Peak rate of the matrices (of everything, under AdamW)."""
    return _rate(_MATRIX_RATES[phase, optimizer], parameters)


def embedding_learning_rate(phase: Phase, optimizer: str, parameters: int) -> float | None:
    """Peak rate of embeddings, head, gains and biases beside Muon; None where one rate serves all."""
    centres = _EMBEDDING_RATES.get((phase, optimizer))
    return None if centres is None else _rate(centres, parameters)


def batch_tokens(phase: Phase, parameters: int, tokens: int) -> int:
    """Tokens of a step: a power of two that leaves about `MIN_STEPS` steps in `tokens`, at least 2048."""
    wanted = _interpolate(_BATCH_TOKENS[phase], parameters)
    wanted = max(2048.0, min(wanted, tokens / MIN_STEPS * math.sqrt(2)))
    return int(2 ** round(math.log2(wanted)))


def _rate(centres: tuple[float, float, float], parameters: int) -> float:
    return float(f"{_interpolate(centres, parameters):.2g}")


def _interpolate(centres: tuple[float, float, float], parameters: int) -> float:
    return math.exp(np.interp(math.log(parameters), np.log(_SIZES), np.log(centres)))


def resolve(
    config: PretrainConfig | AlignConfig,
    phase: Phase,
    model: PreTrainedModel,
    tokens: int,
    precision: Precision,
    *,
    row_length: int = 0,
    halved: bool = False,
) -> TrainingSettings:
    """Fills in what a section leaves open.

    Args:
        config: The section.
        phase: Whose centres.
        model: The draft, on its device.
        tokens: Of the whole stage.
        precision: `run.precision`.
        row_length: An open batch holds at least one such row.
        halved: Training goes on from decayed weights, so open rates are half.
    """
    optimizer, scale = config.optimizer, 0.5 if halved else 1.0
    parameters = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    batch = config.batch_tokens or max(row_length, batch_tokens(phase, parameters, tokens))
    rate = optimizer.learning_rate or scale * learning_rate(phase, optimizer.kind, parameters)
    embedding_rate = optimizer.embedding_learning_rate
    if embedding_rate is None and optimizer.learning_rate is None:
        suggested = embedding_learning_rate(phase, optimizer.kind, parameters)
        embedding_rate = None if suggested is None else scale * suggested
    decay = optimizer.weight_decay
    return TrainingSettings(
        optimizer=optimizer.kind,
        learning_rate=rate,
        embedding_learning_rate=rate if embedding_rate is None else embedding_rate,
        weight_decay={"pretrain": 0.1, "align": 0.0}[phase] if decay is None else decay,
        beta2=0.99 if batch < LARGE_BATCH else 0.95,
        batch_tokens=batch,
        micro_batch_tokens=config.micro_batch_tokens or default_micro_batch_tokens(model.device),
        precision="bf16" if autocast_dtype(precision, model.device) is not None else "fp32",
    )


def build_step(
    model: PreTrainedModel, settings: TrainingSettings, objective: Objective, *, compiled: bool = False
) -> TrainStep:
    """The optimisers and the step over a model whose weights are fp32."""
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
    runs, low = fast_decoder(decoder, model.device, compiled=compiled), settings.precision == "bf16"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    autocast = torch.bfloat16 if low else None
    return TrainStep(runs, head_VD, parameters, optimizers, objective, model.device, autocast)


def schedule_of(
    config: PretrainConfig | AlignConfig, name: str, settings: TrainingSettings, steps: int, **more: bool
) -> TrainingSchedule:
    """When things happen in a stage of so many steps; `more`: further fields of the schedule."""
    rate, validate, save = config.schedule, config.validate_every, config.checkpoint_every
    if isinstance(rate, WSDConfig):
        factor = partial(wsd_factor, steps=steps, warmup=rate.warmup, decay=rate.decay)
    else:
        factor = partial(cosine_factor, steps=steps, warmup=rate.warmup)
    return TrainingSchedule(
        name=name,
        factor=factor,
        peak_rate=settings.learning_rate,
        micro_batch_tokens=settings.micro_batch_tokens,
        validate_every=max(1, steps // 10) if validate is None else validate,
        checkpoint_every=min(500, max(10, steps // 20)) if save is None else save,
        undecayed_step=max(1, decay_start(steps, rate.decay)) if isinstance(rate, WSDConfig) else -1,
        **more,
    )


def compiles(asked: Compile, device: torch.device, tokens: int) -> tuple[bool, str]:
    """What `run.compile` means for a stage of that many tokens, and a line for the log ("": nothing to tell).

    A wish that cannot be met is said, not an error: the numbers are the same either way.
    """
    if asked == "auto" and device.type == "cpu":  # layers by hand need no compiler, and are faster
        return False, ""
    if asked is False:
        return False, "not compiled: run.compile is false"
    if asked == "auto" and (device.type != "cuda" or tokens < MIN_COMPILED_TOKENS):
        return False, "not compiled: auto compiles long runs on CUDA devices only"
    compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++", "cl"))
    found = {"cuda": importlib.util.find_spec("triton"), "cpu": any(map(shutil.which, compilers))}
    if not found.get(device.type):
        needs = {"cuda": "the package triton", "cpu": "a C++ compiler"}.get(device.type, "CUDA or a CPU")
        return False, f"not compiled: torch.compile needs {needs} here, and found none"
    return True, "compiled: the first steps take up to some minutes"
