"""One optimiser step, bare: `step.gradients(batches)`, then `step.update(factor)` or `step.skip()`.

fp32 weights, products in bf16 autocast. A gradient is the mean over all trained tokens of the batch, so that
the micro-batch changes memory and speed but not the mathematics. Knows no recipe: benchmarks use it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdraft.errors import DataError
from fastdraft.training.batches import Batch
from fastdraft.training.distributed import IDLE, Replicas
from fastdraft.training.objective import Objective
from fastdraft.training.optimizer import PEAK


def default_micro_batch_tokens(device: torch.device) -> int:
    """Tokens that go through the model at once where the recipe leaves it open."""
    return 8192 if device.type == "cpu" else 32768  # a CPU's caches, an accelerator's units


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """For `bf16`, `fp32` or `auto` (bf16 where the device computes it natively); None is fp32."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device.type == "cpu":  # emulated bf16 is slower than fp32
            names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            native = any(getattr(torch.cpu, name, bool)() for name in names)
        else:
            native = device.type == "xpu"
        return torch.bfloat16 if native else None
    return torch.bfloat16 if precision == "bf16" else None


@dataclass
class TrainStep:
    """The parts that one step needs."""

    decoder: nn.Module | Callable[..., Any]  # gives `.last_hidden_state` [B, T, D] for `input_ids`
    head: Tensor  # weight of the output head [V, D], of a trimmed one [K, D]
    parameters: Sequence[nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    objective: Objective
    device: torch.device
    autocast: torch.dtype | None = None
    clip: float = 1.0  # largest norm of the whole gradient
    replicas: Replicas | None = None  # the other processes that work on the same step
    rows: Tensor | None = None  # [V] of a trimmed head, on the CPU: the row of each id, K where it has none

    def on_head(self, batch: Batch) -> Batch:
        """What `gradients` and `loss_sum` take, from a batch as a source gives it."""
        if self.rows is None:
            return batch
        return batch.on_head(self.rows, len(self.head), keep=not self.objective.labels_only(batch))

    def loss_sum(self, batch: Batch) -> Tensor:
        """The objective summed over the batch's trained tokens."""
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            hidden_ND = self.decoder(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
            if batch.index is not None:
                hidden_ND = hidden_ND.index_select(0, batch.index)
            return self.objective.loss(hidden_ND, self.head, batch)

    def gradients(self, batches: Sequence[Batch], num_trained: int | None = None) -> tuple[float, float, int]:
        """Fills the gradients with the mean over `num_trained` tokens of all processes (None: of `batches`).

        Returns the mean loss (nats per token), the gradient's norm before clipping, the trained tokens.
        """
        if num_trained is None:
            num_trained = sum(batch.num_trained for batch in batches)
        if num_trained == 0:
            raise DataError("training batch: 0 trained tokens; each step needs some", "check the responses")
        total = torch.zeros((), device=self.device)
        batches = batches or [IDLE]  # more processes than rows
        for number, batch in enumerate(batches, start=1):
            last = number == len(batches)
            loss = self.replicas.loss_sum(batch, last) if self.replicas else self.loss_sum(batch)
            torch.autograd.backward(loss / num_trained)
            total += loss.detach()
        if self.replicas:
            torch.distributed.all_reduce(total)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        # Reading these two numbers is the step's only wait for the device.
        mean, gradient_norm = torch.stack([total / num_trained, norm.to(total.dtype)]).tolist()
        return mean, gradient_norm, num_trained

    def update(self, factor: float) -> None:
        """Moves the weights along the gradients with `factor` times each group's peak rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group[PEAK] * factor
            optimizer.step()
        # Fused optimisers do not, and copies of the weights go by it.
        torch.autograd.graph.increment_version(self.parameters)
        self.skip()

    def skip(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters:
            parameter.grad = None
