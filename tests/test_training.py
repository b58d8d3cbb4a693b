"""The loop: one step's mathematics, exact resume, the best step, what happens when numbers go wrong."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastdraft.console import Console
from fastdraft.errors import DataError, FastDraftError, Interrupted, OutOfMemory
from fastdraft.training.batches import Batch, PackedBatches, Sample, padded_batch
from fastdraft.training.checkpoint import Checkpoints, optimizer_tensors
from fastdraft.training.metrics import read_metrics
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.optimizer import build_optimizers
from fastdraft.training.schedule import wsd_factor
from fastdraft.training.step import TrainStep
from fastdraft.training.trainer import BAD_STEPS_IN_A_ROW, Trainer, TrainingSchedule, Validation
from fastdraft.training.validation import mean_loss

VOCAB, HIDDEN, LENGTH = 23, 8, 12


class Decoder(torch.nn.Module):
    """A causal toy: running mean of embeddings through one matrix and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, HIDDEN)
        self.matrix = torch.nn.Linear(HIDDEN, HIDDEN)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        steps = torch.arange(1, input_ids.shape[1] + 1)[None, :, None]
        hidden = self.embed(input_ids).cumsum(1) / steps
        return SimpleNamespace(last_hidden_state=hidden + self.dropout(torch.tanh(self.matrix(hidden))))


class Model(torch.nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Decoder()
        self.model.dropout.p = dropout
        self.head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


class Rows:
    """Four rows a step, or as many as asked for."""

    row_length = LENGTH

    def __init__(self, rows_per_step: int = 4) -> None:
        self.rows_per_step = rows_per_step

    def rows(self, step: int, part: slice = slice(None)) -> np.ndarray:
        numbers = range(step * self.rows_per_step, (step + 1) * self.rows_per_step)[part]
        rows = [np.random.default_rng(i).integers(0, VOCAB, LENGTH + 1) for i in numbers]
        return np.array(rows, dtype=np.int64).reshape(-1, LENGTH + 1)


class Killed(Exception):
    pass


def source(steps: int = 12) -> PackedBatches:
    return PackedBatches(Rows(), steps)


def sample(prompt_ids: list[int], response_ids: list[int]) -> Sample:
    return Sample(np.array(prompt_ids, dtype=np.int32), np.array(response_ids, dtype=np.int32))


def make_step(model: Model, kind: str = "adamw", objective: Any = None) -> TrainStep:
    optimizers = build_optimizers(model, kind=kind, learning_rate=1e-2, embedding_learning_rate=2e-2)  # type: ignore[arg-type]
    parameters, device = list(model.parameters()), torch.device("cpu")
    return TrainStep(
        model.model, model.head.weight, parameters, optimizers, objective or CrossEntropy(1e-5), device
    )


def make_trainer(
    folder: Path,
    kind: str = "adamw",
    model: Model | None = None,
    objective: Any = None,
    rows_per_micro: int = 2,
    **schedule: Any,
) -> Trainer:
    model = model or Model()
    chosen = TrainingSchedule(
        "pretrain", lambda s: wsd_factor(s, 12, 0.1, 0.5), 1e-2, rows_per_micro * LENGTH, **schedule
    )
    return Trainer(folder, model, make_step(model, kind, objective), source(), chosen, Console(quiet=True))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def kill_at(trainer: Trainer, step: int) -> None:
    """Runs until `step` steps are done and leaves the process's work there, as a kill does."""
    update, done = trainer.step.update, []

    def counted(factor: float) -> None:
        if len(done) == step:
            raise Killed
        done.append(factor)
        update(factor)

    trainer.step.update = counted  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()


def test_the_micro_batch_size_does_not_change_the_gradient() -> None:
    found = []
    for rows_per_micro in (1, 2, 4):
        model = Model()
        step = make_step(model)
        found.append(
            (
                step.gradients(source().batches(0, rows_per_micro * LENGTH)),
                [p.grad.clone() for p in step.parameters],
            )
        )  # type: ignore[union-attr]
    for (loss, norm, trained), gradients in found[1:]:
        assert (loss, norm, trained) == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradients, found[0][1])


def test_the_mean_is_over_trained_tokens_not_over_micro_batches() -> None:
    samples = [sample([1, 2, 3], [4, 5, 6, 7, 8]), sample([1], [9])]
    step = make_step(Model(), objective=CrossEntropy())
    apart, _, trained = step.gradients([padded_batch([sample], 0) for sample in samples])
    together, _, _ = step.gradients([padded_batch(samples, 0)])
    assert trained == 6
    assert apart == pytest.approx(together, rel=1e-6)
    assert mean_loss(step, [padded_batch(samples, 0)]) == pytest.approx(together, rel=1e-6)


def test_the_whole_gradient_is_clipped_to_one() -> None:
    model = Model()
    with torch.no_grad():
        model.head.weight.mul_(30)
    step = make_step(model)
    _, norm, _ = step.gradients(source().batches(0))
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for p in step.parameters))  # type: ignore[union-attr]
    assert norm > 1.5
    assert clipped == pytest.approx(1.0, rel=1e-4)


def test_bf16_autocast_trains_fp32_weights() -> None:
    model = Model()
    step = dataclasses.replace(make_step(model), autocast=torch.bfloat16)
    first = step.gradients(source().batches(0))[0]
    step.update(1.0)
    for _ in range(10):
        last = step.gradients(source().batches(0))[0]
        step.update(1.0)
    assert last < first
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("killed_at", [0, 3, 7, 8])
def test_a_killed_run_ends_with_the_very_weights_of_an_undisturbed_one(
    tmp_path: Path, kind: str, killed_at: int
) -> None:
    undisturbed, killed, resumed = (
        make_trainer(tmp_path / name, kind, Model(dropout=0.2), checkpoint_every=3) for name in "abb"
    )
    torch.manual_seed(5)
    undisturbed.run()
    torch.manual_seed(5)
    kill_at(killed, killed_at)
    if killed_at >= 3:  # then neither the fresh weights nor the fresh random state may matter
        with torch.no_grad():
            for parameter in resumed.model.parameters():
                parameter.add_(1.0)
    torch.manual_seed(5 if killed_at < 3 else 99)
    state = resumed.run()
    assert state.step == 12
    assert state.tokens == 12 * 4 * LENGTH
    assert_same(weights(undisturbed.model), weights(resumed.model))
    first, second = (optimizer_tensors(t.model, t.step.optimizers) for t in (undisturbed, resumed))
    assert_same(first, second)
    records = [
        [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in read_metrics(tmp_path / name)]
        for name in "ab"
    ]
    assert records[0] == records[1]
    assert [r["step"] for r in records[0]] == list(range(1, 13))


def test_a_stop_saves_at_the_very_step_and_the_next_run_goes_on(tmp_path: Path) -> None:
    undisturbed = make_trainer(tmp_path / "a")
    undisturbed.run()
    trainer = make_trainer(tmp_path / "b")
    update = trainer.step.update

    def stop_soon(factor: float) -> None:
        update(factor)
        trainer.console.stop.requested = trainer.state.step == 4

    trainer.step.update = stop_soon  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        trainer.run()
    assert [folder.name for folder in (tmp_path / "b/steps").iterdir()] == ["step-000000005"]
    resumed = make_trainer(tmp_path / "b")
    resumed.run()
    assert_same(weights(undisturbed.model), weights(resumed.model))


def test_only_the_last_two_checkpoints_are_kept_and_no_pickle_is_written(tmp_path: Path) -> None:
    make_trainer(tmp_path, checkpoint_every=2).run()
    folders = sorted(folder.name for folder in (tmp_path / "steps").iterdir())
    assert folders == ["step-000000010", "step-000000012"]
    assert {path.suffix for path in (tmp_path / "steps").rglob("*") if path.is_file()} == {
        ".safetensors",
        ".json",
    }


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_an_unreadable_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = make_trainer(tmp_path / "a")
    undisturbed.run()
    kill_at(make_trainer(tmp_path / "b", checkpoint_every=3), 8)
    damaged = tmp_path / "b/steps/step-000000006" / file
    damaged.write_bytes(damaged.read_bytes()[:-2])
    resumed = make_trainer(tmp_path / "b", checkpoint_every=3)
    resumed.run()
    assert "trying the one before" in capsys.readouterr().err
    assert_same(weights(undisturbed.model), weights(resumed.model))


def test_when_no_checkpoint_can_be_read_the_error_says_what_to_do(tmp_path: Path) -> None:
    kill_at(make_trainer(tmp_path, checkpoint_every=3), 8)
    for path in tmp_path.glob("steps/*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(FastDraftError, match="--redo"):
        make_trainer(tmp_path, checkpoint_every=3).run()


def test_the_weights_with_the_best_score_are_the_result_even_after_a_kill(tmp_path: Path) -> None:
    scores = {0: 0.1, 2: 0.5, 4: 0.9, 6: 0.3, 8: 0.2, 10: 0.7, 12: 0.4}

    def with_scores(folder: Path) -> Trainer:
        trainer = make_trainer(folder, checkpoint_every=3, validate_every=2, validate_first=True)
        trainer.validate = lambda: Validation(
            {"score": scores[trainer.state.step]}, scores[trainer.state.step]
        )
        return trainer

    undisturbed = with_scores(tmp_path / "a")
    assert undisturbed.run().best_step == 4
    kill_at(with_scores(tmp_path / "b"), 8)
    resumed = with_scores(tmp_path / "b")
    state = resumed.run()
    assert (state.best_step, state.best_score) == (4, 0.9)
    assert_same(weights(undisturbed.model), weights(resumed.model))
    short = make_trainer(tmp_path / "c", checkpoint_every=0)
    short.source = source(steps=4)
    short.run()
    assert_same(weights(short.model), weights(resumed.model))


def test_a_best_score_that_is_not_yet_in_a_checkpoint_does_not_replace_the_older_best(tmp_path: Path) -> None:
    scores = {2: 0.5, 4: 0.6, 6: 0.7, 8: 0.8, 10: 0.1, 12: 0.1}
    trainer = make_trainer(tmp_path, checkpoint_every=5, validate_every=2)
    trainer.validate = lambda: Validation({}, scores[trainer.state.step])
    kill_at(trainer, 9)
    assert {f.name for f in tmp_path.glob("steps/best-*")} == {
        "best-000000004",
        "best-000000006",
        "best-000000008",
    }
    state = Checkpoints(tmp_path, trainer.model, trainer.step.optimizers, trainer.console).load_latest()
    assert (state.step, state.best_step) == (5, 4)


def test_undecayed_weights_are_handed_out_at_their_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, undecayed_step=6)
    seen = []
    trainer.save_undecayed = lambda: seen.append(trainer.state.step)
    trainer.run()
    assert seen == [6]


class Poisoned(CrossEntropy):
    """Gives NaN at the asked calls."""

    calls = 0

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        object.__setattr__(self, "bad", bad)

    def loss(self, hidden_ND: torch.Tensor, head_VD: torch.Tensor, batch: Any) -> torch.Tensor:
        object.__setattr__(self, "calls", self.calls + 1)
        return super().loss(hidden_ND, head_VD, batch) * (math.nan if self.calls in self.bad else 1.0)  # type: ignore[attr-defined]


def test_a_step_with_a_nan_loss_is_left_out_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, objective=Poisoned({5}))
    state = trainer.run()
    assert state.skipped == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert "step 3" in capsys.readouterr().err
    skipped = [r for r in read_metrics(tmp_path) if r.get("skipped")]
    assert [r["step"] for r in skipped] == [3]
    assert skipped[0]["loss"] is None


def test_three_nan_losses_in_a_row_end_the_run_naming_step_and_rate(tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match=r"step 5, rate 0\.01.*learning_rate"):
        make_trainer(tmp_path, objective=Poisoned({5, 7, 9})).run()


def test_a_batch_without_trained_tokens_is_an_error() -> None:
    with pytest.raises(DataError, match="0 trained tokens"):
        make_step(Model()).gradients([])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_left_out_moves_neither_weights_nor_optimiser(tmp_path: Path, kind: str) -> None:
    trainer, seen = make_trainer(tmp_path, kind, objective=Poisoned({6}), validate_every=1), {}

    def look() -> Validation:
        tensors = optimizer_tensors(trainer.model, trainer.step.optimizers)
        seen[trainer.state.step] = {k: v.clone() for k, v in {**weights(trainer.model), **tensors}.items()}
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

    def overflowing(*given: Any) -> tuple[float, float, int]:
        loss, norm, trained = gradients(*given)
        return loss, math.inf if trainer.state.step == 4 else norm, trained

    trainer.step.gradients = overflowing  # type: ignore[method-assign]
    assert trainer.run().skipped == 1


CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:120] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


def small_device(trainer: Trainer, tokens: int, error: Exception) -> Trainer:
    """Lets a micro-batch of more than `tokens` fail, with gradients of its own already there."""
    loss_sum = trainer.step.loss_sum

    def limited_loss(batch: Batch) -> torch.Tensor:
        loss = loss_sum(batch)
        if batch.input_ids.numel() > tokens:
            torch.autograd.backward(loss)
            raise error
        return loss

    trainer.step.loss_sum = limited_loss  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError(CPU_MESSAGE)])
def test_when_memory_runs_out_the_same_rows_are_trained_in_smaller_micro_batches(
    tmp_path: Path, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    wide, narrow = (
        make_trainer(tmp_path / "a", rows_per_micro=4),
        make_trainer(tmp_path / "b", rows_per_micro=1),
    )
    assert small_device(wide, LENGTH, error).run().micro_batch_limit == LENGTH
    narrow.run()
    assert_same(weights(wide.model), weights(narrow.model))
    said = capsys.readouterr().err
    assert said.count("pretrain: out of memory at step 1: micro-batches of at most") == 2  # 4 rows -> 2 -> 1
    changed = [record for record in read_metrics(tmp_path / "a") if "micro_batch_limit" in record]
    assert [(record["step"], record["micro_batch_limit"]) for record in changed] == [(1, LENGTH)]


def test_a_row_that_does_not_fit_alone_ends_the_run_in_one_line(tmp_path: Path) -> None:
    trainer = small_device(make_trainer(tmp_path), LENGTH - 1, MemoryError())
    with pytest.raises(
        OutOfMemory, match=r"pretrain: out of memory at step 1 with one row; .*micro_batch_tokens"
    ):
        trainer.run()


def test_errors_of_another_kind_are_not_taken_for_missing_memory(tmp_path: Path) -> None:
    trainer = small_device(make_trainer(tmp_path), 1, RuntimeError("a fault in the code"))
    with pytest.raises(RuntimeError, match="a fault in the code"):
        trainer.run()
