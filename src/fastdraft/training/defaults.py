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
from fastdraft.modeling.heads import output_head, split_head
from fastdraft.recipe.run import Compile, Precision
from fastdraft.recipe.training import AlignConfig, PretrainConfig, WSDConfig
from fastdraft.training.fast_decoder import fast_decoder
from fastdraft.training.objective import Objective
from fastdraft.training.optimizer import build_optimizers, cosine_factor, decay_start, wsd_factor
from fastdraft.training.step import TrainStep, autocast_dtype, default_micro_batch_tokens
from fastdraft.training.trainer import TrainingSchedule

Phase = Literal["pretrain", "align"]

# Centres at 1 M, 50 M and 150 M parameters, with log-log interpolation between them, from published
# configurations (SmolLM2-135M, AMD-Llama-135m, OLMo-core's ladder rule, Moonlight); FastDraft publishes none.
_SIZES = (1e6, 50e6, 150e6)
_RATES = {  # muon has one for the body's matrices, and one for all other weights
    ("pretrain", "adamw"): (3e-3, 2e-3, 1.5e-3),
    ("pretrain", "muon"): (5e-3, 2e-3, 2e-3),
    ("pretrain", "muon", "rest"): (3e-3, 2e-3, 1.5e-3),
    ("align", "adamw"): (1e-3, 5e-4, 4e-4),
    ("align", "muon"): (1e-3, 5e-4, 5e-4),
    ("align", "muon", "rest"): (1e-3, 3e-4, 3e-4),
}
_BATCH_TOKENS = {"pretrain": (16_384, 262_144, 524_288), "align": (16_384, 65_536, 65_536)}
MIN_STEPS = 200  # an open batch size is lowered until a run has about this many
LARGE_BATCH = 524_288  # from here on AdamW's second moment may forget sooner: smaller batches are noisier
MIN_COMPILED_TOKENS = 50_000_000  # below it an accelerator is done before a compilation has paid
COMPILED = ", compiled: the first steps take up to some minutes"


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


def learning_rate(phase: Phase, optimizer: str, parameters: int, *rest: str) -> float | None:
    """Peak rate of the matrices, or with "rest" of all other weights; None where one rate serves all."""
    centres = _RATES.get((phase, optimizer, *rest))
    return float(f"{_interpolate(centres, parameters):.2g}") if centres else None


def batch_tokens(phase: Phase, parameters: int, tokens: int) -> int:
    """Tokens of a step: a power of two that leaves about `MIN_STEPS` steps in `tokens`, at least 2048."""
    wanted = _interpolate(_BATCH_TOKENS[phase], parameters)
    return int(2 ** round(math.log2(max(2048.0, min(wanted, tokens / MIN_STEPS * math.sqrt(2))))))


def _interpolate(centres: tuple[float, ...], parameters: int) -> float:
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
    """Fills in what a section leaves open for a stage of so many tokens.

    An open batch holds at least one row of `row_length`. `halved`: training goes on from decayed weights.
    """
    optimizer, scale = config.optimizer, 0.5 if halved else 1.0
    parameters = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    batch = config.batch_tokens or max(row_length, batch_tokens(phase, parameters, tokens))
    rate = optimizer.learning_rate or scale * (learning_rate(phase, optimizer.kind, parameters) or 0)
    rest = learning_rate(phase, optimizer.kind, parameters, "rest")
    open_rest = rate if rest is None or optimizer.learning_rate else scale * rest
    decay = optimizer.weight_decay
    return TrainingSettings(
        optimizer=optimizer.kind,
        learning_rate=rate,
        embedding_learning_rate=optimizer.embedding_learning_rate or open_rest,
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
    (decoder, head_VD), low = split_head(model), settings.precision == "bf16"
    optimizers = build_optimizers(
        model,
        kind=settings.optimizer,
        learning_rate=settings.learning_rate,
        embedding_learning_rate=settings.embedding_learning_rate,
        weight_decay=settings.weight_decay,
        beta2=settings.beta2,
        low=low,
    )
    runs, autocast = fast_decoder(decoder, model.device, compiled=compiled), torch.bfloat16 if low else None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = output_head(model)[1].rows
    rows = None if rows is None else rows.cpu()
    return TrainStep(runs, head_VD, parameters, optimizers, objective, model.device, autocast, rows=rows)


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


def compiles(asked: Compile, device: torch.device, tokens: int) -> bool:
    """What `run.compile` means for a stage of that many tokens; without a compiler: False."""
    compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++", "cl"))
    found = {"cuda": importlib.util.find_spec("triton"), "cpu": any(map(shutil.which, compilers))}
    # On a CPU layers by hand need no compiler, and are faster.
    worth = device.type == "cuda" and tokens >= MIN_COMPILED_TOKENS if asked == "auto" else asked
    return worth and bool(found.get(device.type))
