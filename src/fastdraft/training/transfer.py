"""Batches on their way to an accelerator while it computes.

Decides that the thread that makes the next step's batches also puts them into pinned memory and begins their copy on a stream of its
own, so that the copy runs beside the computation and the step waits for nothing but an event that has long passed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastdraft.training.batches import Batch, BatchSource


def ahead(source: BatchSource, device: torch.device) -> BatchSource:
    """The source with batches already on their way to a CUDA device; any other device gets the source itself."""
    return _Ahead(source, device) if device.type == "cuda" else source


def arrive(batch: Batch) -> None:
    """Lets the current stream read a batch whose copy was begun early."""
    if batch.arrived is None:
        return
    stream = torch.cuda.current_stream(batch.input_ids.device)
    stream.wait_event(batch.arrived)
    parts = (batch.input_ids, batch.labels, batch.index, batch.position_ids)
    for tensor in (*parts, *((batch.target.ids, batch.target.logprobs) if batch.target else ())):
        if tensor is not None:
            tensor.record_stream(stream)  # its memory was taken on the other stream


@dataclass(frozen=True)
class _Ahead:
    source: BatchSource
    device: torch.device
    _streams: list[Any] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return self.source.steps

    @property
    def tokens(self) -> int:
        return self.source.tokens

    def is_packed(self, step: int) -> bool:
        return self.source.is_packed(step)

    def batches(self, step: int) -> list[Batch]:
        if not self._streams:
            self._streams.append(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._streams[0]):
            batches = [batch.to(self.device) for batch in self.source.batches(step)]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._streams[0])
        return [replace(batch, arrived=event) for batch in batches]
