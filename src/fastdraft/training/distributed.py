"""The processes that torchrun started, one for each device: `with join(device, stage) as world:`.

Gradients go by the device's own backend. What the loops must agree on goes by gloo over CPU tensors, which
never makes a device wait. Process 0 alone validates and writes. Other stages have no process group.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.training.batches import Batch

GRADIENT_TIMEOUT = timedelta(minutes=10)  # who keeps the others waiting longer in a step counts as lost
MAIN_TIMEOUT = timedelta(hours=6)  # as long may process 0 validate or write
_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
# What a process without rows of its own computes, at weight 0, so that it takes part in the sum.
IDLE = Batch(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
T = TypeVar("T")


def process_rank() -> int:
    """The number of this process; 0 is the one that writes, and the only one without torchrun."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Of all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class World:
    """All processes of a training stage as one of them sees them; alone by default."""

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None  # gloo, for what is not gradients

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=self.control)
        return found

    def on_main(self, work: Callable[[], T]) -> T:
        """Lets process 0 do `work` while the others wait; its result, or its error, is everyone's."""
        if self.size == 1:
            return work()
        done: list[Any] = [None, None]
        try:
            done[0] = work() if self.is_main else None
        except FastDraftError as error:
            done[1] = error
        dist.broadcast_object_list(done, 0, group=self.control)
        result, failed = done
        if failed:
            raise failed
        return result  # type: ignore[no-any-return]


@contextlib.contextmanager
def join(device: torch.device, stage: str) -> Iterator[World]:
    """Makes this process one of those that torchrun started, for the block; alone without torchrun."""
    rank, count = process_rank(), process_count()
    if count == 1:
        yield World()
        return
    if device.type not in _BACKENDS:
        rule = f"run.device: {device.type} cannot add gradients of several processes"
        raise RecipeError(rule, "train with one process")
    # torch's own prefix is the same for every group of a process: addresses of the one before.
    store, bound = PrefixStore(stage, _store()), None if device.type == "cpu" else device
    backend, wait = _BACKENDS[device.type], GRADIENT_TIMEOUT
    dist.init_process_group(backend, None, wait, count, rank, store, device_id=bound)
    yield World(rank, count, dist.new_group(backend="gloo", timeout=MAIN_TIMEOUT))
    dist.destroy_process_group()  # not after an error: it would wait for processes that are lost


def begin(stage: str, works: bool) -> None:
    """Process 0 tells the others that a training stage begins, or that there is nothing to do at it."""
    if process_count() > 1:
        _store().set(f"begin/{stage}", str(int(works)))


def begins(stage: str, check: Callable[[], object]) -> bool:
    """Waits for what process 0 tells of a training stage; `check` raises where a stop was asked for."""
    while not _store().check([f"begin/{stage}"]):
        check()
        time.sleep(0.2)
    return bool(int(_store().get(f"begin/{stage}")))


@cache
def _store() -> Any:
    """Kept by torchrun on the first machine, or by process 0 where RANK and MASTER_ADDR were set by hand."""
    serves = process_rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, None, serves, MAIN_TIMEOUT, wait_for_workers=False)
    # After a restart of all processes the old ones' keys are still there.
    return PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def own_device(device: torch.device) -> torch.device:
    """This process's device, torch's current one from here on: of several processes each takes its own."""
    if device.type == "cpu":
        return device
    if process_count() > 1:
        number, count = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        if device.index is not None or number >= count:
            rule = f"each process of torchrun takes an accelerator of its own, and there are {count}"
            fix = f"set run.device={device.type} and --nproc-per-node to at most that"
            raise RecipeError(f"run.device: {device}: {rule}", fix)
        device = torch.device(device.type, number)
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    return device


class Replicas:
    """Copies of the model in all processes; gradients are added during the last backward pass (DDP)."""

    def __init__(self, model: nn.Module, loss_sum: Callable[[Batch], Tensor]) -> None:
        wrapped = nn.Module()  # its forward pass goes from a micro-batch to its summed loss
        wrapped.model, wrapped.forward = model, loss_sum
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; older releases do not know the new name.
            warnings.simplefilter("ignore", FutureWarning)
            self._module = DistributedDataParallel(
                wrapped, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        # DDP's own hook averages; the step has divided by the trained tokens of all processes already.
        # A lambda, since torch reads the annotations of anything else.
        self._module.register_comm_hook(None, lambda state, bucket: _add(bucket))

    def loss_sum(self, batch: Batch, last: bool) -> Tensor:
        """The summed loss of a micro-batch; `last`: of the step's."""
        self._module.require_backward_grad_sync = last
        loss: Tensor = self._module(batch)
        return loss * 0.0 if batch is IDLE else loss


def _add(bucket: Any) -> torch.futures.Future[Tensor]:
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])  # type: ignore[no-any-return]
