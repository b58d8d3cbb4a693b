"""A training step asks the device for nothing until its loss and gradient norm are read for the log, once.

The device is torch's `meta`: its tensors have shapes and no values, so whatever would wait for a value is an error there; and it is no
CPU, so that the ways of an accelerator are taken.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdraft.functional.distillation import SparseTarget, token_loss
from fastdraft.modeling.heads import output_head
from fastdraft.training.batches import Batch
from fastdraft.training.flash import text_mask
from fastdraft.training.objective import CrossEntropy, LoadedTarget, Objective, TokenDistillation
from fastdraft.training.optimizer import build_optimizers
from fastdraft.training.stand_in import stand_in
from fastdraft.training.step import TrainStep
from test_step import build
from test_training import make_trainer

META = torch.device("meta")
LOSSES = ("forward_kl", "reverse_kl", "jsd", "tvd", "ce_kl", "ce_tvd", "lk_hybrid", "lk_log")
ROWS, LENGTH = 2, 33


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `meta` does not have."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *given: False)


def ids(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64, device=META)


def batch(*, some_trained: bool, apart: bool) -> Batch:
    count = 20 if some_trained else ROWS * LENGTH
    target = SparseTarget(ids(count, 5), torch.zeros(count, 6, device=META))
    places = ids(ROWS, LENGTH) if apart else None
    return Batch(
        ids(ROWS, LENGTH), ids(count), ids(count) if some_trained else None, ROWS * LENGTH, target, places
    )


def one_step(
    objective: Objective,
    kind: Any = "adamw",
    *,
    family: str = "llama",
    some_trained: bool = False,
    apart: bool = False,
) -> None:
    """All of `TrainStep.gradients` and `update` but for the reading."""
    model = build(family).to(META)
    parameters, optimizers = list(model.parameters()), build_optimizers(model, kind=kind, learning_rate=1e-3)
    step = TrainStep(
        stand_in(model.get_decoder(), META), model.lm_head.weight, parameters, optimizers, objective, META
    )
    for number in range(2):
        loss = step.peers.loss_sum(step, batch(some_trained=some_trained, apart=apart), last=number == 1)
        torch.autograd.backward(loss / 7)
    assert step.peers.clip(step).device == META
    step.update(1.0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(("some_trained", "apart"), [(False, False), (True, False), (False, True)])
def test_a_step_of_cross_entropy_waits_for_nothing(kind: str, some_trained: bool, apart: bool) -> None:
    one_step(CrossEntropy(1e-5), kind, some_trained=some_trained, apart=apart)


@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen2", "qwen3"])
def test_no_family_of_drafts_waits(family: str) -> None:
    one_step(CrossEntropy(), family=family)


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_against_stored_logits_waits(name: str) -> None:
    one_step(TokenDistillation(token_loss(name)), some_trained=True)


def test_a_loaded_target_does_not_wait_either() -> None:
    one_step(
        TokenDistillation(token_loss("forward_kl"), LoadedTarget(*output_head(build().to(META)))),
        some_trained=True,
    )


def test_the_modules_alone_would_wait() -> None:
    """What the stand-in is for, and that this file can fail."""
    with pytest.raises(RuntimeError, match="meta"):
        build().to(META).get_decoder()(input_ids=ids(ROWS, LENGTH), use_cache=False)


class Read(TorchDispatchMode):
    """Operations that carry a value from the device to the program."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in func.name() for name in self.NAMES):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_mask_of_blocks_is_made_without_a_wait() -> None:
    with Read() as read:
        text_mask(torch.arange(33).remainder(9)[None], blocks=True)
    assert not read.found


class AllLogits:
    """Cross-entropy as a tutorial has it: ours reads values on a CPU, where it costs nothing."""

    def loss(self, hidden_ND: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
        return torch.nn.functional.cross_entropy(hidden_ND @ head_VD.t(), batch.labels, reduction="sum")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_loop_reads_loss_and_norm_together_and_nothing_else(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, lists = make_trainer(tmp_path, kind, objective=AllLogits()), []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: lists.append(tuple(self.shape)) or tolist(self))
    train = trainer._train
    with Read() as read:
        pass

    def watched(*given: Any) -> None:
        with read:
            train(*given)

    monkeypatch.setattr(trainer, "_train", watched)
    trainer.run()
    assert lists == [(2,)] * 12  # loss and norm of each of the 12 steps
    assert not read.found
