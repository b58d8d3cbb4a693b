"""The training loop that pre-training and alignment share.

Decides the order of things at every step: train, record, keep the un-decayed weights at their moment, validate, save, look for a wish
to stop. All that the loop remembers is in `TrainingState` and the checkpoints; data and rate follow from the step's number, so a run
that was killed and started again ends with the same weights, bit for bit, as one that was not (same machine, same threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdraft.console import Console, Progress
from fastdraft.errors import TrainingError
from fastdraft.training.batches import Batch, BatchSource
from fastdraft.training.checkpoint import Checkpoints, TrainingState
from fastdraft.training.metrics import Metrics
from fastdraft.training.step import TrainStep

BAD_STEPS_IN_A_ROW = 3


@dataclass(frozen=True)
class Validation:
    """What a validation found."""

    metrics: dict[str, Any]
    """Recorded as they are."""
    score: float | None = None
    """Higher is better; the best step's weights are kept. None: no choice among steps."""


@dataclass(frozen=True)
class Plan:
    """When things happen, in steps."""

    title: str
    """Names the progress bar."""
    key: str
    """The recipe section, named in errors."""
    factor: Callable[[int], float]
    """Share of the peak rate at a 0-based step."""
    peak_rate: float
    """Of the body's matrices, for the record."""
    validate_every: int = 0
    """0: only at the end."""
    validate_first: bool = False
    """Before the first step too; the starting weights are then a candidate for the best."""
    checkpoint_every: int = 0
    """0: only at the end or on a wish to stop."""
    undecayed_step: int = -1
    """Number of finished steps at which `save_undecayed` is called; -1: never."""
    tensorboard: bool = False


@dataclass
class Trainer:
    """Runs a `TrainStep` over a `BatchSource` in a stage's folder; `run` resumes from whatever is there."""

    folder: Path
    model: nn.Module
    step: TrainStep
    source: BatchSource
    plan: Plan
    console: Console
    validate: Callable[[], Validation] | None = None
    """Called with the model in evaluation mode."""
    save_undecayed: Callable[[], None] | None = None
    state: TrainingState = field(default_factory=TrainingState, init=False)

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.folder, self.model, self.step.optimizers, self.console)

    def run(self) -> TrainingState:
        """Trains to the end and leaves the final weights (the best ones, where validation gives a score) in the model.

        Raises:
            TrainingError: losses are NaN or infinite several steps in a row, a batch has no trained tokens, or memory ran out.
            Interrupted: a stop was asked for; a checkpoint is saved.
        """
        self.state = self.checkpoints.load_latest()
        plan, total = self.plan, self.source.tokens
        self.model.train()
        with (
            Metrics(self.folder, self.state.step, plan.tensorboard) as metrics,
            self.console.progress(plan.title, total, "tokens", completed=self.state.tokens) as progress,
            ThreadPoolExecutor(1) as ahead,
        ):
            if self.state.step == 0 and plan.validate_first and self.checkpoints.saved_step < 0:
                self._validate(metrics)
            coming: Future[list[Batch]] | None = None
            while self.state.step < self.source.steps:
                batches = coming.result() if coming else self.source.batches(self.state.step)
                if self.state.step + 1 < self.source.steps:
                    coming = ahead.submit(self.source.batches, self.state.step + 1)
                self._train(batches, metrics, progress)
                self._after_step(metrics)
        if self.state.best_step >= 0 and self.state.best_step != self.state.step:
            self.checkpoints.load_best(self.state.best_step)
        self.model.eval()
        return self.state

    def _train(self, batches: list[Batch], metrics: Metrics, progress: Progress) -> None:
        state, begin = self.state, time.perf_counter()
        factor = self.plan.factor(state.step)
        try:
            loss, norm, num_trained = self.step.gradients(batches)
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite:
                self.step.update(factor)
            else:
                self.step.skip()
        except torch.OutOfMemoryError as error:
            key = f"{self.plan.key}.micro_batch_tokens"
            raise TrainingError(key, "out of memory", "one micro-batch must fit the device", "set a smaller one") from error
        num_tokens = sum(batch.num_tokens for batch in batches)
        seconds = time.perf_counter() - begin
        state.step += 1
        state.tokens += num_tokens
        state.seconds += seconds
        state.skipped += not finite
        state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
        if finite:
            state.trained_tokens += num_trained
        metrics.write(
            step=state.step, tokens=state.tokens, loss=loss, lr=self.plan.peak_rate * factor, grad_norm=norm,
            tokens_per_second=round(num_tokens / max(seconds, 1e-9), 1), **({} if finite else {"skipped": True}),
        )  # fmt: skip
        if not finite:
            self._report_bad(loss, norm, factor)
        progress.advance(num_tokens, f"loss {loss:.2f}")

    def _report_bad(self, loss: float, norm: float, factor: float) -> None:
        found = f"loss {loss:g}, gradient norm {norm:g} at step {self.state.step}, rate {self.plan.peak_rate * factor:.2g}"
        if self.state.skipped_in_a_row >= BAD_STEPS_IN_A_ROW:
            rule = f"{BAD_STEPS_IN_A_ROW} steps in a row were not finite"
            raise TrainingError(self.plan.key, found, rule, f"lower {self.plan.key}.optimizer.learning_rate or set precision: fp32")
        self.console.warn(f"{self.plan.key}: {found}: step left out")

    def _after_step(self, metrics: Metrics) -> None:
        plan, step, last = self.plan, self.state.step, self.state.step == self.source.steps
        if step == plan.undecayed_step and self.save_undecayed:
            self.save_undecayed()
        if last or (plan.validate_every and step % plan.validate_every == 0):
            self._validate(metrics)
        stop = self.console.stop.requested
        if last or stop or (plan.checkpoint_every and step % plan.checkpoint_every == 0):
            self.checkpoints.save(self.state)
        if stop:
            self.console.stop.check(self.folder)

    def _validate(self, metrics: Metrics) -> None:
        if self.validate is None:
            return
        self.model.eval()
        found = self.validate()
        self.model.train()
        metrics.write(step=self.state.step, tokens=self.state.tokens, **found.metrics)
        best = -math.inf if self.state.best_score is None else self.state.best_score
        if found.score is not None and found.score > best:
            self.checkpoints.save_best(self.state.step)
            self.state.best_step, self.state.best_score = self.state.step, found.score


def mean_loss(step: TrainStep, batches: list[Batch]) -> float:
    """The objective's mean over all trained tokens, in nats, without touching gradients."""
    with torch.no_grad():
        total = sum(float(step.loss_sum(batch)) for batch in batches)
    return total / max(1, sum(batch.num_trained for batch in batches))


def final_train_loss(records: list[dict[str, Any]], share: float = 0.1) -> float | None:
    """Mean training loss over the last `share` of the recorded steps."""
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    tail = losses[-max(1, round(len(losses) * share)) :]
    return sum(tail) / len(tail) if tail else None
