"""Cross-entropy over a large vocabulary that never holds all logits: `chunked_cross_entropy(...)`.

Each chunk's share of the gradient is made in the forward pass, while its logits still exist;
distillation.py's losses go through the same `chunked_loss`. Shapes: N tokens, D hidden size, V vocabulary, C
tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100  # label of rows without a loss
# Logits of one chunk: as many as stay in a CPU's last cache (8 MB of fp32), or fill an accelerator (512 MB).
_CHUNK_ELEMENTS = {"cpu": 1 << 21, "other": 1 << 27}
# Fewest and most rows: with fewer, an accelerator would spend more on the head's gradient than on products.
_CHUNK_ROWS = {"cpu": (16, 8192), "other": (256, 8192)}
# On a CPU, rows of one matrix product, and its elements at most (256 MB of bf16): softmax is quickest on rows
# that stay in a cache, the head's gradient on as many rows as possible.
_STRETCH_ROWS, _STRETCH_ELEMENTS = 2048, 1 << 27
_TINY = 1e-30  # below it a probability's logarithm is not to be trusted in fp32

# Logits [C, V] of some rows, which the callee may overwrite; which rows; whether a gradient is wanted ->
# summed loss and its gradient by the logits.
ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
# Hidden states [C, D] that begin at that row of all -> the same, the gradient in the type of the products.
StretchLoss = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]


def chunked_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, *, z_loss: float = 0.0, chunk: int = 0
) -> Tensor:
    """Sum over tokens of `-log softmax(hidden @ head^T)[label] + z_loss * logsumexp^2`, in nats.

    Products run in autocast's type where it is on (bf16), else in that of `hidden_ND`; softmax and sums in
    fp32 (float64 for float64). The z-loss is PaLM's (arXiv 2204.02311). Rows of `IGNORE_INDEX` have no loss.
    """
    return chunked_loss(hidden_ND, head_VD, partial(_cross_entropy_of_chunk, labels_N, z_loss), chunk)


def chunked_loss(hidden_ND: Tensor, head_VD: Tensor, chunk_loss: ChunkLoss, chunk: int = 0) -> Tensor:
    """Any sum over rows of a loss on `hidden @ head^T`, a chunk of logits at a time: differentiable once.

    `chunk_loss` gets logits in fp32 (float64 for float64); `chunk` rows at a time, 0 chooses by device.
    """
    rows = chunk or default_chunk(hidden_ND.device.type, head_VD.shape[0])
    stretch = rows
    if hidden_ND.device.type == "cpu" and not chunk:
        stretch = max(1, min(_STRETCH_ROWS, _STRETCH_ELEMENTS // head_VD.shape[0]) // rows) * rows
    sizes = min(rows, max(1, len(hidden_ND))), min(stretch, max(1, len(hidden_ND)))
    apply: Any = _ChunkedLoss.apply
    loss: Tensor = apply(hidden_ND, head_VD, chunk_loss, sizes, torch.is_grad_enabled())
    return loss


def compute_dtypes(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(type of matrix products: autocast's where it is on; of logits, softmax and sums: fp32 or float64)."""
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return compute, torch.float64 if hidden.dtype == torch.float64 else torch.float32


def default_chunk(device_type: str, vocab_size: int) -> int:
    """Rows of logits at a time in their own type: at least 256 (on a CPU 16), at most 8192."""
    kind = "cpu" if device_type == "cpu" else "other"
    fewest, most = _CHUNK_ROWS[kind]
    return max(fewest, min(most, _CHUNK_ELEMENTS[kind] // vocab_size))


class _ChunkedLoss(torch.autograd.Function):
    """Forward makes the gradients of every chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        chunk_loss: ChunkLoss,
        sizes: tuple[int, int],
        grad: bool,
    ) -> Tensor:
        compute, wide = compute_dtypes(hidden_ND)
        needs_hidden, needs_head = grad and ctx.needs_input_grad[0], grad and ctx.needs_input_grad[1]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            low_VD = head_VD.detach().to(compute)
            grad_ND = torch.empty_like(hidden_ND) if needs_hidden else None
            grad_VD = torch.zeros_like(head_VD, dtype=wide) if needs_head else None
            total = hidden_ND.new_zeros((), dtype=wide)
            make = _cpu_stretches if hidden_ND.device.type == "cpu" else _gpu_chunks
            stretch_loss = make(low_VD, wide, sizes, chunk_loss, needs_hidden or needs_head)
            for start in range(0, hidden_ND.shape[0], sizes[1]):
                rows = slice(start, start + sizes[1])
                low_CD = hidden_ND[rows].detach().to(compute)
                loss, grad_CV = stretch_loss(low_CD, start)
                total += loss
                if grad_ND is not None and grad_CV is not None:
                    grad_ND[rows] = product(grad_CV, low_VD, wide)
                if grad_VD is not None and grad_CV is not None:
                    # On a CPU without a copy of the product in the wider type.
                    on_cpu, left_VC = grad_VD.device.type == "cpu", grad_CV.t()
                    grad_VD += left_VC @ low_CD if on_cpu else product(left_VC, low_CD, wide)
        ctx.save_for_backward(grad_ND, None if grad_VD is None else grad_VD.to(head_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_ND, grad_VD = ctx.saved_tensors
        scaled = [None if g is None else g * grad_loss.to(g.dtype) for g in (grad_ND, grad_VD)]
        return scaled[0], scaled[1], None, None, None


def _gpu_chunks(
    low_VD: Tensor, wide: torch.dtype, sizes: tuple[int, int], chunk_loss: ChunkLoss, grad: bool
) -> StretchLoss:
    """A chunk is one product; an accelerator's allocator keeps the memory by itself."""

    def loss(low_CD: Tensor, start: int) -> tuple[Tensor, Tensor | None]:
        rows = slice(start, start + low_CD.shape[0])
        total, grad_CV = chunk_loss(product(low_CD, low_VD.t(), wide), rows, grad)
        return total, None if grad_CV is None else grad_CV.to(low_VD.dtype)

    return loss


def _cpu_stretches(
    low_VD: Tensor, wide: torch.dtype, sizes: tuple[int, int], chunk_loss: ChunkLoss, grad: bool
) -> StretchLoss:
    """A stretch is one long product whose chunks get their softmax one by one."""
    chunk, stretch = sizes
    # All stretches share this memory: fresh from the system it would cost as much as the arithmetic.
    all_low_CV = torch.empty(stretch, low_VD.shape[0], dtype=low_VD.dtype)
    all_wide_CV = all_low_CV if low_VD.dtype == wide else torch.empty(chunk, low_VD.shape[0], dtype=wide)

    def loss(low_CD: Tensor, start: int) -> tuple[Tensor, Tensor | None]:
        low_CV = torch.mm(low_CD, low_VD.t(), out=all_low_CV[: low_CD.shape[0]])
        total = torch.zeros((), dtype=wide)
        for first in range(0, low_CV.shape[0], chunk):
            part_CV = low_CV[first : first + chunk]
            count, same = part_CV.shape[0], all_wide_CV is all_low_CV
            logits_CV = part_CV if same else all_wide_CV[:count].copy_(part_CV)
            part_loss, grad_CV = chunk_loss(logits_CV, slice(start + first, start + first + count), grad)
            total += part_loss
            if grad_CV is not None and grad_CV.data_ptr() != part_CV.data_ptr():
                part_CV.copy_(grad_CV)
        return total, low_CV if grad else None

    return loss


def product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """Matrix product in `wide`; where the device can, its sums are never rounded below it."""
    if left.is_cuda and left.dtype != wide and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=wide)
    return (left @ right).to(wide)


def _cross_entropy_of_chunk(
    labels_N: Tensor, z_loss: float, logits_CV: Tensor, rows: slice, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of a chunk and, made in the memory of its logits, its gradient by them."""
    labels_C = labels_N[rows]
    trained_C = labels_C != IGNORE_INDEX
    safe_C1 = labels_C.where(trained_C, 0)[:, None]
    probs_CV, lse_C, label_logp_C = _softmax(logits_CV, safe_C1)
    loss_C = -label_logp_C + z_loss * lse_C.square()
    loss = loss_C.where(trained_C, 0).sum()
    if not grad:
        return loss, None
    scale_C = trained_C.to(logits_CV.dtype)
    grad_CV = probs_CV.mul_((scale_C * (1 + 2 * z_loss * lse_C))[:, None])
    return loss, grad_CV.scatter_add_(1, safe_C1, -scale_C[:, None])


def _softmax(logits_CV: Tensor, labels_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, in the memory of the logits; logsumexp of each row; log-probs of the labels."""
    label_logit_C = logits_CV.gather(1, labels_C1)[:, 0]
    if logits_CV.device.type != "cpu":
        logp_CV = torch.log_softmax(logits_CV, dim=-1)
        label_logp_C = logp_CV.gather(1, labels_C1)[:, 0]
        return logp_CV.exp_(), label_logit_C - label_logp_C, label_logp_C
    # One pass with exponentials, not two. Where a label's probability is 0 here, the largest tells the sum.
    largest_C = logits_CV.amax(-1)
    probs_CV = torch.softmax(logits_CV, -1, out=logits_CV)
    label_prob_C = probs_CV.gather(1, labels_C1)[:, 0]
    if bool((label_prob_C < _TINY).any()):
        lse_C = largest_C - probs_CV.amax(-1).log()
        return probs_CV, lse_C, label_logit_C - lse_C
    label_logp_C = label_prob_C.log()
    return probs_CV, label_logit_C - label_logp_C, label_logp_C
