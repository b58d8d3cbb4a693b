"""What the draft is taught: a loss over its hidden states at the trained positions, not over whole logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdraft.functional.distillation import DenseTarget, TargetDistribution, TokenLoss, chunked_distillation
from fastdraft.functional.losses import chunked_cross_entropy, compute_dtypes, product
from fastdraft.modeling.heads import OutputHead
from fastdraft.training.batches import Batch
from fastdraft.training.gpu_attention import flash_decoder


class Objective(Protocol):
    """A loss summed (not averaged) over the trained tokens of a micro-batch, in nats: fp32."""

    def loss(self, hidden_ND: Tensor, head_VD: Tensor, batch: Batch) -> Tensor: ...

    def labels_only(self, batch: Batch) -> bool:
        """Whether the labels are all that it knows of what is wanted."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Next-token cross-entropy; on the target's responses sequence-level distillation (arXiv 1606.07947)."""

    z_loss: float = 0.0  # weight of the squared log-partition, which keeps logits from drifting

    def loss(self, hidden_ND: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
        return chunked_cross_entropy(hidden_ND, head_VD, batch.labels, z_loss=self.z_loss)

    def labels_only(self, batch: Batch) -> bool:
        return True


@dataclass(frozen=True)
class TokenDistillation:
    """A loss between the target's distribution and the draft's at every trained position."""

    token_loss: TokenLoss
    # None: a batch brings its distribution with it, or has cross-entropy (rows of the mixture).
    target: LoadedTarget | None = None

    def loss(self, hidden_ND: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
        distribution: TargetDistribution | None
        distribution = self.target.distribution(batch) if self.target else batch.target
        if distribution is None:
            return CrossEntropy().loss(hidden_ND, head_VD, batch)
        return chunked_distillation(hidden_ND, head_VD, batch.labels, distribution, self.token_loss)

    def labels_only(self, batch: Batch) -> bool:
        return self.target is None and batch.target is None


class LoadedTarget:
    """The target beside the draft; it sees the draft's inputs and runs in the step's autocast.

    `ids`: those of the draft's trimmed head; None: all.
    """

    def __init__(self, decoder: nn.Module, head: OutputHead, ids: Tensor | None = None) -> None:
        fast = flash_decoder(decoder) if head.weight.device.type != "cpu" else None
        self.decoder: Callable[..., Any] = fast or decoder
        self.head, self.ids = head, ids

    @torch.no_grad()
    def distribution(self, batch: Batch) -> DenseTarget:
        """At the trained positions; its logits are made when a chunk asks for them."""
        hidden_NE = self.decoder(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        if batch.index is not None:
            hidden_NE = hidden_NE.index_select(0, batch.index)
        compute, wide = compute_dtypes(hidden_NE)
        low_NE, low_EV = hidden_NE.to(compute), self.head.weight.detach().to(compute).t()
        size = self.head.vocab_size
        return DenseTarget(lambda rows: self.head.finish(product(low_NE[rows], low_EV, wide)), self.ids, size)
