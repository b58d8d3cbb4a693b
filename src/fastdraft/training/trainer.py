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
from fastdraft.errors import FastDraftError, Interrupted, is_out_of_memory
from fastdraft.training.batches import Batch, BatchSource
from fastdraft.training.checkpoint import Checkpoints, TrainingState
from fastdraft.training.distributed import World, current
from fastdraft.training.memory import cut_rows, halved_limit, limited, release_memory, within_memory
from fastdraft.training.metrics import Metrics
from fastdraft.training.replicas import IDLE, DataParallel, ElsewhereOutOfMemory
from fastdraft.training.sharding import Sharded, gather_into, is_in_parts
from fastdraft.training.step import TrainStep
from fastdraft.training.transfer import arrive

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


@dataclass(frozen=True)
class Prepared:
    """One step's data as this process sees it, and what all know of it."""

    batches: list[Batch]
    """Of this process's share."""
    num_tokens: int
    """Input tokens of all processes."""
    num_trained: int
    """Trained tokens of all processes."""
    largest: int
    """Padded tokens of the largest micro-batch of any process."""
    stop: bool
    """Whether any process was asked to stop."""


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
    trained: nn.Module | None = None
    """What the step trains where that is a copy of the model in parts (training/sharding.py)."""
    state: TrainingState = field(default_factory=TrainingState, init=False)

    def __post_init__(self) -> None:
        self.world: World = current()
        self.checkpoints = Checkpoints(self.folder, self._trained, self.step.optimizers, self.console)
        self._proven = 0
        """Padded tokens of the largest micro-batch that has been through a step."""

    @property
    def _trained(self) -> nn.Module:
        return self.model if self.trained is None else self.trained

    def run(self) -> TrainingState:
        """Trains to the end and leaves the final weights (the best ones, where validation gives a score) in the model.

        Raises:
            FastDraftError: losses are NaN or infinite several steps in a row, a batch has no trained tokens, or one row does not fit.
            Interrupted: a stop was asked for; a checkpoint is saved.
        """
        self._load()
        plan, total = self.plan, self.source.tokens
        self._peers = self._join_peers()
        self._trained.train()
        with (
            Metrics(self.folder, self.state.step, plan.tensorboard, silent=not self.world.is_main) as metrics,
            self.console.progress(plan.title, total, "tokens", completed=self.state.tokens) as progress,
            ThreadPoolExecutor(1) as ahead,
        ):
            if self.state.step == 0 and plan.validate_first and self.checkpoints.saved_step < 0:
                self._validate(metrics)
            coming: Future[Prepared] | None = None
            while self.state.step < self.source.steps:
                prepared = coming.result() if coming else self._prepare(self.state.step)
                if prepared.stop and self.world.size > 1:
                    self._stop()
                if self.state.step + 1 < self.source.steps:
                    coming = ahead.submit(self._prepare, self.state.step + 1)
                self._train(prepared, metrics, progress)
                self._after_step(metrics)
        if self.state.best_step >= 0 and self.state.best_step != self.state.step:
            self.world.on_main(lambda: self.checkpoints.load_best(self.state.best_step, self.model))
        else:
            self._collect()
        self.model.eval()
        return self.state

    def _load(self) -> None:
        """Goes on from the newest checkpoint, the same one in all processes.

        Raises:
            FastDraftError: when they do not find the same.
        """
        if self.world.is_main:
            self.checkpoints.sweep()
        self.state = self.checkpoints.load_latest()
        steps = sorted({step for (step,) in self.world.gather([self.state.step])})
        if len(steps) > 1:
            found = f"checkpoints of steps {steps[0]} and {steps[-1]}, depending on the machine"
            raise FastDraftError(
                self.checkpoints.folder,
                found,
                "all machines must see one folder",
                "set run.folder to a shared disk",
            )

    def _join_peers(self) -> DataParallel | Sharded | None:
        if self.world.size == 1:
            return None
        peers = (
            Sharded(self._trained, self.world)
            if is_in_parts(self._trained)
            else DataParallel(self.model, self.world)
        )
        self.step.peers = peers
        return peers

    def _collect(self) -> None:
        """Puts the trained weights into the model of process 0, where they are in parts."""
        if self._trained is not self.model:
            gather_into(self.model, self._trained, self.world)

    def _prepare(self, step: int) -> Prepared:
        """Reads a step's data, in another thread while the step before is trained, and agrees on what all must know.

        Raises:
            FastDraftError: what this process met when it read its share, or another one met.
        """
        batches: list[Batch] = []
        failed = None
        try:
            batches = self.source.batches(step)
        except FastDraftError as error:
            failed = error
        counts = (sum(batch.num_tokens for batch in batches), sum(batch.num_trained for batch in batches))
        size = max((batch.input_ids.numel() for batch in batches), default=0)
        found = self.world.gather(
            [*counts, size, int(self.console.stop.requested), int(failed is not None)], ahead=True
        )
        tokens, trained, sizes, stops, failures = zip(*found, strict=True)
        if any(failures):
            self.world.raise_first(failed, ahead=True)
        return Prepared(batches, sum(tokens), sum(trained), max(sizes), any(stops))

    def _train(self, prepared: Prepared, metrics: Metrics, progress: Progress) -> None:
        state, begin = self.state, time.perf_counter()
        factor, limit = self.plan.factor(state.step), state.micro_batch_limit
        loss, norm, num_trained = self._gradients(prepared)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self._update(factor)
        else:
            self.step.skip()
        num_tokens, seconds = prepared.num_tokens, time.perf_counter() - begin
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
            step=state.step,
            tokens=state.tokens,
            loss=loss,
            lr=self.plan.peak_rate * factor,
            grad_norm=norm,
            tokens_per_second=round(num_tokens / max(seconds, 1e-9), 1),
            **events,
        )
        if not finite:
            self._report_bad(loss, norm, factor)
        progress.advance(num_tokens, f"loss {loss:.2f}")

    def _gradients(self, prepared: Prepared) -> tuple[float, float, int]:
        """The step's gradients; where memory runs out, of the same batch again in smaller micro-batches, from then on.

        Raises:
            FastDraftError: when one row alone does not fit.
        """
        for batch in prepared.batches:
            arrive(batch)  # before it is cut: the copy to the device may be under way
        while True:
            pieces = limited(prepared.batches, self.state.micro_batch_limit)
            size = min(filter(None, (prepared.largest, self.state.micro_batch_limit)))
            if self._peers:
                self._peers.begin(overlap=size <= self._proven)
            try:
                found = (
                    self._joint_gradients(pieces, prepared) if self._peers else self.step.gradients(pieces)
                )
                self._proven = max(self._proven, size)
                return found
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                elsewhere = isinstance(error, ElsewhereOutOfMemory)
            self.step.skip()
            release_memory(self.step.device)
            self._take_less(pieces, elsewhere)

    def _joint_gradients(self, pieces: list[Batch], prepared: Prepared) -> tuple[float, float, int]:
        if isinstance(self._peers, Sharded):
            pieces = self._peers.evened(pieces)
        return self.step.gradients(pieces or [IDLE], prepared.num_trained)

    def _take_less(self, pieces: list[Batch], elsewhere: bool) -> None:
        """Halves the micro-batches of all processes.

        Raises:
            FastDraftError: when one row alone does not fit.
            FastDraftError: when the others cannot be told in the middle of this step; all go on from the latest checkpoint then.
        """
        key, peers = self.plan.key, self._peers
        if peers and peers.committed:
            self.checkpoints.note_limit(halved_limit(pieces) or 1)
            raise FastDraftError(
                key,
                "out of memory in a step like one that fitted",
                "all processes must fit",
                "smaller micro-batches follow",
            )
        if peers and not elsewhere:
            peers.report_out_of_memory()
        limit = max(value for (value,) in self.world.gather([halved_limit(pieces)]))
        if not limit:
            length = max((batch.input_ids.shape[1] for batch in pieces), default=0)
            rule, remedy = (
                "one row at a time must fit the device",
                "use shorter rows, a smaller draft or a device with more memory",
            )
            raise FastDraftError(key, f"out of memory with one row of {length} tokens", rule, remedy)
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
            raise FastDraftError(
                self.plan.key,
                "out of memory in the update",
                rule,
                "use a smaller draft or a device with more memory",
            ) from error

    def _report_bad(self, loss: float, norm: float, factor: float) -> None:
        found = f"loss {loss:g}, gradient norm {norm:g} at step {self.state.step}, rate {self.plan.peak_rate * factor:.2g}"
        if self.state.skipped_in_a_row >= BAD_STEPS_IN_A_ROW:
            rule = f"{BAD_STEPS_IN_A_ROW} steps in a row were not finite"
            remedy = f"lower {self.plan.key}.optimizer.learning_rate or set precision: fp32, then --redo {self.plan.key}"
            raise FastDraftError(self.plan.key, found, rule, remedy)
        self.console.warn(f"{self.plan.key}: {found}: step left out")

    def _after_step(self, metrics: Metrics) -> None:
        plan, step, last = self.plan, self.state.step, self.state.step == self.source.steps
        if step == plan.undecayed_step and self.save_undecayed:
            self._collect()
            self.world.on_main(self.save_undecayed)
        if last or (plan.validate_every and step % plan.validate_every == 0):
            self._validate(metrics)
        if self.world.size == 1 and self.console.stop.requested:
            self._stop()
        if last or (plan.checkpoint_every and step % plan.checkpoint_every == 0):
            self._save()

    def _save(self) -> None:
        if is_in_parts(self._trained):
            self.checkpoints.save_parts(self.state, self.world)
        else:
            self.world.on_main(lambda: self.checkpoints.save(self.state))
        self.checkpoints.saved_step = self.state.step

    def _stop(self) -> None:
        """Raises:
        Interrupted: after a checkpoint, at the same step in all processes.
        """
        if self.checkpoints.saved_step != self.state.step:
            self._save()
        raise Interrupted(self.folder)

    def _validate(self, metrics: Metrics) -> None:
        if self.validate is None:
            return
        self._collect()
        found = self.world.on_main(self._measure)
        metrics.write(step=self.state.step, tokens=self.state.tokens, **found["metrics"])
        best = -math.inf if self.state.best_score is None else self.state.best_score
        if found["score"] is not None and found["score"] > best:
            self.world.on_main(lambda: self.checkpoints.save_best(self.state.step, self.model))
            self.state.best_step, self.state.best_score = self.state.step, found["score"]

    def _measure(self) -> dict[str, Any]:
        assert self.validate is not None
        self.model.eval()
        found = self.validate()
        self.model.train()
        return {"metrics": found.metrics, "score": found.score}


def mean_loss(step: TrainStep, batches: list[Batch]) -> float:
    """The objective's mean over all trained tokens, in nats, without touching gradients; in smaller pieces where memory runs out.

    Raises:
        FastDraftError: when one row alone does not fit.
    """
    with torch.no_grad():
        total = sum(_loss_sum(step, batch) for batch in batches)
    return total / max(1, sum(batch.num_trained for batch in batches))


def _loss_sum(step: TrainStep, batch: Batch) -> float:
    rows = batch.input_ids.shape[0]

    def in_pieces(size: int) -> float:
        whole = size >= rows
        starts = range(0, rows, size)
        return sum(
            float(step.loss_sum(batch if whole else cut_rows(batch, at, min(at + size, rows))))
            for at in starts
        )

    return within_memory(in_pieces, rows, 1, "validation")


def final_train_loss(records: list[dict[str, Any]], share: float = 0.1) -> float | None:
    """Mean training loss over the last `share` of the recorded steps."""
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    tail = losses[-max(1, round(len(losses) * share)) :]
    return sum(tail) / len(tail) if tail else None
