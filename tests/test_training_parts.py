"""The parts of training: schedules, rates, parameter groups, batches, the record."""

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

from fastdraft.training import defaults
from fastdraft.training.batches import (
    AlignmentBatches,
    PackedBatches,
    cut_to_context,
    micro_batches,
    packed_batch,
    padded_batch,
    plan_batches,
)
from fastdraft.training.metrics import Metrics, final_train_loss
from fastdraft.training.objective import CrossEntropy
from fastdraft.training.optimizer import (
    build_optimizers,
    cosine_factor,
    decay_start,
    split_parameters,
    warmup_steps,
    wsd_factor,
)
from test_training import Model, Rows, make_step, sample


def test_wsd_warms_up_stays_and_falls_linearly_towards_zero() -> None:
    factors = [wsd_factor(step, 100, 0.05, 0.2) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(factors[5:80]) == {1.0}
    assert decay_start(100, 0.2) == 80
    assert factors[80:] == pytest.approx([(20 - i) / 21 for i in range(20)])


def test_cosine_warms_up_and_falls_to_its_final_share() -> None:
    factors = [cosine_factor(step, 50, 0.1) for step in range(50)]
    assert factors[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[4:]))
    assert 0 < factors[-1] < 0.01


def test_schedules_hold_for_a_single_step_and_for_no_warmup() -> None:
    assert wsd_factor(0, 1, 0.01, 0.25) == 1.0
    assert wsd_factor(0, 1, 0.0, 1.0) == 0.5
    assert 0 < cosine_factor(0, 1, 0.0) <= 1
    assert warmup_steps(100, 0.01) == 1
    assert warmup_steps(10, 0.01) == 1
    assert warmup_steps(10, 0.0) == 0


def test_open_rates_follow_the_table_at_its_centres_and_lie_between_elsewhere() -> None:
    assert defaults.learning_rate("pretrain", "adamw", 1_000_000) == 3e-3
    assert defaults.learning_rate("pretrain", "adamw", 50_000_000) == 2e-3
    assert defaults.learning_rate("align", "muon", 150_000_000) == 5e-4
    assert 2e-3 < defaults.learning_rate("pretrain", "adamw", 10_000_000) < 3e-3
    assert defaults.learning_rate("pretrain", "adamw", 10**10) == 1.5e-3
    assert defaults.learning_rate("pretrain", "adamw", 10**6, "rest") is None
    assert defaults.learning_rate("align", "muon", 50_000_000, "rest") == 3e-4


def test_an_open_batch_size_grows_with_the_draft_and_shrinks_with_the_budget() -> None:
    assert defaults.batch_tokens("pretrain", 50_000_000, 5 * 10**9) == 262_144
    assert defaults.batch_tokens("pretrain", 150_000_000, 5 * 10**9) == 524_288
    assert defaults.batch_tokens("pretrain", 1_500_000, 2_000_000) == 16_384
    assert defaults.batch_tokens("align", 1_500_000, 800_000) == 4096


def test_every_weight_is_in_exactly_one_group_and_embeddings_and_gains_do_not_decay() -> None:
    model = Model()
    for kind, number in (("adamw", 1), ("muon", 2)):
        optimizers = build_optimizers(model, kind=kind, learning_rate=1e-2, weight_decay=0.1)  # type: ignore[arg-type]
        assert len(optimizers) == number
        found = [
            (p, group["weight_decay"])
            for o in optimizers
            for group in o.param_groups
            for p in group["params"]
        ]
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
    step = make_step(Model(), "muon")
    step.gradients(PackedBatches(Rows(), 1).batches(0))
    step.update(0.5)
    assert [group["lr"] for o in step.optimizers for group in o.param_groups] == [5e-3, 1e-2, 1e-2]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_muon_in_fp32_takes_torchs_step_without_its_rounding(shape: tuple[int, int]) -> None:
    def stepped(low: bool, dtype: torch.dtype, shift: float = 0.0) -> torch.Tensor:
        torch.manual_seed(0)
        model = Model().to(dtype)
        model.model.matrix.weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype))
        optimizers = build_optimizers(model, kind="muon", learning_rate=1e-2, low=low)
        for _ in range(3):
            grad = torch.randn(shape, dtype=torch.float64)
            model.model.matrix.weight.grad = (grad + shift).to(dtype)
            optimizers[0].step()
        return model.model.matrix.weight.detach().double()

    exact, fp32 = stepped(False, torch.float64), stepped(False, torch.float32)
    bf16 = stepped(True, torch.float32)
    assert (fp32 - exact).abs().max() < 1e-6
    assert 1e-5 < (bf16 - exact).abs().max() < 1e-3
    assert (stepped(False, torch.float32, shift=1e-6) - fp32).abs().max() < 1e-6


def test_only_response_tokens_are_labels_and_each_follows_its_input() -> None:
    batch = padded_batch([sample([1, 2, 3], [4, 5]), sample([6], [7, 8, 9, 10])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert batch.labels.tolist() == [4, 5, 7, 8, 9, 10]
    assert batch.index is not None
    assert batch.index.tolist() == [2, 3, 4, 5, 6, 7]
    assert batch.num_tokens == 8
    assert batch.num_trained == 6


def test_padding_on_the_right_is_never_trained_on_and_changes_no_loss() -> None:
    step = make_step(Model(), objective=CrossEntropy())
    samples = sample([1, 2], [3]), sample([4, 5, 6, 7], [8, 9, 10])
    with torch.no_grad():
        together = float(step.loss_sum(padded_batch(samples)))
        alone = sum(float(step.loss_sum(padded_batch([one]))) for one in samples)
    assert together == pytest.approx(alone, rel=1e-6)


def test_packed_rows_train_on_every_position() -> None:
    batch = packed_batch(np.arange(10).reshape(2, 5))
    assert batch.input_ids.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch.labels.tolist() == [1, 2, 3, 4, 6, 7, 8, 9]


def test_rows_longer_than_the_context_are_cut_and_those_without_response_dropped() -> None:
    sizes = [(3, 3), (3, 9), (9, 1), (1, 0), (0, 1)]
    samples = [sample([1] * prompt, [2] * response) for prompt, response in sizes]
    kept, num_cut, num_dropped = cut_to_context(samples, context_length=6)
    assert [(len(s.prompt_ids), len(s.response_ids)) for s in kept] == [(3, 3), (3, 4)]
    assert (num_cut, num_dropped) == (1, 3)
    assert kept[1].num_tokens == 6


def test_micro_batches_hold_every_sample_once_within_the_limit() -> None:
    samples = [sample([0], [1] * n) for n in np.random.default_rng(0).integers(1, 60, 100)]
    groups = micro_batches(samples, 256)
    assert sorted(id(s) for g in groups for s in g) == sorted(id(s) for s in samples)
    assert all(len(g) == 1 or len(g) * max(s.num_tokens for s in g) <= 256 for g in groups)
    padded = sum(len(g) * max(s.num_tokens for s in g) for g in groups)
    assert sum(s.num_tokens for s in samples) / padded > 0.8


def test_the_plan_takes_every_sample_once_an_epoch_in_an_order_of_its_own() -> None:
    lengths = np.random.default_rng(1).integers(5, 50, 200)
    total = 2 * int(lengths.sum())
    plan, again, other = (plan_batches(lengths, 400, seed, total) for seed in (3, 3, 4))
    assert sorted(np.concatenate(plan).tolist()) == sorted(list(range(200)) * 2)
    assert max(int(lengths[numbers].sum()) for numbers in plan) < 450
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))
    assert not np.array_equal(plan[0], other[0])


def test_a_token_budget_ends_the_plan_within_one_sample() -> None:
    lengths = np.full(50, 10)
    for budget in (10, 95, 500, 1234):
        total = sum(int(lengths[numbers].sum()) for numbers in plan_batches(lengths, 100, 0, budget))
        assert budget <= total < budget + 10


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_the_pretraining_share_is_spread_evenly_and_no_synthetic_step_is_lost(share: float) -> None:
    samples = [sample([i % 20], [1, 2]) for i in range(90)]
    plan = plan_batches(np.full(90, 2), 2, 0, 180)
    mixed = AlignmentBatches(samples, plan, PackedBatches(Rows(), 0), share)
    packed = [step for step in range(mixed.steps) if mixed.batches(step)[0].index is None]
    assert len(packed) == round(share * mixed.steps)
    assert mixed.steps - len(packed) == 90
    gaps = {b - a for a, b in itertools.pairwise(packed)}
    assert len(gaps) <= 2
    synthetic = sorted(set(range(mixed.steps)) - set(packed))
    seen = [mixed.batches(step)[0].input_ids[0, 0].item() for step in synthetic]
    assert seen == [samples[int(numbers[0])].prompt_ids[0] for numbers in plan]
    assert mixed.tokens == sum(b.num_tokens for step in range(mixed.steps) for b in mixed.batches(step))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12])
def test_the_parts_of_any_number_of_processes_are_the_step(size: int) -> None:
    whole = [row for batch in PackedBatches(Rows(5), 3).batches(1) for row in batch.input_ids.tolist()]
    parts = [PackedBatches(Rows(5), 3, None, rank, size).batches(1) for rank in range(size)]
    found = [row for batches in parts for batch in batches for row in batch.input_ids.tolist()]
    assert sorted(found) == sorted(whole)
    samples = [sample([1] * (1 + i % 5), [2] * (1 + i % 17)) for i in range(40)]
    numbers = [np.arange(40)]
    sources = [AlignmentBatches(samples, numbers, None, 0.0, rank, size) for rank in range(size)]
    loads = [sum(batch.num_tokens for batch in one.batches(0)) for one in sources]
    assert sum(loads) == sum(one.num_tokens for one in samples)
    assert max(loads) - min(loads) <= max(one.num_tokens for one in samples)


def test_metrics_lose_only_what_lies_after_the_checkpoint_and_torn_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "loss": 1.4}\n{"ste'
    )
    with Metrics(tmp_path, step=2) as metrics:
        metrics.write(step=3, loss=math.nan, validation_loss={"text": math.inf})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.5},
        {"step": 3, "loss": None, "validation_loss": {"text": None}},
    ]
    assert final_train_loss(lines, share=0.5) == 1.5


def test_tensorboard_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    def writer(folder: str, purge_step: int) -> Any:
        assert purge_step == 1
        return SimpleNamespace(add_scalar=lambda *found: written.append(found), close=lambda: None)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    with Metrics(tmp_path, step=0, tensorboard=True) as metrics:
        metrics.write(step=1, loss=2.0, validation_loss={"text": 3.0})
    assert written == [("loss", 2.0, 1), ("validation_loss/text", 3.0, 1)]
