"""Token-level losses equal their formulas in float64, in value and in gradient, for whole and for bucketed
distributions.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastdraft.functional.distillation import (
    DenseTarget,
    SparseTarget,
    TargetDistribution,
    chunked_distillation,
    lk_hybrid,
    token_loss,
    top_k_buckets,
)

LOSSES = ("forward_kl", "reverse_kl", "jsd", "tvd", "ce_kl", "ce_tvd", "lk_hybrid", "lk_log")
BETA = 0.3
EITHER = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first * (first / second).log()).sum(-1)


def overlap(target: Tensor, draft: Tensor) -> Tensor:
    return torch.minimum(target, draft).sum(-1)


def middle(target: Tensor, draft: Tensor) -> Tensor:
    return BETA * target + (1 - BETA) * draft


def hybrid(target: Tensor, draft: Tensor) -> Tensor:
    share = torch.exp(-3 * overlap(target, draft).detach())
    return share * kl(target, draft) + (1 - share) * (1 - overlap(target, draft))


PLAIN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda t, d, ce: kl(t, d),
    "reverse_kl": lambda t, d, ce: kl(d, t),
    "jsd": lambda t, d, ce: BETA * kl(t, middle(t, d)) + (1 - BETA) * kl(d, middle(t, d)),
    "tvd": lambda t, d, ce: (t - d).abs().sum(-1) / 2,
    "ce_kl": lambda t, d, ce: ce / 2 + kl(t, d) / 2,
    "ce_tvd": lambda t, d, ce: ce / 2 + (t - d).abs().sum(-1) / 4,
    "lk_hybrid": lambda t, d, ce: hybrid(t, d),
    "lk_log": lambda t, d, ce: -overlap(t, d).log(),
}
"""Target and draft probabilities by token or bucket, and the label's cross-entropy: the formulas as they
stand in the papers.
"""


class Example:
    """Hidden states, head, labels (two of them ignored) and the target's logits, in float64 or another
    type.
    """

    def __init__(
        self, n: int = 13, d: int = 6, v: int = 11, k: int = 3, dtype: torch.dtype = torch.float64
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(n, d, generator=generator, dtype=dtype).requires_grad_()
        self.head = torch.randn(v, d, generator=generator, dtype=dtype).requires_grad_()
        self.target_logits = 2 * torch.randn(n, v, generator=generator, dtype=dtype)
        self.labels = torch.randint(0, v, (n,), generator=generator)
        self.labels[2] = self.labels[n // 2] = -100
        self.k = k

    def target(self, sparse: bool) -> TargetDistribution:
        if sparse:
            return top_k_buckets(self.target_logits, self.k)
        return DenseTarget(self.target_logits.__getitem__)

    def found(self, name: str, sparse: bool, chunk: int = 0) -> Tensor:
        target, loss = self.target(sparse), token_loss(name, BETA)
        return chunked_distillation(self.hidden, self.head, self.labels, target, loss, chunk=chunk)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.head))

    def plain(self, name: str, sparse: bool) -> Tensor:
        logits = (self.hidden @ self.head.t()).double()
        draft, target = logits.softmax(-1), self.target_logits.double().softmax(-1)
        cross_entropy = functional.cross_entropy(logits, self.labels, ignore_index=-100, reduction="none")
        if sparse:
            ids = self.target_logits.topk(self.k).indices
            draft, target = (
                torch.cat([x.gather(1, ids), 1 - x.gather(1, ids).sum(1, keepdim=True)], 1)
                for x in (draft, target)
            )
        return PLAIN[name](target, draft, cross_entropy)[self.labels != -100].sum()


@EITHER
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_value_and_gradients_equal_those_of_the_plain_formula(name: str, sparse: bool, chunk: int) -> None:
    example = Example()
    loss, expected = example.found(name, sparse, chunk), example.plain(name, sparse)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(example.gradients(loss * 0.37), example.gradients(expected * 0.37))


@EITHER
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "lk_hybrid"])
def test_gradients_pass_gradcheck(name: str, sparse: bool) -> None:
    example = Example(
        n=5, d=3, v=6, k=2
    )  # lk_hybrid's weight has no gradient by intent, so finite differences disagree there
    target, loss = example.target(sparse), token_loss(name, BETA)

    def call(hidden: Tensor, head: Tensor) -> Tensor:
        return chunked_distillation(hidden, head, example.labels, target, loss, chunk=2)

    assert torch.autograd.gradcheck(call, (example.hidden, example.head))


@EITHER
@pytest.mark.parametrize("name", LOSSES)
def test_ignored_rows_have_no_loss_and_no_gradient_whatever_the_target_holds_there(
    name: str, sparse: bool
) -> None:
    example = Example()
    expected = torch.autograd.grad(example.found(name, sparse), example.hidden)[0]
    example.target_logits[example.labels == -100] = torch.nan
    (found,) = torch.autograd.grad(example.found(name, sparse), example.hidden)
    assert found[example.labels == -100].abs().sum() == 0
    torch.testing.assert_close(found, expected)
    example.labels[:] = -100
    loss = example.found(name, sparse)
    assert loss.item() == 0
    assert all(gradient.abs().sum() == 0 for gradient in example.gradients(loss))


@EITHER
@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("ce_")])
def test_a_draft_equal_to_the_target_has_no_loss(name: str, sparse: bool) -> None:
    example = Example()
    example.target_logits = (example.hidden @ example.head.t()).detach()
    assert example.found(name, sparse).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "lk_hybrid"])
def test_buckets_give_a_lower_bound_that_meets_the_dense_loss_as_k_grows(name: str) -> None:
    example, found = Example(v=40), []
    for example.k in (1, 5, 20, 39, 40):
        found.append(example.found(name, True).item())
    dense = example.found(name, False).item()
    assert found == sorted(found)
    assert found[-1] == pytest.approx(dense)
    assert found[-2] == pytest.approx(dense)


@EITHER
@pytest.mark.parametrize("name", LOSSES)
def test_distributions_far_apart_and_sharp_stay_finite(name: str, sparse: bool) -> None:
    example = Example(dtype=torch.float32)
    example.target_logits = example.target_logits * 1000
    example.head = (example.head.detach() * 1000).requires_grad_()
    loss = example.found(name, sparse)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in example.gradients(loss))


def test_when_every_token_is_kept_an_empty_tail_adds_nothing() -> None:
    example = Example(k=11)
    target = example.target(True)
    assert isinstance(target, SparseTarget)
    assert (target.logprobs[:, -1] == -1e4).all()
    for name in LOSSES:
        loss, dense = example.found(name, True), example.found(name, False)
        torch.testing.assert_close(loss, dense)
        torch.testing.assert_close(example.gradients(loss), example.gradients(dense))


def test_the_hybrids_weight_moves_from_kl_to_total_variation_as_the_overlap_grows() -> None:
    target = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    far, near = (torch.tensor(d, dtype=torch.float64) for d in ([0.01, 0.01, 0.98], [0.6, 0.3, 0.1]))
    for draft, share in ((far, 0.6977), (near, 0.0672)):
        expected = share * kl(target, draft) + (1 - share) * (target - draft).abs().sum() / 2
        assert lk_hybrid(target.log(), draft.log()).item() == pytest.approx(expected.item(), rel=1e-3)


def test_under_bf16_autocast_the_loss_is_fp32_and_near_the_exact_one() -> None:
    example = Example(n=64, d=32, v=50, dtype=torch.float32)
    for sparse in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = example.found("lk_hybrid", sparse, chunk=10)
        found, exact = torch.autograd.grad(loss, example.head)[0], example.plain("lk_hybrid", sparse)
        expected = torch.autograd.grad(exact, example.head)[0]
        assert (loss.dtype, found.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-2, atol=0)
        assert functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999
