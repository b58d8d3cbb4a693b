"""Chunked cross-entropy equals the plain one, in value and in gradient, and never holds all logits."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdraft.functional import losses
from fastdraft.functional.distillation import DenseTarget, chunked_distillation, token_loss
from fastdraft.functional.losses import chunked_cross_entropy


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
    loss = chunked_cross_entropy(hidden, head, labels, z_loss=z_loss, chunk=chunk)
    found = torch.autograd.grad(loss * 0.37, (hidden, head))
    expected_loss = plain(hidden, head, labels, z_loss)
    expected = torch.autograd.grad(expected_loss * 0.37, (hidden, head))
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, expected)


def test_gradients_pass_gradcheck_in_float64() -> None:
    hidden, head, labels = example(n=5, d=3, v=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, labels, z_loss=0.05, chunk=2), (hidden, head)
    )


def test_ignored_rows_get_no_gradient_and_no_loss() -> None:
    hidden, head, labels = example()
    labels[:] = -100
    loss = chunked_cross_entropy(hidden, head, labels, z_loss=1.0)
    gradients = torch.autograd.grad(loss, (hidden, head))
    assert loss.item() == 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, head, labels = example()
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, head, labels, chunk=3)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, head, labels, 0.0).detach())


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, labels = example()
    loss = chunked_cross_entropy(hidden, head.detach(), labels, chunk=4)
    (found,) = torch.autograd.grad(loss, (hidden,))
    (expected,) = torch.autograd.grad(plain(hidden, head.detach(), labels, 0.0), (hidden,))
    torch.testing.assert_close(found, expected)


def test_a_label_whose_probability_vanishes_has_its_exact_loss() -> None:
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    head, labels = torch.tensor([[200.0], [-200.0], [199.0]], requires_grad=True), torch.tensor([1, 0])
    loss = chunked_cross_entropy(hidden, head, labels, z_loss=0.1)
    torch.testing.assert_close(
        loss.double(), plain(hidden.double(), head.double(), labels, 0.1), rtol=1e-6, atol=0
    )


def test_under_bf16_autocast_the_loss_is_fp32_and_near_the_exact_one() -> None:
    hidden, head, labels = example(n=64, d=32, v=50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(hidden, head, labels, z_loss=1e-5, chunk=10)
    found = torch.autograd.grad(loss, (hidden, head))
    exact = plain(hidden, head, labels, 1e-5)
    expected = torch.autograd.grad(exact, (hidden, head))
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in found)
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)
    for gradient, reference in zip(found, expected, strict=True):
        assert functional.cosine_similarity(gradient.flatten(), reference.flatten(), dim=0) > 0.999


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
                loss = chunked_cross_entropy(hidden, head, labels, z_loss=0.03, chunk=chunk)
            found.append((loss, *torch.autograd.grad(loss, (hidden, head))))
        torch.testing.assert_close(*found, rtol=2e-2 if low else 1e-5, atol=1e-2 if low else 1e-6)


class Held(TorchDispatchMode):
    """Counts the bytes of every storage that operations made and that still lives; exact, and the same every
    time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.now, self.largest = self.now + size, max(self.largest, size)
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def chunked(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return chunked_cross_entropy(hidden, head, labels, chunk=16)


def distilled(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    target = DenseTarget(lambda rows: hidden.detach()[rows] @ head.detach().t())
    return chunked_distillation(hidden, head, labels, target, token_loss("jsd"), chunk=16)


@pytest.mark.parametrize("loss", [chunked, distilled])
def test_memory_of_a_chunked_loss_does_not_grow_with_tokens_times_vocabulary(loss: Any) -> None:
    vocab, width, found = 4096, 8, {}
    for tokens in (64, 256):
        torch.manual_seed(0)
        hidden, head = (torch.randn(rows, width, requires_grad=True) for rows in (tokens, vocab))
        labels = torch.randint(0, vocab, (tokens,))
        with Held() as held:
            loss(hidden, head, labels).backward()
        found[tokens] = held
        assert held.largest == 4 * vocab * 16  # a chunk of logits; all of them would hold 4 * vocab * tokens
    assert 0 <= found[256].peak - found[64].peak <= 192 * (4 * width * 4 + 64)  # a few numbers for each token
