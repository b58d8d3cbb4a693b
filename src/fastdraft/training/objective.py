"""What the draft is taught: a loss over hidden states, the door for every way of distillation.

Decides the one interface that the loop knows. An objective is given the draft's last hidden states at the trained positions and
the head, never whole logits, so that it can go through the vocabulary in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastdraft.functional.losses import chunked_cross_entropy
from fastdraft.training.batches import Batch


class Objective(Protocol):
    """A loss summed over the trained tokens of a micro-batch."""

    def loss(self, hidden_ND: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
        """Sum (not mean) in nats over the N trained tokens: scalar, fp32, differentiable by hidden and head."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Next-token cross-entropy; on responses that the target wrote this is sequence-level distillation (arXiv 1606.07947)."""

    z_loss: float = 0.0
    """Weight of the squared log-partition, which keeps logits from drifting."""
    chunk: int = 0
    """Rows of logits at a time; 0 chooses by device."""

    def loss(self, hidden_ND: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
        return chunked_cross_entropy(hidden_ND, head_VD, batch.labels, z_loss=self.z_loss, chunk=self.chunk)[0]
