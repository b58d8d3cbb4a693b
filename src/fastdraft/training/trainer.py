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
from fastdraft.training.memory import cut_rows, halved_limit, is_out_of_memory, limited, release_memory, within_memory
from fastdraft.training.metrics import Metrics
from fastdraft.training.step import TrainStep

BAD_STEPS_IN_A_ROW = 3
"""So many steps with a loss or gradient that is not finite end the run. One such step is an overflow or a damaged row, and is left out,
weights and optimiser state untouched; two may be neighbours of it; three mean that the weights themselves have gone wrong, and every
further step would only use up the data. The count goes on over a restart."""


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
            TrainingError: losses are NaN or infinite several steps in a row, a batch has no trained tokens, or one row does not fit.
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
        factor, limit = self.plan.factor(state.step), state.micro_batch_limit
        loss, norm, num_trained = self._gradients(batches)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self._update(factor)
        else:
            self.step.skip()
        num_tokens = sum(batch.num_tokens for batch in batches)
        seconds = time.perf_counter() - begin
        state.step += 1
        state.tokens += num_tokens
        state.seconds += seconds
        state.skipped += not finite
        state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
        if finite:
            state.trained_tokens += num_trained
        events: dict[str, Any] = {} if finite else {"skipped": True}
        if state.micro_batch_limit != limit:
            events["micro_batch_limit"] = state.micro_batch_limit
        metrics.write(
            step=state.step, tokens=state.tokens, loss=loss, lr=self.plan.peak_rate * factor, grad_norm=norm,
            tokens_per_second=round(num_tokens / max(seconds, 1e-9), 1), **events,
        )  # fmt: skip
        if not finite:
            self._report_bad(loss, norm, factor)
        progress.advance(num_tokens, f"loss {loss:.2f}")

    def _gradients(self, batches: list[Batch]) -> tuple[float, float, int]:
        """The step's gradients; where memory runs out, of the same batch again in smaller micro-batches, from then on.

        Raises:
            TrainingError: when one row alone does not fit.
        """
        while True:
            pieces = limited(batches, self.state.micro_batch_limit)
            try:
                return self.step.gradients(pieces)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            self.step.skip()
            release_memory(self.step.device)
            limit, key = halved_limit(pieces), self.plan.key
            if not limit:
                length = max(batch.input_ids.shape[1] for batch in pieces)
                rule, remedy = "one row at a time must fit the device", "use shorter rows, a smaller draft or a device with more memory"
                raise TrainingError(key, f"out of memory with one row of {length} tokens", rule, remedy)
            self.state.micro_batch_limit = limit
            again = f"micro-batches of at most {limit} tokens from here on, the batch stays the same"
            self.console.warn(f"{key}: out of memory at step {self.state.step + 1}: {again}")

    def _update(self, factor: float) -> None:
        try:
            self.step.update(factor)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            rule = "weights, gradients and the optimiser's state must fit the device together"
            raise TrainingError(
                self.plan.key, "out of memory in the update", rule, "use a smaller draft or a device with more memory"
            ) from error

    def _report_bad(self, loss: float, norm: float, factor: float) -> None:
        found = f"loss {loss:g}, gradient norm {norm:g} at step {self.state.step}, rate {self.plan.peak_rate * factor:.2g}"
        if self.state.skipped_in_a_row >= BAD_STEPS_IN_A_ROW:
            rule = f"{BAD_STEPS_IN_A_ROW} steps in a row were not finite"
            remedy = f"lower {self.plan.key}.optimizer.learning_rate or set precision: fp32, then --redo {self.plan.key}"
            raise TrainingError(self.plan.key, found, rule, remedy)
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
    """The objective's mean over all trained tokens, in nats, without touching gradients; in smaller pieces where memory runs out.

    Raises:
        TrainingError: when one row alone does not fit.
    """
    with torch.no_grad():
        total = sum(_loss_sum(step, batch) for batch in batches)
    return total / max(1, sum(batch.num_trained for batch in batches))


def _loss_sum(step: TrainStep, batch: Batch) -> float:
    rows = batch.input_ids.shape[0]

    def in_pieces(size: int) -> float:
        whole = size >= rows
        starts = range(0, rows, size)
        return sum(float(step.loss_sum(batch if whole else cut_rows(batch, at, min(at + size, rows)))) for at in starts)

    return within_memory(in_pieces, rows, 1, "validation")


def final_train_loss(records: list[dict[str, Any]], share: float = 0.1) -> float | None:
    """Mean training loss over the last `share` of the recorded steps."""
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    tail = losses[-max(1, round(len(losses) * share)) :]
    return sum(tail) / len(tail) if tail else None
