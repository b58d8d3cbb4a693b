"""What the loop does when a step goes wrong: memory that runs out, numbers that are not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdraft.errors import FastDraftError, Interrupted, is_out_of_memory
from fastdraft.training.batches import Batch, Sample, padded_batch
from fastdraft.training.checkpoint import optimizer_tensors
from fastdraft.training.memory import cut_rows, halved_limit, limited, within_memory
from fastdraft.training.metrics import read_metrics
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.trainer import BAD_STEPS_IN_A_ROW, Trainer, Validation, mean_loss
from test_training import (
    LENGTH,
    Model,
    Poisoned,
    assert_same,
    kill_at,
    make_step,
    make_trainer,
    source,
    weights,
)

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:120] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
ERRORS = [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError(CPU_MESSAGE)]


def small_device(trainer: Trainer, tokens: int, error: Exception = ERRORS[0]) -> Trainer:
    """Lets a micro-batch of more than `tokens` fail, in its backward pass, with gradients of earlier ones already there."""
    loss_sum = trainer.step.loss_sum

    def limited_loss(batch: Batch) -> torch.Tensor:
        loss = loss_sum(batch)
        if batch.input_ids.numel() > tokens:
            torch.autograd.backward(loss)
            raise error
        return loss

    trainer.step.loss_sum = limited_loss  # type: ignore[method-assign]
    return trainer


def equal_records(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in record.items() if k not in ("tokens_per_second", "micro_batch_limit")}
        for record in read_metrics(folder)
    ]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_recognised_on_every_kind_of_device(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_when_memory_runs_out_the_same_batch_is_trained_in_smaller_micro_batches(
    tmp_path: Path, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    wide, narrow = make_trainer(tmp_path / "a"), make_trainer(tmp_path / "b")
    wide.source = source(rows_per_micro=4)
    narrow.source = source(rows_per_micro=1)
    state = small_device(wide, LENGTH, error).run()
    narrow.run()
    assert_same(weights(wide.model), weights(narrow.model))
    assert equal_records(tmp_path / "a") == equal_records(tmp_path / "b")
    assert state.micro_batch_limit == LENGTH
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "out of memory at step 1: micro-batches of at most" in line] == said
    assert len(said) == 2  # 4 rows -> 2 -> 1, and never again
    assert [
        (r["step"], r["micro_batch_limit"]) for r in read_metrics(tmp_path / "a") if "micro_batch_limit" in r
    ] == [(1, LENGTH)]


def test_the_smaller_micro_batch_is_kept_by_a_resumed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = make_trainer(tmp_path / "a")
    undisturbed.source = source(rows_per_micro=1)
    undisturbed.run()
    kill_at(small_device(make_trainer(tmp_path / "b", checkpoint_every=3), LENGTH), 4)
    capsys.readouterr()
    resumed = small_device(make_trainer(tmp_path / "b"), LENGTH)
    assert resumed.run().micro_batch_limit == LENGTH
    assert "out of memory" not in capsys.readouterr().err
    assert_same(weights(undisturbed.model), weights(resumed.model))


def test_a_row_that_does_not_fit_alone_ends_the_run_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        FastDraftError, match=rf"pretrain: out of memory with one row of {LENGTH} tokens: .*shorter rows"
    ):
        small_device(make_trainer(tmp_path), LENGTH - 1).run()


def test_an_update_that_does_not_fit_is_not_tried_again(tmp_path: Path) -> None:
    trainer, calls = make_trainer(tmp_path), []

    def full(factor: float) -> None:
        calls.append(factor)
        raise MemoryError

    trainer.step.update = full  # type: ignore[method-assign]
    with pytest.raises(FastDraftError, match="out of memory in the update"):
        trainer.run()
    assert len(calls) == 1


def test_errors_of_another_kind_are_not_taken_for_missing_memory(tmp_path: Path) -> None:
    trainer = small_device(make_trainer(tmp_path), 1, RuntimeError("a fault in the code"))
    with pytest.raises(RuntimeError, match="a fault in the code"):
        trainer.run()


def test_validation_that_does_not_fit_is_done_in_pieces_with_the_same_loss(tmp_path: Path) -> None:
    batches = [
        *source(rows_per_micro=4).batches(0),
        padded_batch([Sample([1, 2, 3], [4, 5, 6, 7, 8]), Sample([1], [9])], 0),
    ]
    step = make_step(Model(), objective=CrossEntropy())
    wanted, loss_sum = mean_loss(step, batches), step.loss_sum
    step.loss_sum = lambda batch: loss_sum(batch) if batch.input_ids.shape[0] == 1 else _raise(MemoryError())  # type: ignore[method-assign]
    assert mean_loss(step, batches) == pytest.approx(wanted, rel=1e-6)
    step.loss_sum = lambda batch: _raise(MemoryError())  # type: ignore[method-assign]
    with pytest.raises(FastDraftError, match="validation: out of memory"):
        mean_loss(step, batches)


def _raise(error: Exception) -> Any:
    raise error


def test_work_is_halved_until_it_fits() -> None:
    tried = []

    def work(size: int) -> str:
        tried.append(size)
        return "done" if size <= 3 else _raise(MemoryError())

    assert within_memory(work, 20, 1, "x") == "done"
    assert tried == [20, 10, 5, 2]


def test_cut_micro_batches_hold_the_same_rows_labels_and_loss() -> None:
    samples = [
        Sample([1, 2, 3], [4, 5, 6, 7, 8]),
        Sample([1], [9]),
        Sample([2, 2], [3, 4, 5]),
        Sample([], [6, 7]),
    ]
    padded, packed = padded_batch(samples, 0), source(rows_per_micro=4).batches(0)[0]
    step = make_step(Model(), objective=CrossEntropy())
    for batch in (padded, packed):
        pieces = limited([batch], batch.input_ids.shape[1] * 2)
        assert [piece.input_ids.shape[0] for piece in pieces] == [2, 2]
        assert sum(piece.num_tokens for piece in pieces) == batch.num_tokens
        assert sum(piece.num_trained for piece in pieces) == batch.num_trained
        torch.testing.assert_close(sum(step.loss_sum(piece) for piece in pieces), step.loss_sum(batch))
        assert limited([batch], 0) == limited([batch], batch.input_ids.numel()) == [batch]
    alone = [cut_rows(padded, row, row + 1) for row in range(4)]
    assert [piece.input_ids.shape[1] for piece in alone] == [sample.num_tokens for sample in samples]
    assert halved_limit(alone) == 0
    assert halved_limit([*alone, padded]) == padded.input_ids.numel() // 2


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_left_out_moves_neither_weights_nor_optimiser(tmp_path: Path, kind: str) -> None:
    trainer, seen = make_trainer(tmp_path, kind, objective=Poisoned({6}), validate_every=1), {}

    def look() -> Validation:
        tensors = optimizer_tensors(trainer.model, trainer.step.optimizers)
        seen[trainer.state.step] = {
            name: value.clone() for name, value in {**weights(trainer.model), **tensors}.items()
        }
        return Validation({})

    trainer.validate = look
    trainer.run()  # two micro-batches a step: the second one of step 3 is bad, the first one was not
    assert_same(seen[2], seen[3])
    assert any(not torch.equal(value, seen[4][name]) for name, value in seen[3].items())


def test_the_count_of_bad_steps_in_a_row_goes_on_over_a_restart(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, objective=Poisoned({3, 5}), checkpoint_every=1)
    report = trainer._report_bad

    def stop_after_the_second(*found: float) -> None:
        report(*found)
        trainer.console.stop.requested = trainer.state.skipped_in_a_row == BAD_STEPS_IN_A_ROW - 1

    trainer._report_bad = stop_after_the_second  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        trainer.run()
    with pytest.raises(FastDraftError, match=f"step 4.*{BAD_STEPS_IN_A_ROW} steps in a row"):
        make_trainer(tmp_path, objective=Poisoned({1})).run()


def test_an_infinite_gradient_of_a_finite_loss_is_left_out_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    gradients = trainer.step.gradients

    def overflowing(batches: Any) -> tuple[float, float, int]:
        loss, norm, trained = gradients(batches)
        return loss, math.inf if trainer.state.step == 4 else norm, trained

    trainer.step.gradients = overflowing  # type: ignore[method-assign]
    assert trainer.run().skipped == 1
