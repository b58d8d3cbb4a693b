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
from fastdraft.errors import DataError, FastDraftError, Interrupted
from fastdraft.training.batches import PackedBatches, Sample, padded_batch
from fastdraft.training.checkpoint import Checkpoints, optimizer_tensors
from fastdraft.training.metrics import read_metrics
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.optimizer import build_optimizers, wsd_factor
from fastdraft.training.step import TrainStep
from fastdraft.training.trainer import Trainer, TrainingSchedule, Validation
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
    folder: Path, kind: str = "adamw", model: Model | None = None, objective: Any = None, **schedule: Any
) -> Trainer:
    model = model or Model()
    chosen = TrainingSchedule("pretrain", lambda s: wsd_factor(s, 12, 0.1, 0.5), 1e-2, 2 * LENGTH, **schedule)
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
        step = make_step(Model())
        numbers = step.gradients(source().batches(0, rows_per_micro * LENGTH))
        found.append((numbers, [p.grad.clone() for p in step.parameters]))  # type: ignore[union-attr]
    for numbers, gradients in found[1:]:
        assert numbers == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradients, found[0][1])


def test_the_mean_is_over_trained_tokens_not_over_micro_batches() -> None:
    samples = [sample([1, 2, 3], [4, 5, 6, 7, 8]), sample([1], [9])]
    step = make_step(Model(), objective=CrossEntropy())
    apart, _, trained = step.gradients([padded_batch([sample]) for sample in samples])
    together, _, _ = step.gradients([padded_batch(samples)])
    assert trained == 6
    assert apart == pytest.approx(together, rel=1e-6)
    assert mean_loss(step, [padded_batch(samples)]) == pytest.approx(together, rel=1e-6)


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
    model, losses = Model(), []
    step = dataclasses.replace(make_step(model), autocast=torch.bfloat16)
    for _ in range(11):
        losses.append(step.gradients(source().batches(0))[0])
        step.update(1.0)
    assert losses[-1] < losses[0]
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
    assert (state.step, state.tokens) == (12, 12 * 4 * LENGTH)
    assert_same(weights(undisturbed.model), weights(resumed.model))
    assert_same(*(optimizer_tensors(t.model, t.step.optimizers) for t in (undisturbed, resumed)))
    first, second = (read_metrics(tmp_path / name) for name in "ab")
    untimed = {"tokens_per_second": 0}
    assert [r | untimed for r in first] == [r | untimed for r in second]
    assert [r["step"] for r in first] == list(range(1, 13))


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


def test_only_the_last_checkpoint_is_kept_and_no_pickle_is_written(tmp_path: Path) -> None:
    make_trainer(tmp_path, checkpoint_every=2).run()
    assert [folder.name for folder in (tmp_path / "steps").iterdir()] == ["step-000000012"]
    assert {path.suffix for path in tmp_path.glob("steps/*/*")} == {".safetensors", ".json"}


def test_the_weights_with_the_best_score_are_the_result_even_after_a_kill(tmp_path: Path) -> None:
    scores = {0: 0.1, 2: 0.5, 4: 0.9, 6: 0.3, 8: 0.2, 10: 0.7, 12: 0.4}

    def with_scores(folder: Path) -> Trainer:
        trainer = make_trainer(folder, checkpoint_every=3, validate_every=2, validate_first=True)
        trainer.validate = lambda: Validation({}, scores[trainer.state.step])
        return trainer

    undisturbed = with_scores(tmp_path / "a")
    assert undisturbed.run().best_step == 4
    kill_at(with_scores(tmp_path / "b"), 8)
    resumed = with_scores(tmp_path / "b")
    state = resumed.run()
    assert (state.best_step, state.best_score) == (4, 0.9)
    assert_same(weights(undisturbed.model), weights(resumed.model))
    short = make_trainer(tmp_path / "c")
    short.source = source(steps=4)
    short.run()
    assert_same(weights(short.model), weights(resumed.model))


def test_a_best_score_that_is_not_yet_in_a_checkpoint_does_not_replace_the_older_best(tmp_path: Path) -> None:
    scores = {2: 0.5, 4: 0.6, 6: 0.7, 8: 0.8, 10: 0.1, 12: 0.1}
    trainer = make_trainer(tmp_path, checkpoint_every=5, validate_every=2)
    trainer.validate = lambda: Validation({}, scores[trainer.state.step])
    kill_at(trainer, 9)
    assert {f.name[-1] for f in tmp_path.glob("steps/best-*")} == set("468")
    state = Checkpoints(tmp_path, trainer.model, trainer.step.optimizers).load_latest()
    assert (state.step, state.best_step) == (5, 4)


def test_undecayed_weights_are_handed_out_at_their_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, undecayed_step=6)
    seen = []
    trainer.save_undecayed = lambda: seen.append(trainer.state.step)
    trainer.run()
    assert seen == [6]


class Poisoned(CrossEntropy):
    """Gives NaN at the asked calls."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        object.__setattr__(self, "calls", iter(number in bad for number in range(1, 10_000)))

    def loss(self, hidden_ND: torch.Tensor, head_VD: torch.Tensor, batch: Any) -> torch.Tensor:
        found = super().loss(hidden_ND, head_VD, batch)
        return found * (math.nan if next(self.calls) else 1.0)  # type: ignore[attr-defined]


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


def test_an_infinite_gradient_of_a_finite_loss_is_left_out_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    gradients = trainer.step.gradients

    def overflowing(*given: Any) -> tuple[float, float, int]:
        loss, norm, trained = gradients(*given)
        return loss, math.inf if trainer.state.step == 4 else norm, trained

    trainer.step.gradients = overflowing  # type: ignore[method-assign]
    assert trainer.run().skipped == 1
