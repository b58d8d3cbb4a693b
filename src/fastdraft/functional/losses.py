"""Losses as pure functions of tensors.

Decides how a loss over a large vocabulary is computed without ever holding tokens x vocabulary logits: rows are taken in
chunks, and each chunk's share of the gradient is made in the forward pass, while its logits still exist. The cross-entropy
is here; those against a whole distribution of the target are in functional/distillation.py.

Shapes: N tokens, D hidden size, V vocabulary, C tokens of one chunk (`logits_CV`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100
_CHUNK_ELEMENTS = {"cpu": 1 << 21, "other": 1 << 27}
"""Logits of one chunk: as many as stay in a CPU's cache (8 MB of fp32), or as fill an accelerator's units (512 MB)."""
_CHUNK_ROWS = 256, 8192
"""Fewer rows, and reading the head's weights and adding to their gradient would cost more than the products."""

_TINY = 1e-30
"""Below it a probability's logarithm is not to be trusted in fp32."""

ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""Logits [C, V] of some rows, which rows these are, whether a gradient is wanted -> their summed loss and its gradient by the logits.

The logits are the callee's to overwrite."""


def chunked_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, ignore_index: int = IGNORE_INDEX, z_loss: float = 0.0, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """Sum over tokens of `-log softmax(hidden @ head^T)[label] + z_loss * logsumexp^2`.

    The matrix products run in autocast's type where autocast is on (bf16), else in the type of `hidden_ND`; softmax and
    sums are in fp32 (float64 for float64 input). The z-loss is that of PaLM (arXiv 2204.02311, section 5).

    Args:
        hidden_ND: last hidden states, float [N, D].
        head_VD: weight of the output head without bias, float [V, D].
        labels_N: the wanted next token of each row, int64 [N]; `ignore_index` takes a row out of the loss.
        ignore_index: label of rows without a loss.
        z_loss: weight of the squared log-partition, 0 to leave it out.
        chunk: rows whose logits exist at a time; 0 chooses by device and vocabulary.

    Returns:
        The sum of the losses in nats (scalar; differentiable once by hidden and head) and the number of trained tokens (int64
        scalar). Nothing is divided: the caller knows over how many tokens its batch goes.
    """
    chunk_loss = partial(_cross_entropy_of_chunk, labels_N, ignore_index, z_loss)
    return chunked_loss(hidden_ND, head_VD, chunk_loss, chunk), (labels_N != ignore_index).sum()


def chunked_loss(hidden_ND: Tensor, head_VD: Tensor, chunk_loss: ChunkLoss, chunk: int = 0) -> Tensor:
    """Any loss over rows of `hidden @ head^T` that is a sum over rows, a chunk of logits at a time.

    Args:
        hidden_ND: last hidden states, float [N, D].
        head_VD: weight of the output head without bias, float [V, D].
        chunk_loss: what is done with a chunk's logits, given in fp32 (float64 for float64 input).
        chunk: rows whose logits exist at a time; 0 chooses by device and vocabulary.

    Returns:
        The sum over all rows: scalar, fp32 or float64, differentiable once by hidden and head.
    """
    chunk = chunk or default_chunk(hidden_ND.device.type, head_VD.shape[0])
    loss: Tensor = _ChunkedLoss.apply(hidden_ND, head_VD, chunk_loss, chunk, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss


def compute_dtypes(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(type of the matrix products: autocast's where it is on; type of logits, softmax and sums: fp32, or float64 for float64)."""
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return compute, torch.float64 if hidden.dtype == torch.float64 else torch.float32


def default_chunk(device_type: str, vocab_size: int) -> int:
    """Rows per chunk: at least 256, at most 8192."""
    elements = _CHUNK_ELEMENTS["cpu" if device_type == "cpu" else "other"]
    return max(_CHUNK_ROWS[0], min(_CHUNK_ROWS[1], elements // vocab_size))


class _ChunkedLoss(torch.autograd.Function):
    """Forward makes the gradients of every chunk; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, chunk_loss: ChunkLoss, chunk: int, grad: bool) -> Tensor:  # noqa: PLR0917
        compute, wide = compute_dtypes(hidden_ND)
        needs_hidden, needs_head = grad and ctx.needs_input_grad[0], grad and ctx.needs_input_grad[1]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            low_VD = head_VD.detach().to(compute)
            grad_ND = torch.empty_like(hidden_ND) if needs_hidden else None
            grad_VD = torch.zeros_like(head_VD, dtype=wide) if needs_head else None
            total = hidden_ND.new_zeros((), dtype=wide)
            memory = _Memory(min(chunk, hidden_ND.shape[0]), head_VD.shape[0], compute, wide, hidden_ND.device)
            for start in range(0, hidden_ND.shape[0], chunk):
                rows = slice(start, start + chunk)
                low_CD = hidden_ND[rows].detach().to(compute)
                loss, grad_CV = chunk_loss(memory.logits(low_CD, low_VD), rows, needs_hidden or needs_head)
                total += loss
                if grad_CV is not None:
                    grad_CV = memory.low(grad_CV)
                if grad_ND is not None and grad_CV is not None:
                    grad_ND[rows] = product(grad_CV, low_VD, wide)
                if grad_VD is not None and grad_CV is not None:
                    _add_product(grad_VD, grad_CV.t(), low_CD)
        ctx.save_for_backward(grad_ND, None if grad_VD is None else grad_VD.to(head_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, grad_VD = ctx.saved_tensors
        scaled = [None if g is None else g * grad_loss.to(g.dtype) for g in (grad_ND, grad_VD)]
        return scaled[0], scaled[1], None, None, None


class _Memory:
    """A chunk's logits in their own type and in that of the products, in memory that all chunks of a call share on a CPU.

    There, memory fresh from the system costs as much as the arithmetic; an accelerator has an allocator that keeps it.
    """

    def __init__(self, rows: int, vocab_size: int, compute: torch.dtype, wide: torch.dtype, device: torch.device) -> None:  # noqa: PLR0917
        self.compute, self.wide = compute, wide
        self.shared = device.type == "cpu"
        if self.shared:
            self._wide_CV = torch.empty(rows, vocab_size, dtype=wide)
            self._low_CV = self._wide_CV if compute == wide else torch.empty(rows, vocab_size, dtype=compute)

    def logits(self, low_CD: Tensor, low_VD: Tensor) -> Tensor:
        if not self.shared:
            return product(low_CD, low_VD.t(), self.wide)
        low_CV = torch.mm(low_CD, low_VD.t(), out=self._low_CV[: low_CD.shape[0]])
        return low_CV if self._low_CV is self._wide_CV else self._wide_CV[: low_CD.shape[0]].copy_(low_CV)

    def low(self, grad_CV: Tensor) -> Tensor:
        """A chunk's gradient in the type of the products."""
        if not self.shared:
            return grad_CV.to(self.compute)
        return grad_CV if grad_CV.dtype == self._low_CV.dtype else self._low_CV[: grad_CV.shape[0]].copy_(grad_CV)


def product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """Matrix product in `wide`; where the device can, the sums over low-precision factors are never rounded below it."""
    if left.is_cuda and left.dtype != wide and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=wide)
    return (left @ right).to(wide)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right without a copy of the product in the total's type where its own is narrower."""
    total += left @ right if total.device.type == "cpu" else product(left, right, total.dtype)


def _cross_entropy_of_chunk(  # noqa: PLR0917 - the first three are bound
    labels_N: Tensor, ignore_index: int, z_loss: float, logits_CV: Tensor, rows: slice, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of a chunk and, made in the memory of its logits, its gradient by them."""
    labels_C = labels_N[rows]
    trained_C = labels_C != ignore_index
    safe_C1 = labels_C.where(trained_C, 0)[:, None]
    probs_CV, lse_C, label_logp_C = _softmax(logits_CV, safe_C1)
    loss_C = -label_logp_C + z_loss * lse_C.square()
    loss = loss_C.where(trained_C, 0).sum()
    if not grad:
        return loss, None
    scale_C = trained_C.to(logits_CV.dtype)
    grad_CV = probs_CV.mul_((scale_C * (1 + 2 * z_loss * lse_C))[:, None])
    grad_CV.scatter_add_(1, safe_C1, -scale_C[:, None])
    return loss, grad_CV


def _softmax(logits_CV: Tensor, labels_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, made in the memory of the logits; the log of the sum of exponentials of each row; log-probs of the labels."""
    label_logit_C = logits_CV.gather(1, labels_C1)[:, 0]
    if logits_CV.device.type != "cpu":
        logp_CV = torch.log_softmax(logits_CV, dim=-1)
        label_logp_C = logp_CV.gather(1, labels_C1)[:, 0]
        return logp_CV.exp_(), label_logit_C - label_logp_C, label_logp_C
    # One pass instead of two with exponentials in them. Where a label's probability is 0 in this type, the largest one tells the sum.
    largest_C = logits_CV.amax(-1)
    probs_CV = torch.softmax(logits_CV, -1, out=logits_CV)
    label_prob_C = probs_CV.gather(1, labels_C1)[:, 0]
    if bool((label_prob_C < _TINY).any()):
        lse_C = largest_C - probs_CV.amax(-1).log()
        return probs_CV, lse_C, label_logit_C - lse_C
    label_logp_C = label_prob_C.log()
    return probs_CV, label_logit_C - label_logp_C, label_logp_C
