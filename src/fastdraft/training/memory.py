"""What is done when a step does not fit into memory: the same batch is tried again in smaller pieces.

Decides that all held memory is given back before the next attempt, and that a micro-batch is cut between rows only. A gradient is a
sum over tokens (training/step.py), so that smaller pieces change speed and memory, not the mathematics.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdraft.errors import FastDraftError, is_out_of_memory
from fastdraft.functional.distillation import SparseTarget
from fastdraft.training.batches import Batch

Found = TypeVar("Found")


def within_memory(work: Callable[[int], Found], size: int, smallest: int, where: str) -> Found:
    """`work(size)`, where memory runs out with half of it, and so on.

    Args:
        work: Does the whole work with so many rows or tokens at a time.
        size: The first attempt's.
        smallest: Below it nothing is tried.
        where: The recipe's section, named in the error.

    Raises:
        FastDraftError: when not even `smallest` fits.
    """
    while True:
        try:
            return work(size)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        gc.collect()
        if size <= smallest:
            rule = "one row at a time must fit the device beside the weights"
            raise FastDraftError(
                where,
                "out of memory in validation",
                rule,
                "use a device with more memory, or another run.device",
            )
        size = max(smallest, size // 2)


def release_memory(device: torch.device) -> None:
    """Gives back what dropped tensors held, so that the next attempt finds it.

    Call it outside the `except` block: a traceback keeps a step's tensors alive.
    """
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def halved_limit(batches: Sequence[Batch]) -> int:
    """Half the padded tokens of the largest micro-batch that can be cut; 0 when each is one row already."""
    return max((batch.input_ids.numel() // 2 for batch in batches if batch.input_ids.shape[0] > 1), default=0)


def limited(batches: Sequence[Batch], limit: int) -> list[Batch]:
    """The same rows in micro-batches of at most `limit` padded tokens each, or of one row; 0 limits nothing."""
    pieces: list[Batch] = []
    for batch in batches:
        rows, length = batch.input_ids.shape
        if not limit or rows * length <= limit:
            pieces.append(batch)
            continue
        size = max(1, limit // length)
        count = -(-rows // size)
        bounds = [rows * number // count for number in range(count + 1)]
        pieces += [cut_rows(batch, start, stop) for start, stop in itertools.pairwise(bounds)]
    return pieces


def cut_rows(batch: Batch, start: int, stop: int) -> Batch:
    """Rows `start` to `stop` of a micro-batch [B, T] with their labels and targets; columns behind the last label are cut away.

    Input tokens are counted up to that last label, behind which right-padded rows hold nothing.
    """
    length = batch.input_ids.shape[1]
    if batch.index is None:
        kept = slice(start * length, stop * length)
        return replace(
            batch,
            labels=batch.labels[kept],
            num_tokens=(stop - start) * length,
            **_by_place(batch, start, stop, length),
        )
    chosen = (batch.index >= start * length) & (batch.index < stop * length)
    row, column = (batch.index[chosen] // length) - start, batch.index[chosen] % length
    width = int(column.max()) + 1 if len(column) else 1
    ends = torch.zeros(stop - start, dtype=torch.int64, device=row.device).scatter_reduce(
        0, row, column + 1, "amax"
    )
    target = SparseTarget(batch.target.ids[chosen], batch.target.logprobs[chosen]) if batch.target else None
    places = _by_place(batch, start, stop, width)
    return replace(
        batch,
        labels=batch.labels[chosen],
        index=row * width + column,
        num_tokens=int(ends.sum()),
        target=target,
        **places,
    )


def _by_place(batch: Batch, start: int, stop: int, width: int) -> dict[str, Any]:
    """Every tensor of the batch that has a value for each place [B, T], the input ids among them, cut."""
    shape = batch.input_ids.shape
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {
        name: value[start:stop, :width].contiguous()
        for name, value in found.items()
        if isinstance(value, Tensor) and value.shape == shape
    }
