"""The training loop that pre-training and alignment share, top to bottom: `Trainer(...).run()`.

All that it remembers is in `TrainingState` and the checkpoints; data and rate follow from the step's number.
So a run that was killed and started again ends with the same weights, bit for bit (same machine and threads).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fastdraft.console import Console
from fastdraft.errors import FastDraftError, Interrupted
from fastdraft.training.batches import Batch, BatchSource, read_ahead
from fastdraft.training.checkpoint import Checkpoints, TrainingState
from fastdraft.training.distributed import Replicas, World
from fastdraft.training.metrics import Metrics
from fastdraft.training.step import TrainStep

# So many steps with a loss or gradient that is not finite end the run. One is an overflow or a damaged row,
# and is left out; two may be neighbours of it; three mean that the weights have gone wrong.
BAD_STEPS_IN_A_ROW = 3


@dataclass(frozen=True)
class Validation:
    """What a validation found."""

    metrics: dict[str, Any]  # recorded as they are
    score: float | None = None  # the best step's weights are kept; None: no choice among steps


@dataclass(frozen=True)
class TrainingSchedule:
    """When things happen, in steps."""

    name: str  # the recipe section
    factor: Callable[[int], float]  # share of the peak rate at a 0-based step
    peak_rate: float  # of the body's matrices, for the record
    micro_batch_tokens: int
    validate_every: int = 0  # 0: only at the end
    validate_first: bool = False  # before the first step too; the starting weights may then be the best
    checkpoint_every: int = 0  # 0: only at the end or when a stop was asked for
    undecayed_step: int = -1  # finished steps at which `save_undecayed` is called; -1: never
    tensorboard: bool = False


@dataclass
class Trainer:
    """Runs a `TrainStep` over a `BatchSource` in a stage's folder; `run` resumes from whatever is there."""

    folder: Path
    model: nn.Module
    step: TrainStep
    source: BatchSource
    schedule: TrainingSchedule
    console: Console
    validate: Callable[[], Validation] | None = None  # called with the model in evaluation mode
    save_undecayed: Callable[[], None] | None = None
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.folder, self.model, self.step.optimizers)
        self.state = TrainingState()

    def run(self) -> TrainingState:
        """Trains to the end and leaves the last weights in the model, or the best where there are scores."""
        source, schedule, step, world = self.source, self.schedule, self.step, self.world
        self.state = state = self.checkpoints.load_latest()
        if len(set(world.gather(state.step))) > 1:
            message = f"{self.folder}: not the same on all machines"
            raise FastDraftError(message, "set run.folder to a disk that they share")
        if world.size > 1:
            step.replicas = Replicas(self.model, step.loss_sum)
        self.model.train()
        ahead = read_ahead(source, step.device, state.step, schedule.micro_batch_tokens, step.on_head)
        with (
            Metrics(self.folder, state.step, schedule.tensorboard, silent=not world.is_main) as metrics,
            self.console.progress(schedule.name, source.tokens, "tokens", completed=state.tokens) as progress,
            contextlib.closing(ahead),
        ):
            if state.step == 0 and schedule.validate_first and self.checkpoints.saved_step < 0:
                self._validate(metrics)
            while state.step < source.steps:
                batches, num_tokens, num_trained = self._read(ahead)
                begin, factor = time.perf_counter(), schedule.factor(state.step)
                loss, norm, _ = step.gradients(batches, num_trained)
                finite = math.isfinite(loss) and math.isfinite(norm)
                if finite:
                    step.update(factor)
                else:
                    step.skip()
                seconds = time.perf_counter() - begin
                state.add(num_tokens, num_trained, seconds, finite)
                record = {"step": state.step, "tokens": state.tokens, "loss": loss}
                record |= {"lr": schedule.peak_rate * factor, "grad_norm": norm}
                record["tokens_per_second"] = round(num_tokens / max(seconds, 1e-9), 1)
                metrics.write(**record, **({} if finite else {"skipped": True}))
                if not finite:
                    self._report_bad(record)
                progress.advance(num_tokens, f"loss {loss:.2f}")
                if state.step == schedule.undecayed_step and self.save_undecayed:
                    world.on_main(self.save_undecayed)
                if self._is_due(schedule.validate_every):
                    self._validate(metrics)
                if self._is_due(schedule.checkpoint_every):
                    self._save()
        if state.best_step >= 0 and state.best_step != state.step:
            world.on_main(lambda: self.checkpoints.load_best(state.best_step))
        self.model.eval()
        return state

    def _is_due(self, every: int) -> bool:
        return self.state.step == self.source.steps or bool(every and self.state.step % every == 0)

    def _read(self, ahead: Iterator[list[Batch]]) -> tuple[list[Batch], int, int]:
        """This process's micro-batches, input and trained tokens of all; ends all where one shall stop."""
        batches, failed = list[Batch](), None
        try:
            batches = next(ahead)
        except FastDraftError as error:
            failed = error
        counts = sum(batch.num_tokens for batch in batches), sum(batch.num_trained for batch in batches)
        found = self.world.gather((*counts, self.console.stop.requested, failed))
        tokens, trained, stops, errors = zip(*found, strict=True)
        for told in filter(None, errors):
            raise told
        if any(stops):
            self._save()
            raise Interrupted(f"{self.folder}: stopped by a signal; progress is saved")
        return batches, sum(tokens), sum(trained)

    def _report_bad(self, record: dict[str, float]) -> None:
        name, text = (
            self.schedule.name,
            "loss {loss:g}, gradient norm {grad_norm:g} at step {step}, rate {lr:.2g}",
        )
        found = f"{name}: {text.format(**record)}"
        if self.state.skipped_in_a_row >= BAD_STEPS_IN_A_ROW:
            fix = f"lower {name}.optimizer.learning_rate or set run.precision: fp32, then --redo {name}"
            raise FastDraftError(f"{found}: {BAD_STEPS_IN_A_ROW} steps in a row were not finite", fix)
        if self.world.is_main:
            self.console.warn(f"{found}: step left out")

    def _save(self) -> None:
        if self.checkpoints.saved_step != self.state.step:
            self.world.on_main(lambda: self.checkpoints.save(self.state))
            self.checkpoints.saved_step = self.state.step

    def _validate(self, metrics: Metrics) -> None:
        if self.validate is None:
            return
        self.model.eval()
        found, state = self.world.on_main(self.validate), self.state
        self.model.train()
        metrics.write(step=state.step, tokens=state.tokens, **found.metrics)
        if found.score is not None and (state.best_score is None or found.score > state.best_score):
            self.world.on_main(lambda: self.checkpoints.save_best(state.step))
            state.best_step, state.best_score = state.step, found.score
