"""`run.cross_entropy: liger`: how its kernels are called, that the numbers are ours, and what is said where it cannot be used."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bad_input_fixture import refused
from fastdraft.errors import MissingExtra, RecipeError
from fastdraft.functional.liger import liger_cross_entropy
from fastdraft.functional.losses import chunked_cross_entropy
from fastdraft.stages import align, pretrain
from fastdraft.training import loss_path
from fastdraft.training.batches import packed_batch
from fastdraft.training.objective import CrossEntropy
from test_losses import example
from test_pretrain import SETTINGS, make_context
from test_step import build, ids, make_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODULE = "liger_kernel.transformers.functional"


class StandIn:
    """Liger's function as of 0.8.5, over all logits; remembers the types that it was given."""

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []

    def __call__(  # noqa: PLR0917 - as Liger has them
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        chunk_mem_const: int = 1,
    ) -> Tensor:
        autocast = torch.is_autocast_enabled("cpu")
        self.given.append({"types": (input.dtype, weight.dtype), "accum": accum_dtype, "autocast": autocast})
        assert bias is ce_weight is softcap is None
        assert not any(
            (
                label_smoothing,
                return_z_loss,
                use_token_scaling,
                return_token_accuracy,
                return_predicted_tokens,
            )
        )
        logits = (input @ weight.t()).float()
        z = logits.logsumexp(-1).square()[target != ignore_index]
        loss = functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)
        return loss + lse_square_scale * (z.sum() if reduction == "sum" else z.mean())


def install(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor] | None) -> None:
    """As if liger-kernel held `function`; None: as if it were not installed."""
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType(MODULE)
    module.liger_fused_linear_cross_entropy = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module if function else None)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    function = StandIn()
    install(monkeypatch, function)
    return function


@pytest.mark.parametrize("z_loss", [0.0, 0.03])
def test_value_and_gradients_are_those_of_our_chunks(liger: StandIn, z_loss: float) -> None:
    hidden, head, labels = example()
    loss = liger_cross_entropy(hidden, head, labels, z_loss=z_loss)
    expected, _ = chunked_cross_entropy(hidden, head, labels, z_loss=z_loss)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss * 0.3, (hidden, head)), torch.autograd.grad(expected * 0.3, (hidden, head))
    )


def test_under_autocast_the_kernels_get_the_products_type_and_add_up_in_fp32(liger: StandIn) -> None:
    hidden, head, labels = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = liger_cross_entropy(hidden, head, labels)
    low = torch.bfloat16
    assert liger.given == [{"types": (low, low), "accum": torch.float32, "autocast": False}]
    assert loss.dtype == torch.float32
    assert {gradient.dtype for gradient in torch.autograd.grad(loss, (hidden, head))} == {torch.float32}


def test_a_step_with_liger_moves_the_weights_as_one_with_our_chunks(liger: StandIn) -> None:
    found = []
    for objective in (
        loss_path.cross_entropy("liger", CUDA, 1e-5),
        loss_path.cross_entropy("auto", CUDA, 1e-5),
    ):
        model = build()
        step = make_step(model, model.get_decoder())
        step.objective = objective
        loss, norm, _ = step.gradients([packed_batch(ids(2, 33).numpy())])
        step.update(1.0)
        found.append((loss, norm, [parameter.detach().clone() for parameter in model.parameters()]))
    assert len(liger.given) == 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_auto_is_our_chunks_on_every_device_even_where_liger_is_installed(liger: StandIn) -> None:
    for device in (CPU, CUDA):
        assert (
            loss_path.cross_entropy("auto", device, 0.5)
            == loss_path.cross_entropy("chunked", device, 0.5)
            == CrossEntropy(0.5)
        )


def test_liger_on_a_cpu_is_refused_in_one_line(liger: StandIn) -> None:
    with pytest.raises(
        RecipeError,
        match=r"run\.cross_entropy: liger on cpu: its kernels are Triton's and need a CUDA device; ",
    ):
        loss_path.cross_entropy("liger", CPU)


def test_liger_that_is_missing_or_too_old_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    with pytest.raises(MissingExtra, match=r"liger-kernel: not installed.*pip install 'fastdraft\[liger\]'"):
        loss_path.cross_entropy("liger", CUDA)

    def old(input: Tensor, weight: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        raise AssertionError

    install(monkeypatch, old)
    with pytest.raises(MissingExtra, match=r"liger-kernel 0\.6\.2 or newer"):
        loss_path.cross_entropy("liger", CUDA)


def test_both_training_stages_take_the_recipes_word(
    tmp_path: Path, tiny_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"pretrain": pretrain.PretrainConfig(**SETTINGS, mixture={"text": 1.0})}
    context = make_context(tmp_path / "run", tiny_draft, sections)
    object.__setattr__(context, "settings", context.settings.model_copy(update={"cross_entropy": "liger"}))
    with pytest.raises(RecipeError, match="liger on cpu"):
        pretrain.run(sections["pretrain"], context, "pretrain")
    assert not context.folder("pretrain").is_complete()
    with pytest.raises(RecipeError, match="liger on cpu"):
        align._objective(align.AlignConfig(), context, build(), CPU)


def test_check_says_so_before_anything_is_begun(capsys: pytest.CaptureFixture[str], liger: StandIn) -> None:
    said = refused(capsys, "check", "starter", "run.cross_entropy=liger", "run.device=cpu")
    assert "run.cross_entropy: liger on cpu: its kernels are Triton's and need a CUDA device" in said


def test_an_unknown_path_is_refused_by_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "run.cross_entropy" in refused(capsys, "check", "demo", "run.cross_entropy=torch")


@pytest.mark.skipif(not importlib.util.find_spec("liger_kernel"), reason="liger-kernel is an extra")
def test_ligers_own_kernel_in_tritons_interpreter_gives_our_numbers() -> None:
    code = """
import json, torch
from fastdraft.functional.liger import liger_cross_entropy
from fastdraft.functional.losses import chunked_cross_entropy
torch.manual_seed(0)
hidden, head, labels = torch.randn(37, 16, requires_grad=True), torch.randn(96, 16, requires_grad=True), torch.randint(96, (37,))
labels[::5] = -100
found = []
for loss in (liger_cross_entropy(hidden, head, labels, z_loss=0.01), chunked_cross_entropy(hidden, head, labels, z_loss=0.01)[0]):
    found.append([loss, *torch.autograd.grad(loss / 7, (hidden, head))])
print(json.dumps([float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found)]))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert max(json.loads(done.stdout.splitlines()[-1])) < 1e-5
