"""One optimiser step, bare: forward, loss, backward over micro-batches; clip; update.

Decides the precision (fp32 weights, bf16 autocast), and that a gradient is the mean over all trained tokens of the whole batch, so
that the micro-batch size changes memory and speed but not the mathematics. Knows torch only, no recipe, so that it can be
measured by itself (benchmarks/train_step.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdraft.errors import FastDraftError
from fastdraft.training.batches import Batch
from fastdraft.training.objective import Objective
from fastdraft.training.optimizer import set_rate
from fastdraft.training.transfer import arrive

MICRO_BATCH_TOKENS = {"cpu": 8192, "other": 32768}
"""Default size of a micro-batch: a CPU's caches, an accelerator's units."""


def default_micro_batch_tokens(device: torch.device) -> int:
    """Tokens that go through the model at once where the recipe leaves it open."""
    return MICRO_BATCH_TOKENS["cpu" if device.type == "cpu" else "other"]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The type of matrix products for `bf16`, `fp32` or `auto` (bf16 where the device computes it natively); None is fp32."""
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and _has_bf16(device)) else None


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":  # emulated bf16 is slower than fp32
        probes = [
            getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        ]
        return any(probe() for probe in probes if probe is not None)
    return device.type == "xpu"


class Peers(Protocol):
    """The processes that make one gradient together (training/distributed.py)."""

    def loss_sum(self, step: TrainStep, batch: Batch, last: bool) -> Tensor:
        """As `TrainStep.loss_sum`; `last`: of the step's micro-batches."""
        ...

    def reduce(self, step: TrainStep, loss: Tensor) -> Tensor:
        """The sum of all processes' losses; afterwards the gradients are sums over all processes too."""
        ...

    def clip(self, step: TrainStep) -> Tensor:
        """Clips the whole gradient and gives its norm before."""
        ...


class Alone:
    """One process is all there is."""

    def loss_sum(self, step: TrainStep, batch: Batch, last: bool) -> Tensor:
        return step.loss_sum(batch)

    def reduce(self, step: TrainStep, loss: Tensor) -> Tensor:
        return loss

    def clip(self, step: TrainStep) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(step.parameters, step.clip)


@dataclass
class TrainStep:
    """The parts that one step needs; `gradients` then `update`, or `skip`."""

    decoder: nn.Module | Callable[..., Any]
    """Gives `.last_hidden_state` [B, T, D] for `input_ids`."""
    head: Tensor
    """Weight of the output head [V, D]."""
    parameters: Sequence[nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    objective: Objective
    device: torch.device
    autocast: torch.dtype | None = None
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    peers: Peers = field(default_factory=Alone)
    """Who else works on the same step."""

    def loss_sum(self, batch: Batch) -> Tensor:
        """The objective summed over the batch's trained tokens; differentiable unless under `torch.no_grad`."""
        batch = batch.to(self.device)
        arrive(batch)
        with self._precision():
            hidden_ND = self.decoder(**batch.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
            if batch.index is not None:
                hidden_ND = hidden_ND.index_select(0, batch.index)
            return self.objective.loss(hidden_ND, self.head, batch)

    def gradients(self, batches: Sequence[Batch], num_trained: int | None = None) -> tuple[float, float, int]:
        """Fills the gradients with the mean over all trained tokens, clipped.

        Args:
            batches: This process's micro-batches.
            num_trained: Trained tokens of all processes; None: those of `batches`.

        Returns:
            Mean loss (nats per trained token), norm of the gradient before clipping, number of trained tokens. Reading the two
            numbers is the step's only wait for the device.

        Raises:
            FastDraftError: when no token of the batch has a loss.
        """
        if num_trained is None:
            num_trained = sum(batch.num_trained for batch in batches)
        if num_trained == 0:
            raise FastDraftError(
                "training batch",
                "0 trained tokens",
                "every batch must have tokens with a loss",
                "check the responses",
            )
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, start=1):
            loss = self.peers.loss_sum(self, batch, last=number == len(batches))
            torch.autograd.backward(loss / num_trained)
            total += loss.detach()
        total = self.peers.reduce(self, total)
        norm = self.peers.clip(self)
        mean, gradient_norm = torch.stack([total / num_trained, norm.to(total.dtype)]).tolist()
        return mean, gradient_norm, num_trained

    def update(self, factor: float) -> None:
        """Moves the weights along the gradients with `factor` times each group's peak rate."""
        set_rate(self.optimizers, factor)
        for optimizer in self.optimizers:
            optimizer.step()
        torch.autograd.graph.increment_version(
            self.parameters
        )  # fused optimisers do not, and copies of the weights go by it
        self.skip()

    def skip(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)
