"""The processes that train one draft together, one for each device: who they are and how they agree.

Decides that there are two kinds of traffic. Gradients go by the device's own backend (NCCL, or gloo on a CPU). What the loops must agree
on (did everyone's batch fit, did anyone ask to stop, what did process 0 find or write) goes by gloo over CPU tensors, which never makes a
device wait. Process 0 alone validates and writes; whatever goes wrong there is raised by all.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fastdraft import errors
from fastdraft.errors import FastDraftError
from fastdraft.training.batches import WHOLE, Share

GRADIENT_TIMEOUT = timedelta(minutes=10)
"""A process that keeps the others waiting longer for its part of a step counts as lost."""
MAIN_TIMEOUT = timedelta(hours=6)
"""As long may process 0 validate or write while the others wait."""
_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}


@dataclass(frozen=True)
class World:
    """All processes of a run as one of them sees them; alone by default."""

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    """For the loop."""
    ahead: dist.ProcessGroup | None = None
    """For the thread that reads batches ahead of the loop, so that the order of messages in each group is the same everywhere."""

    @property
    def is_main(self) -> bool:
        """Whether this process validates and writes."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """What this process trains on."""
        return Share(self.rank, self.size) if self.size > 1 else WHOLE

    def gather(self, values: Sequence[int], ahead: bool = False) -> list[list[int]]:
        """Everyone's integers, by rank; as many from each."""
        if self.size == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.ahead if ahead else self.control)
        return [list(map(int, tensor.tolist())) for tensor in found]

    def all_agree(self, fine: bool) -> bool:
        """Whether it is fine everywhere."""
        return all(value for (value,) in self.gather([int(fine)]))

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Lets process 0 do `work` while the others wait; its result (JSON values), or its error, is everyone's.

        Raises:
            FastDraftError: the very error that process 0 met.
            FastDraftError: elsewhere, when process 0 met an error of another kind, which it raises itself.
        """
        if self.size == 1:
            return work()
        if not self.is_main:
            return _result(json.loads(self._broadcast("")))
        try:
            found = work()
        except FastDraftError as error:
            self._broadcast(json.dumps({"error": error_record(error)}))
            raise
        except BaseException:
            self._broadcast(json.dumps({"error": None}))
            raise
        return _result(json.loads(self._broadcast(json.dumps({"result": found}))))

    def everyone(self, value: Any) -> list[Any]:
        """Everyone's JSON value, by rank."""
        if self.size == 1:
            return [value]
        return [
            json.loads(self._broadcast(json.dumps(value) if rank == self.rank else "", rank))
            for rank in range(self.size)
        ]

    def raise_first(self, own: FastDraftError | None, ahead: bool = False) -> None:
        """Raises in all processes the error of the first that has one; returns when none has.

        Raises:
            FastDraftError: this process's own, or another's.
        """
        for rank in range(self.size):
            text = json.dumps(error_record(own)) if own and rank == self.rank else ""
            found = self._broadcast(text, rank, ahead) if self.size > 1 else text
            if found:
                raise own if own and rank == self.rank else error_from(json.loads(found))

    def _broadcast(self, text: str, source: int = 0, ahead: bool = False) -> str:
        group = self.ahead if ahead else self.control
        content = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        length = torch.tensor([len(content)])
        dist.broadcast(length, source, group=group)
        if self.rank != source:
            content = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(content, source, group=group)
        return bytes(content.tolist()).decode().strip()


_ALONE = World()
_joined: list[World] = []


def current() -> World:
    """The processes among which this one works; outside `join`, itself alone."""
    return _joined[-1] if _joined else _ALONE


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[World]:
    """Makes this process one of those that torch's launcher started, for the block: `current()` is then their world.

    Args:
        device: This process's own; it decides the backend of gradients.

    Raises:
        FastDraftError: when the others cannot be reached.
    """
    backend = _BACKENDS.get(device.type)
    if backend is None:
        raise FastDraftError(
            "run.device",
            device.type,
            "has no way to add gradients of several processes",
            "train with one process",
        )
    try:
        dist.init_process_group(
            backend, timeout=GRADIENT_TIMEOUT, device_id=device if device.type != "cpu" else None
        )
        groups = [dist.new_group(backend="gloo", timeout=MAIN_TIMEOUT) for _ in range(2)]
    except (RuntimeError, ValueError) as error:  # torch's network errors are RuntimeErrors
        found = (
            f"process {os.environ.get('RANK')} cannot reach the others ({str(error).splitlines()[0][:120]})"
        )
        raise FastDraftError(
            "training", found, "all processes must see each other", "check --master-addr and the network"
        ) from error
    _joined.append(World(dist.get_rank(), dist.get_world_size(), *groups))
    try:
        yield _joined[-1]
        dist.destroy_process_group()  # not after an error: it would wait for processes that are lost
    finally:
        _joined.pop()


def error_record(error: FastDraftError) -> dict[str, Any]:
    """An error as JSON values, for another process."""
    kind, arguments = error.__reduce__()[:2]
    return {"kind": kind.__name__, "arguments": arguments}


def error_from(record: dict[str, Any]) -> FastDraftError:
    """The error that `error_record` described."""
    kind: type[FastDraftError] = getattr(errors, str(record["kind"]), FastDraftError)
    return kind(*record["arguments"])


def _result(record: dict[str, Any]) -> Any:
    if "error" not in record:
        return record["result"]
    if record["error"] is None:
        raise FastDraftError(
            "training", "process 0 failed", "all processes work or none", "see its error above"
        )
    raise error_from(record["error"])
