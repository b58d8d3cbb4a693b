"""What the draft is taught: a loss over hidden states, the door for every way of distillation.

Decides the one interface that the loop knows. An objective is given the draft's last hidden states at the trained positions and
the head, never whole logits, so that it can go through the vocabulary in chunks. Decides too where the target's distribution comes
from in token-level distillation: what a batch brings with it, else the loaded target, else there is none and the label must do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fastdraft.functional.distillation import DenseTarget, TargetDistribution, TokenLoss, chunked_distillation
from fastdraft.functional.liger import liger_cross_entropy
from fastdraft.functional.losses import chunked_cross_entropy, compute_dtypes, product
from fastdraft.modeling.heads import OutputHead
from fastdraft.training.batches import Batch
from fastdraft.training.flash import flash


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
    path: Literal["chunked", "liger"] = "chunked"
    """Our chunks, or Liger's kernels, which have chunks of their own (training/loss_path.py chooses)."""

    def loss(self, hidden_ND: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
        if self.path == "liger":
            return liger_cross_entropy(hidden_ND, head_VD, batch.labels, z_loss=self.z_loss)
        return chunked_cross_entropy(hidden_ND, head_VD, batch.labels, z_loss=self.z_loss, chunk=self.chunk)[
            0
        ]


@dataclass(frozen=True)
class TokenDistillation:
    """A loss between the target's distribution and the draft's at every trained position."""

    token_loss: TokenLoss
    target: LoadedTarget | None = None
    """Asked for every batch; None: a batch brings its own distribution, or has cross-entropy (rows of the pre-training mixture)."""
    chunk: int = 0
    """Rows of logits at a time; 0 chooses by device."""

    def loss(self, hidden_ND: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
        distribution: TargetDistribution | None = (
            self.target.distribution(batch) if self.target else batch.target
        )
        if distribution is None:
            return CrossEntropy(chunk=self.chunk).loss(hidden_ND, head_VD, batch)
        return chunked_distillation(
            hidden_ND, head_VD, batch.labels, distribution, self.token_loss, chunk=self.chunk
        )[0]


@dataclass(frozen=True)
class LoadedTarget:
    """The target beside the draft; it sees the draft's inputs and runs in the step's autocast."""

    decoder: nn.Module | Callable[..., Any]
    head: OutputHead
    """Of as many ids as the draft's; its weight [V, E] may be scaled, biased or capped."""

    def __post_init__(self) -> None:
        fast = (
            flash(self.decoder)
            if isinstance(self.decoder, nn.Module) and self.head.weight.device.type != "cpu"
            else None
        )
        if fast is not None:  # it is called with the draft's batches: one causal text, or texts apart
            object.__setattr__(self, "decoder", fast)

    @torch.no_grad()
    def distribution(self, batch: Batch) -> DenseTarget:
        """At the trained positions; logits are made chunk by chunk, from hidden states that stand for the whole batch."""
        hidden_NE = self.decoder(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        if batch.index is not None:
            hidden_NE = hidden_NE.index_select(0, batch.index)
        compute, wide = compute_dtypes(hidden_NE)
        low_NE, low_EV = hidden_NE.to(compute), self.head.weight.detach().to(compute).t()
        return DenseTarget(lambda rows: self.head.finish(product(low_NE[rows], low_EV, wide)))
