"""From a stage's settings to the parts of the loop.

Decides what a recipe left open: rates, decay and batch by the draft's size, micro-batch and precision by the device, how often to
validate and save by the run's length. All that was decided is in `Resolved`, which goes to the log and the manifest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from fastdraft.modeling.heads import split_head
from fastdraft.recipe.base import format_count
from fastdraft.recipe.run import Precision
from fastdraft.recipe.training import CosineConfig, OptimizerConfig, WSDConfig
from fastdraft.training import rates, schedule
from fastdraft.training.objective import Objective
from fastdraft.training.optimizer import build_optimizers
from fastdraft.training.sharding import is_in_parts
from fastdraft.training.stand_in import stand_in
from fastdraft.training.step import TrainStep, autocast_dtype, default_micro_batch_tokens

LARGE_BATCH = 524_288


@dataclass(frozen=True)
class Resolved:
    """The settings that a run really had."""

    optimizer: str
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


def count_parameters(model: torch.nn.Module) -> int:
    """Weights, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def resolve(
    optimizer: OptimizerConfig,
    phase: rates.Phase,
    model: torch.nn.Module,
    device: torch.device,
    *,
    batch_tokens: int,
    micro_batch_tokens: int | None,
    precision: Precision,
    halved: bool = False,
) -> Resolved:
    """Fills in what the recipe left open. `halved`: training goes on from decayed weights, so the open rates are half."""
    parameters, scale = count_parameters(model), 0.5 if halved else 1.0
    rate = optimizer.learning_rate or scale * rates.learning_rate(phase, optimizer.kind, parameters)
    embedding_rate = optimizer.embedding_learning_rate
    if embedding_rate is None and optimizer.learning_rate is None:
        suggested = rates.embedding_learning_rate(phase, optimizer.kind, parameters)
        embedding_rate = None if suggested is None else scale * suggested
    return Resolved(
        optimizer=optimizer.kind,
        learning_rate=rate,
        embedding_learning_rate=rate if embedding_rate is None else embedding_rate,
        weight_decay=(0.1 if phase == "pretrain" else 0.0)
        if optimizer.weight_decay is None
        else optimizer.weight_decay,
        beta2=optimizer.beta2 or (0.99 if batch_tokens < LARGE_BATCH else 0.95),
        batch_tokens=batch_tokens,
        micro_batch_tokens=micro_batch_tokens or default_micro_batch_tokens(device),
        precision="bf16" if autocast_dtype(precision, device) is not None else "fp32",
    )


def build_step(
    model: PreTrainedModel,
    resolved: Resolved,
    objective: Objective,
    device: torch.device,
    *,
    compiled: bool = False,
) -> TrainStep:
    """The optimisers and the step over a model whose weights are fp32 and on `device`; on a CPU its layers are written out."""
    decoder, head_VD = split_head(model)
    optimizers = build_optimizers(
        model,
        kind="muon" if resolved.optimizer == "muon" else "adamw",
        learning_rate=resolved.learning_rate,
        embedding_learning_rate=resolved.embedding_learning_rate,
        weight_decay=resolved.weight_decay,
        beta2=resolved.beta2,
        low=resolved.precision == "bf16",
    )
    # Weights in parts are put together by the modules' own hooks (training/sharding.py).
    runs: Any = decoder if is_in_parts(model) else stand_in(decoder, device, compiled=compiled)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return TrainStep(
        runs, head_VD, parameters, optimizers, objective, device, autocast_dtype(resolved.precision, device)
    )


def rate_factor(config: WSDConfig | CosineConfig, steps: int) -> Callable[[int], float]:
    """The schedule of a recipe as a function of the 0-based step."""
    if isinstance(config, WSDConfig):
        warmup, decay = config.warmup, config.decay
        return lambda step: schedule.wsd_factor(step, steps, warmup, decay)
    warmup = config.warmup
    return lambda step: schedule.cosine_factor(step, steps, warmup, 0.0)


def undecayed_step(config: WSDConfig | CosineConfig, steps: int) -> int:
    """After how many steps the un-decayed weights are kept; -1 where the schedule has none."""
    return max(1, schedule.decay_start(steps, config.decay)) if isinstance(config, WSDConfig) else -1


def validate_every(asked: int | None, steps: int) -> int:
    """Left open: ten times a run."""
    return max(1, steps // 10) if asked is None else asked


def checkpoint_every(asked: int | None, steps: int) -> int:
    """Left open: twenty times a run, at least every 500 steps, at most every 10."""
    return min(500, max(10, steps // 20)) if asked is None else asked
