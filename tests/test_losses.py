"""Chunked cross-entropy equals the plain one, in value and in gradient, and never holds all logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastdraft.functional import losses
from fastdraft.functional.losses import chunked_cross_entropy, default_chunk


def example(
    n: int = 13, d: int = 6, v: int = 11, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, dtype=dtype).requires_grad_()
    head = torch.randn(v, d, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[2] = labels[n // 2] = -100
    return hidden, head, labels


def plain(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, z_loss: float) -> torch.Tensor:
    logits = hidden @ head.t()
    z = logits.logsumexp(-1).square()[labels != -100].sum()
    return functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") + z_loss * z


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("z_loss", [0.0, 0.03])
def test_value_and_gradients_equal_those_of_plain_cross_entropy(chunk: int, z_loss: float) -> None:
    hidden, head, labels = example()
    loss, count = chunked_cross_entropy(hidden, head, labels, z_loss=z_loss, chunk=chunk)
    found = torch.autograd.grad(loss * 0.37, (hidden, head))
    expected_loss = plain(hidden, head, labels, z_loss)
    expected = torch.autograd.grad(expected_loss * 0.37, (hidden, head))
    assert int(count) == 11
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, expected)


def test_gradients_pass_gradcheck_in_float64() -> None:
    hidden, head, labels = example(n=5, d=3, v=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, labels, z_loss=0.05, chunk=2)[0], (hidden, head)
    )


def test_ignored_rows_get_no_gradient_and_no_loss() -> None:
    hidden, head, labels = example()
    labels[:] = -100
    loss, count = chunked_cross_entropy(hidden, head, labels, z_loss=1.0)
    gradients = torch.autograd.grad(loss, (hidden, head))
    assert loss.item() == 0
    assert int(count) == 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


def test_no_rows_give_a_zero_loss() -> None:
    hidden, head, labels = example(n=8)
    loss, count = chunked_cross_entropy(hidden[:0], head, labels[:0])
    assert loss.item() == 0
    assert int(count) == 0


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, head, labels = example()
    with torch.no_grad():
        loss, _ = chunked_cross_entropy(hidden, head, labels, chunk=3)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, head, labels, 0.0).detach())


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, labels = example()
    loss, _ = chunked_cross_entropy(hidden, head.detach(), labels, chunk=4)
    (found,) = torch.autograd.grad(loss, (hidden,))
    (expected,) = torch.autograd.grad(plain(hidden, head.detach(), labels, 0.0), (hidden,))
    torch.testing.assert_close(found, expected)


def test_under_bf16_autocast_the_loss_is_fp32_and_near_the_exact_one() -> None:
    hidden, head, labels = example(n=64, d=32, v=50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = chunked_cross_entropy(hidden, head, labels, z_loss=1e-5, chunk=10)
    found = torch.autograd.grad(loss, (hidden, head))
    exact = plain(hidden, head, labels, 1e-5)
    expected = torch.autograd.grad(exact, (hidden, head))
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in found)
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    for gradient, reference in zip(found, expected, strict=True):
        assert functional.cosine_similarity(gradient.flatten(), reference.flatten(), dim=0) > 0.999


def test_huge_logits_stay_finite() -> None:
    hidden, head, labels = example()
    loss, _ = chunked_cross_entropy(hidden * 1e4, head, labels)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (hidden, head)))


def test_a_chunk_never_holds_all_logits_of_a_large_vocabulary() -> None:
    assert default_chunk("cpu", 128256) == 16
    assert default_chunk("cuda", 128256) * 128256 <= 1 << 27
    assert default_chunk("cpu", 8192) == 256
    assert default_chunk("cpu", 320) == 6553


def test_left_open_a_cpu_takes_long_products_and_short_chunks_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(losses._CHUNK_ELEMENTS, "cpu", 0)
    monkeypatch.setitem(losses._CHUNK_ROWS, "cpu", (3, 3))
    monkeypatch.setattr(losses, "_STRETCH_ROWS", 8)
    for low in (False, True):
        found = []
        for chunk in (0, 3):
            hidden, head, labels = example()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                loss, _ = chunked_cross_entropy(hidden, head, labels, z_loss=0.03, chunk=chunk)
            found.append((loss, *torch.autograd.grad(loss, (hidden, head))))
        torch.testing.assert_close(*found, rtol=2e-2 if low else 1e-5, atol=1e-2 if low else 1e-6)


def test_the_largest_tensor_made_is_one_chunk_of_logits() -> None:
    class Largest(torch.overrides.TorchFunctionMode):
        elements = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    hidden, head, labels = torch.randn(640, 4), torch.randn(1000, 4), torch.randint(0, 1000, (640,))
    with Largest() as largest:
        chunked_cross_entropy(hidden.requires_grad_(), head.requires_grad_(), labels, chunk=16)
    assert largest.elements <= 16 * 1000
