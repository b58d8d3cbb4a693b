"""The loop and its parts: schedules, groups, batches, exact resume, what happens when numbers go wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastdraft.console import Console
from fastdraft.errors import ArtifactError, Interrupted, MissingExtraError, TrainingError
from fastdraft.training import rates
from fastdraft.training.batches import (
    AlignmentBatches,
    PackedBatches,
    Sample,
    cut_to_context,
    micro_batches,
    packed_batch,
    padded_batch,
    plan_batches,
)
from fastdraft.training.checkpoint import Checkpoints, TrainingState, optimizer_tensors
from fastdraft.training.metrics import Metrics, read_metrics
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.optimizer import build_optimizers, set_rate, split_parameters
from fastdraft.training.schedule import cosine_factor, decay_start, warmup_steps, wsd_factor
from fastdraft.training.step import TrainStep, autocast_dtype
from fastdraft.training.trainer import Plan, Trainer, Validation, final_train_loss, mean_loss

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
    def rows(self, start: int, count: int) -> np.ndarray:
        return np.stack([np.random.default_rng(i).integers(0, VOCAB, LENGTH + 1) for i in range(start, start + count)])


class Killed(Exception):
    pass


def source(steps: int = 12, rows_per_micro: int = 2) -> PackedBatches:
    return PackedBatches(Rows(), steps, LENGTH, 4, rows_per_micro)


def make_step(model: Model, kind: str = "adamw", objective: Any = None) -> TrainStep:
    optimizers = build_optimizers(model, kind=kind, learning_rate=1e-2, embedding_learning_rate=2e-2)  # type: ignore[arg-type]
    parameters, device = list(model.parameters()), torch.device("cpu")
    return TrainStep(model.model, model.head.weight, parameters, optimizers, objective or CrossEntropy(1e-5), device)


def make_trainer(folder: Path, kind: str = "adamw", model: Model | None = None, objective: Any = None, **plan: Any) -> Trainer:
    model = model or Model()
    chosen = Plan(title="t", key="pretrain", factor=lambda s: wsd_factor(s, 12, 0.1, 0.5), peak_rate=1e-2, **plan)
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


def test_wsd_warms_up_stays_and_falls_linearly_towards_zero() -> None:
    factors = [wsd_factor(step, 100, 0.05, 0.2) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(factors[5:80]) == {1.0}
    assert decay_start(100, 0.2) == 80
    assert factors[80:] == pytest.approx([(20 - i) / 21 for i in range(20)])


def test_cosine_warms_up_and_falls_to_its_final_share() -> None:
    factors = [cosine_factor(step, 50, 0.1, 0.1) for step in range(50)]
    assert factors[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))
    assert 0.1 < factors[-1] < 0.11


def test_schedules_hold_for_a_single_step_and_for_no_warmup() -> None:
    assert wsd_factor(0, 1, 0.01, 0.25) == 1.0
    assert wsd_factor(0, 1, 0.0, 1.0) == 0.5
    assert 0 < cosine_factor(0, 1, 0.0, 0.0) <= 1
    assert warmup_steps(100, 0.01) == 1
    assert warmup_steps(10, 0.01) == 1
    assert warmup_steps(10, 0.0) == 0


def test_open_rates_follow_the_table_at_its_centres_and_lie_between_elsewhere() -> None:
    assert rates.learning_rate("pretrain", "adamw", 1_000_000) == 3e-3
    assert rates.learning_rate("pretrain", "adamw", 50_000_000) == 2e-3
    assert rates.learning_rate("align", "muon", 150_000_000) == 5e-4
    assert 2e-3 < rates.learning_rate("pretrain", "adamw", 10_000_000) < 3e-3
    assert rates.learning_rate("pretrain", "adamw", 10**10) == 1.5e-3
    assert rates.embedding_learning_rate("pretrain", "adamw", 10**6) is None


def test_an_open_batch_size_grows_with_the_draft_and_shrinks_with_the_budget() -> None:
    assert rates.batch_tokens("pretrain", 50_000_000, 5 * 10**9) == 262_144
    assert rates.batch_tokens("pretrain", 150_000_000, 5 * 10**9) == 524_288
    assert rates.batch_tokens("pretrain", 1_500_000, 2_000_000) == 16_384
    assert rates.batch_tokens("align", 1_500_000, 800_000) == 4096


def test_every_weight_is_in_exactly_one_group_and_embeddings_and_gains_do_not_decay() -> None:
    model = Model()
    for kind, number in (("adamw", 1), ("muon", 2)):
        optimizers = build_optimizers(model, kind=kind, learning_rate=1e-2, weight_decay=0.1)  # type: ignore[arg-type]
        assert len(optimizers) == number
        found = [(p, group["weight_decay"]) for o in optimizers for group in o.param_groups for p in group["params"]]
        assert len(found) == len({id(p) for p, _ in found}) == len(list(model.parameters()))
        decayed = {id(p) for p, decay in found if decay}
        assert decayed == {id(model.model.matrix.weight), id(model.head.weight)}


def test_a_tied_head_is_an_embedding() -> None:
    model = Model()
    model.head.weight = model.model.embed.weight
    groups = split_parameters(model)
    assert len(groups["embedding"]) == 1
    assert not groups["head"]


def test_rates_scale_from_each_groups_own_peak() -> None:
    optimizers = build_optimizers(Model(), kind="muon", learning_rate=1e-2, embedding_learning_rate=4e-3)
    set_rate(optimizers, 0.5)
    assert [group["lr"] for o in optimizers for group in o.param_groups] == [5e-3, 2e-3, 2e-3]


def test_the_micro_batch_size_does_not_change_the_gradient() -> None:
    found = []
    for rows_per_micro in (1, 2, 4):
        model = Model()
        step = make_step(model)
        found.append((step.gradients(source(rows_per_micro=rows_per_micro).batches(0)), [p.grad.clone() for p in step.parameters]))  # type: ignore[union-attr]
    for (loss, norm, trained), gradients in found[1:]:
        assert (loss, norm, trained) == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradients, found[0][1])


def test_the_mean_is_over_trained_tokens_not_over_micro_batches() -> None:
    samples = [Sample([1, 2, 3], [4, 5, 6, 7, 8]), Sample([1], [9])]
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


def test_precision_auto_is_fp32_or_bf16_and_fp32_is_always_plain() -> None:
    cpu = torch.device("cpu")
    assert autocast_dtype("fp32", cpu) is None
    assert autocast_dtype("bf16", cpu) is torch.bfloat16
    assert autocast_dtype("auto", cpu) in (None, torch.bfloat16)


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


def test_only_response_tokens_are_labels_and_each_follows_its_input() -> None:
    batch = padded_batch([Sample([1, 2, 3], [4, 5]), Sample([6], [7, 8, 9, 10])], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert batch.labels.tolist() == [4, 5, 7, 8, 9, 10]
    assert batch.index is not None
    assert batch.index.tolist() == [2, 3, 4, 5, 6, 7]
    assert batch.num_tokens == 8
    assert batch.num_trained == 6


def test_padding_on_the_right_is_never_trained_on_and_changes_no_loss() -> None:
    step = make_step(Model(), objective=CrossEntropy())
    short, long = Sample([1, 2], [3]), Sample([4, 5, 6, 7], [8, 9, 10])
    with torch.no_grad():
        together = float(step.loss_sum(padded_batch([short, long], pad_id=0)))
        other_pad = float(step.loss_sum(padded_batch([short, long], pad_id=22)))
        alone = sum(float(step.loss_sum(padded_batch([sample], 0))) for sample in (short, long))
    assert together == other_pad
    assert together == pytest.approx(alone, rel=1e-6)


def test_packed_rows_train_on_every_position() -> None:
    batch = packed_batch(np.arange(10).reshape(2, 5))
    assert batch.input_ids.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch.labels.tolist() == [1, 2, 3, 4, 6, 7, 8, 9]


def test_rows_longer_than_the_context_are_cut_and_those_without_response_dropped() -> None:
    samples = [Sample([1] * 3, [2] * 3), Sample([1] * 3, [2] * 9), Sample([1] * 9, [2]), Sample([1], []), Sample([], [5])]
    kept, num_cut, num_dropped = cut_to_context(samples, context_length=6)
    assert [(len(s.prompt_ids), len(s.response_ids)) for s in kept] == [(3, 3), (3, 4)]
    assert (num_cut, num_dropped) == (1, 3)
    assert kept[1].num_tokens == 6


def test_micro_batches_hold_every_sample_once_within_the_limit() -> None:
    samples = [Sample([0], [1] * n) for n in np.random.default_rng(0).integers(1, 60, 100)]
    groups = micro_batches(samples, 256)
    assert sorted(id(s) for g in groups for s in g) == sorted(id(s) for s in samples)
    assert all(len(g) == 1 or len(g) * max(s.num_tokens for s in g) <= 256 for g in groups)
    padded = sum(len(g) * max(s.num_tokens for s in g) for g in groups)
    assert sum(s.num_tokens for s in samples) / padded > 0.8


def test_the_plan_takes_every_sample_once_an_epoch_in_an_order_of_its_own() -> None:
    lengths = np.random.default_rng(1).integers(5, 50, 200)
    plan = plan_batches(lengths, 400, seed=3, epochs=2.0)
    assert sorted(np.concatenate(plan).tolist()) == sorted(list(range(200)) * 2)
    assert max(int(lengths[numbers].sum()) for numbers in plan) < 450
    again = plan_batches(lengths, 400, seed=3, epochs=2.0)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))
    assert not np.array_equal(plan[0], plan_batches(lengths, 400, seed=4, epochs=2.0)[0])


def test_a_token_budget_ends_the_plan_within_one_sample() -> None:
    lengths = np.full(50, 10)
    for budget in (10, 95, 500, 1234):
        total = sum(int(lengths[numbers].sum()) for numbers in plan_batches(lengths, 100, 0, tokens=budget))
        assert budget <= total < budget + 10


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_the_pretraining_share_is_spread_evenly_and_no_synthetic_step_is_lost(share: float) -> None:
    samples = [Sample([i % 20], [1, 2]) for i in range(90)]
    plan = plan_batches(np.full(90, 2), 2, seed=0, epochs=1)
    mixed = AlignmentBatches(samples, plan, 0, 64, source(rows_per_micro=4), share)
    packed = [step for step in range(mixed.steps) if mixed.batches(step)[0].index is None]
    assert len(packed) == round(share * mixed.steps)
    assert mixed.steps - len(packed) == 90
    gaps = {b - a for a, b in itertools.pairwise(packed)}
    assert len(gaps) <= 2
    seen = [mixed.batches(step)[0].input_ids[0, 0].item() for step in range(mixed.steps) if step not in packed]
    assert seen == [samples[int(numbers[0])].prompt_ids[0] for numbers in plan]
    assert mixed.tokens == sum(b.num_tokens for step in range(mixed.steps) for b in mixed.batches(step))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("killed_at", [0, 3, 7, 8])
def test_a_killed_run_ends_with_the_very_weights_of_an_undisturbed_one(tmp_path: Path, kind: str, killed_at: int) -> None:
    undisturbed, killed, resumed = (make_trainer(tmp_path / name, kind, Model(dropout=0.2), checkpoint_every=3) for name in "abb")
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
    records = [[{k: v for k, v in r.items() if k != "tokens_per_second"} for r in read_metrics(tmp_path / name)] for name in "ab"]
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
    assert {path.suffix for path in (tmp_path / "steps").rglob("*") if path.is_file()} == {".safetensors", ".json"}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed = make_trainer(tmp_path / "a")
    undisturbed.run()
    kill_at(make_trainer(tmp_path / "b", checkpoint_every=3), 8)
    damaged = tmp_path / "b/steps/step-000000006" / file
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"??")
    resumed = make_trainer(tmp_path / "b", checkpoint_every=3)
    resumed.run()
    assert "trying the one before" in capsys.readouterr().err
    assert_same(weights(undisturbed.model), weights(resumed.model))


def test_when_every_checkpoint_is_damaged_the_error_says_what_to_do(tmp_path: Path) -> None:
    kill_at(make_trainer(tmp_path, checkpoint_every=3), 8)
    for path in tmp_path.glob("steps/*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="--redo"):
        make_trainer(tmp_path, checkpoint_every=3).run()


def test_what_a_killed_save_left_behind_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / "steps/.step-000000003.77.tmp").mkdir(parents=True)
    make_trainer(tmp_path).run()
    assert not list(tmp_path.glob("steps/.*"))


def test_the_weights_with_the_best_score_are_the_result_even_after_a_kill(tmp_path: Path) -> None:
    scores = {0: 0.1, 2: 0.5, 4: 0.9, 6: 0.3, 8: 0.2, 10: 0.7, 12: 0.4}

    def with_scores(folder: Path) -> Trainer:
        trainer = make_trainer(folder, checkpoint_every=3, validate_every=2, validate_first=True)
        trainer.validate = lambda: Validation({"score": scores[trainer.state.step]}, scores[trainer.state.step])
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
    assert {f.name for f in tmp_path.glob("steps/best-*")} == {"best-000000004", "best-000000006", "best-000000008"}
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


def test_a_step_with_a_nan_loss_is_left_out_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, objective=Poisoned({5}))
    state = trainer.run()
    assert state.skipped == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert "step 3" in capsys.readouterr().err
    skipped = [r for r in read_metrics(tmp_path) if r.get("skipped")]
    assert [r["step"] for r in skipped] == [3]
    assert skipped[0]["loss"] is None


def test_three_nan_losses_in_a_row_end_the_run_naming_step_and_rate(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 5, rate 0\.01.*learning_rate"):
        make_trainer(tmp_path, objective=Poisoned({5, 7, 9})).run()


def test_a_batch_without_trained_tokens_is_an_error() -> None:
    with pytest.raises(TrainingError, match="0 trained tokens"):
        make_step(Model()).gradients([])


def test_out_of_memory_names_the_key_that_helps(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)

    def full(batches: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    trainer.step.gradients = full  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"pretrain\.micro_batch_tokens"):
        trainer.run()


def test_metrics_lose_only_what_lies_after_the_checkpoint_and_torn_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "loss": 1.4}\n{"ste')
    with Metrics(tmp_path, step=2) as metrics:
        metrics.write(step=3, loss=math.nan, validation_loss={"text": math.inf})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": None, "validation_loss": {"text": None}}]
    assert final_train_loss(lines, share=0.5) == 1.5


def test_a_fresh_run_begins_a_fresh_record(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 9}\n')
    with Metrics(tmp_path, step=0):
        pass
    assert read_metrics(tmp_path) == []


def test_tensorboard_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"fastdraft\[tensorboard\]"):
        Metrics(tmp_path, step=0, tensorboard=True)


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert purge_step == 1

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    with Metrics(tmp_path, step=0, tensorboard=True) as metrics:
        metrics.write(step=1, loss=2.0, validation_loss={"text": 3.0})
    assert written == [("loss", 2.0, 1), ("validation_loss/text", 3.0, 1)]


def test_a_finished_run_does_no_further_step(tmp_path: Path) -> None:
    first = make_trainer(tmp_path)
    first.run()
    again = make_trainer(tmp_path)
    again.step.gradients = None  # type: ignore[assignment, method-assign]
    assert again.run() == first.state
    assert_same(weights(first.model), weights(again.model))
    assert isinstance(again.state, TrainingState)
