"""How several processes make one gradient: each the sum over its share, then the sum of all.

Decides that gradients are divided once, by the trained tokens of the whole step (training/step.py), and added, not averaged, so that the
number of processes changes the order of additions and nothing else. In a step whose micro-batches are known to fit, gradients travel while
the last micro-batch is still in its backward pass (torch's DistributedDataParallel, arXiv 2006.15704); a larger micro-batch than
any before is computed first and agreed upon, so that where it does not fit all processes take smaller ones together.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastdraft.training.batches import Batch
from fastdraft.training.distributed import World
from fastdraft.training.step import TrainStep

IDLE = Batch(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
"""What a process without rows of its own computes, at weight 0, so that it takes part in the sum."""


class ElsewhereOutOfMemory(MemoryError):
    """Another process ran out of memory in this step."""


class DataParallel:
    """Every process holds the whole model (DDP).

    Args:
        model: Its weights become those of process 0.
        world: All processes.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # torch 2.13 renames the option, 2.9 does not know the new name
            self._module = DistributedDataParallel(
                _LossSum(model), broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self._module.register_comm_hook(
            None, lambda state, bucket: _add(bucket)
        )  # torch reads the annotations of anything else
        self.overlap = self.committed = (
            False  # committed: gradients may be on their way, so the step cannot be tried again
        )

    def begin(self, overlap: bool) -> None:
        """Before a step, or before it is tried again. `overlap`: gradients travel during the last backward pass."""
        self.overlap = self.committed = overlap

    def loss_sum(self, step: TrainStep, batch: Batch, last: bool) -> Tensor:
        self._module.require_backward_grad_sync = last and self.overlap
        if batch is IDLE:
            return self._loss(step, batch) * 0.0
        return self._loss(step, batch)

    def _loss(self, step: TrainStep, batch: Batch) -> Tensor:
        loss: Tensor = self._module(batch, step.loss_sum)
        return loss

    def reduce(self, step: TrainStep, loss: Tensor) -> Tensor:
        """Adds losses, and the gradients that have not travelled yet.

        Raises:
            ElsewhereOutOfMemory: when the step did not fit another process; all drop it then.
        """
        if not self.overlap:
            if not self._world.all_agree(True):
                raise ElsewhereOutOfMemory
            self.committed = True
            for work in [
                dist.all_reduce(parameter.grad, async_op=True)
                for parameter in step.parameters
                if parameter.grad is not None
            ]:
                work.wait()
        dist.all_reduce(loss)
        return loss

    def clip(self, step: TrainStep) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(step.parameters, step.clip)

    def report_out_of_memory(self) -> None:
        """Tells the others, who wait in `reduce`, that this process could not finish the step."""
        self._world.all_agree(False)


class _LossSum(nn.Module):
    """The forward pass that DDP wraps: from a micro-batch to its summed loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, loss_sum: Any) -> Tensor:
        loss: Tensor = loss_sum(batch)
        return loss


def _add(bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP's own hook divides by the number of processes; this one only adds."""
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    added: torch.futures.Future[Tensor] = future.then(lambda done: done.value()[0])
    return added
