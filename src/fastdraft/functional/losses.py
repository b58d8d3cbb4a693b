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
"""Logits of one chunk: as many as stay in a CPU's last cache (8 MB of fp32), or as fill an accelerator's units (512 MB)."""
_CHUNK_ROWS = {"cpu": (16, 8192), "other": (256, 8192)}
"""Fewest and most: with fewer rows, an accelerator would spend more on reading the head's weights and adding to their gradient than on
the products; a CPU has longer products, see below."""
_STRETCH_ROWS, _STRETCH_ELEMENTS = 2048, 1 << 27
"""On a CPU, rows of one matrix product, and its elements at most (256 MB of bf16): softmax is quickest on rows that stay in a cache, the
head's gradient on as many rows as possible."""

_TINY = 1e-30
"""Below it a probability's logarithm is not to be trusted in fp32."""

ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""Logits [C, V] of some rows, which rows these are, whether a gradient is wanted -> their summed loss and its gradient by the logits.

The logits are the callee's to overwrite."""


def chunked_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    chunk: int = 0,
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
    rows = chunk or default_chunk(hidden_ND.device.type, head_VD.shape[0])
    stretch = rows if chunk or hidden_ND.device.type != "cpu" else _stretch(rows, head_VD.shape[0])
    loss: Tensor = _ChunkedLoss.apply(
        hidden_ND, head_VD, chunk_loss, (rows, stretch), torch.is_grad_enabled()
    )  # type: ignore[no-untyped-call]
    return loss


def compute_dtypes(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """(type of the matrix products: autocast's where it is on; type of logits, softmax and sums: fp32, or float64 for float64)."""
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return compute, torch.float64 if hidden.dtype == torch.float64 else torch.float32


def default_chunk(device_type: str, vocab_size: int) -> int:
    """Rows of logits at a time in their own type: at least 256 (on a CPU 16), at most 8192."""
    kind = "cpu" if device_type == "cpu" else "other"
    fewest, most = _CHUNK_ROWS[kind]
    return max(fewest, min(most, _CHUNK_ELEMENTS[kind] // vocab_size))


def _stretch(rows: int, vocab_size: int) -> int:
    """Rows of one matrix product on a CPU, several chunks: the head's gradient is added to once a stretch, not once a chunk."""
    return max(1, min(_STRETCH_ROWS, _STRETCH_ELEMENTS // vocab_size) // rows) * rows


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
    ) -> Tensor:  # noqa: PLR0917
        compute, wide = compute_dtypes(hidden_ND)
        needs_hidden, needs_head = grad and ctx.needs_input_grad[0], grad and ctx.needs_input_grad[1]
        with torch.autocast(hidden_ND.device.type, enabled=False):
            low_VD = head_VD.detach().to(compute)
            grad_ND = torch.empty_like(hidden_ND) if needs_hidden else None
            grad_VD = torch.zeros_like(head_VD, dtype=wide) if needs_head else None
            total = hidden_ND.new_zeros((), dtype=wide)
            chunk, stretch = sizes
            memory = _Memory(
                (min(chunk, len(hidden_ND)), min(stretch, len(hidden_ND))),
                head_VD.shape[0],
                compute,
                wide,
                hidden_ND.device,
            )
            for start in range(0, hidden_ND.shape[0], stretch):
                rows = slice(start, start + stretch)
                low_CD = hidden_ND[rows].detach().to(compute)
                loss, grad_CV = memory.loss(low_CD, low_VD, chunk_loss, start, needs_hidden or needs_head)
                total += loss
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
    """The logits of a stretch of rows in the type of the products, those of a chunk in their own; on a CPU all stretches share them.

    There, memory fresh from the system costs as much as the arithmetic; an accelerator has an allocator that keeps it.
    """

    def __init__(
        self,
        sizes: tuple[int, int],
        vocab_size: int,
        compute: torch.dtype,
        wide: torch.dtype,
        device: torch.device,
    ) -> None:
        chunk, stretch = sizes
        self.chunk, self.compute, self.wide = max(1, chunk), compute, wide
        self.shared = device.type == "cpu"
        if self.shared:
            self._low_CV = torch.empty(stretch, vocab_size, dtype=compute)
            self._wide_CV = self._low_CV if compute == wide else torch.empty(chunk, vocab_size, dtype=wide)

    def loss(
        self, low_CD: Tensor, low_VD: Tensor, chunk_loss: ChunkLoss, start: int, grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Summed loss of a stretch that begins at row `start` of all, and its gradient by the logits in the type of the products."""
        if not self.shared:
            rows = slice(start, start + low_CD.shape[0])
            loss, grad_CV = chunk_loss(product(low_CD, low_VD.t(), self.wide), rows, grad)
            return loss, None if grad_CV is None else grad_CV.to(self.compute)
        low_CV = torch.mm(low_CD, low_VD.t(), out=self._low_CV[: low_CD.shape[0]])
        total = torch.zeros((), dtype=self.wide)
        for first in range(0, low_CV.shape[0], self.chunk):
            part_CV = low_CV[first : first + self.chunk]
            logits_CV = (
                part_CV if self._wide_CV is self._low_CV else self._wide_CV[: part_CV.shape[0]].copy_(part_CV)
            )
            loss, grad_CV = chunk_loss(
                logits_CV, slice(start + first, start + first + part_CV.shape[0]), grad
            )
            total += loss
            if grad_CV is not None and grad_CV.data_ptr() != part_CV.data_ptr():
                part_CV.copy_(grad_CV)
        return total, low_CV if grad else None


def product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """Matrix product in `wide`; where the device can, the sums over low-precision factors are never rounded below it."""
    if left.is_cuda and left.dtype != wide and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=wide)
    return (left @ right).to(wide)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total` without a copy of the product in the total's type where its own is narrower."""
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
