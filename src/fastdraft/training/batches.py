"""What the loop trains on at each step: `source.batches(step, micro_batch_tokens)`, equal at every call.

So no data position needs saving. Pre-training rows come packed; synthetic samples are padded on the right
(causal attention then needs no mask), each from position 0, and only response tokens have a loss.

Shapes: B rows of a micro-batch, T positions, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdraft.functional.distillation import NO_ROW, SparseTarget


@dataclass(frozen=True)
class Batch:
    """One micro-batch: inputs, and where the loss is."""

    input_ids: Tensor  # int64 [B, T], right-padded
    labels: Tensor  # int64 [N]: the wanted next token at each trained position
    index: Tensor | None = None  # int64 [N]: trained positions in the flattened B*T; None: every position
    num_tokens: int = 0  # inputs without padding
    target: SparseTarget | None = None  # the target's distribution at each trained position, where stored
    position_ids: Tensor | None = None  # int64 [B, T]: from 0 in every text of a row, where kept apart
    arrived: Any = None  # event of the device after which a copy that was begun early may be read

    @property
    def num_trained(self) -> int:
        return self.labels.numel()

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the decoder is called with."""
        places = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.input_ids, **places}

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, safe to read there; copies to CUDA run beside the computation."""
        if self.arrived is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self.arrived)
            self._each(lambda tensor: tensor.record_stream(stream))  # its memory was taken on the other one
        if device.type in ("cpu", self.input_ids.device.type):
            return self
        if device.type == "cuda":
            return self._each(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
        return self._each(lambda tensor: tensor.to(device))

    def on_head(self, rows_V: Tensor, size: int, keep: bool) -> Batch:
        """Labels and stored ids as rows of a trimmed head; `rows_V`: the row of each id, `size` for none.

        A position whose label has none is left out, or with `keep` has no cross-entropy.
        """
        labels_N = rows_V[self.labels]
        inside_N = labels_N < size
        if keep:
            stored = self.target and replace(self.target, ids=rows_V[self.target.ids.long()], trimmed=True)
            return replace(self, labels=labels_N.where(inside_N, NO_ROW), target=stored)
        kept_M = inside_N.nonzero()[:, 0]
        index_M = kept_M if self.index is None else self.index[kept_M]
        return replace(self, labels=labels_N[kept_M], index=index_M)

    def _each(self, work: Callable[[Tensor], Any]) -> Batch:
        stored = self.target
        target = stored and replace(stored, ids=work(stored.ids), logprobs=work(stored.logprobs))
        found = {name: getattr(self, name) for name in ("input_ids", "labels", "index", "position_ids")}
        moved = {name: work(tensor) for name, tensor in found.items() if tensor is not None}
        return replace(self, target=target, **moved)


def read_ahead(
    source: BatchSource,
    device: torch.device,
    first: int,
    micro_batch_tokens: int,
    fit: Callable[[Batch], Batch] = lambda batch: batch,
) -> Generator[list[Batch]]:
    """Micro-batches from step `first` on, each through `fit`; a thread reads the next step, and begins its
    copy to CUDA.
    """
    stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def read(step: int) -> list[Batch]:
        batches = [fit(batch) for batch in source.batches(step, micro_batch_tokens)]
        if stream is None:
            return batches
        with torch.cuda.stream(stream):
            batches = [batch.to(device) for batch in batches]
            arrived = stream.record_event()
        return [replace(batch, arrived=arrived) for batch in batches]

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, first)
        for step in range(first + 1, source.steps + 1):
            batches = coming.result()
            if step < source.steps:
                coming = pool.submit(read, step)
            yield batches


def packed_batch(rows: npt.NDArray[np.int64], separator: int | None = None) -> Batch:
    """Rows of length T+1 as a batch that trains on every position; `separator`: of texts to be kept apart."""
    tokens = torch.from_numpy(np.ascontiguousarray(rows))
    inputs_BT = tokens[:, :-1].contiguous()
    positions_BT = None
    if separator is not None:  # counted from 0 at each separator and at the beginning of a row
        positions_T = torch.arange(inputs_BT.shape[1])
        positions_BT = positions_T - positions_T.where(inputs_BT == separator, 0).cummax(dim=1).values
    return Batch(inputs_BT, tokens[:, 1:].reshape(-1), None, inputs_BT.numel(), position_ids=positions_BT)


def packed_batches(
    rows: npt.NDArray[np.int64], micro_batch_tokens: int, separator: int | None
) -> list[Batch]:
    """Rows of length T+1 in micro-batches of at most so many tokens, or of one row."""
    count = max(1, micro_batch_tokens // (rows.shape[1] - 1))
    return [packed_batch(rows[first : first + count], separator) for first in range(0, len(rows), count)]


def text_separator(manifest: Mapping[str, Any]) -> int | None:
    """The id between texts that shall not see each other, from prepare's manifest; None where they may."""
    return int(manifest["separator_id"]) if manifest.get("document_masking") else None


@dataclass(frozen=True)
class PackedBatches:
    """Steps of packed rows, trained at every position."""

    mixture: Any  # data.mixture.Mixture
    steps: int
    separator: int | None = None  # id before every text, where texts of a row shall not see each other
    rank: int = 0  # of this process, which takes every `size`-th row
    size: int = 1

    @property
    def tokens(self) -> int:
        return int(self.steps * self.mixture.rows_per_step * self.mixture.row_length)

    def is_packed(self, step: int) -> bool:
        return True

    def batches(self, step: int, micro_batch_tokens: int = 8192) -> list[Batch]:
        rows = self.mixture.rows(step, slice(self.rank, None, self.size))
        return packed_batches(rows, micro_batch_tokens, self.separator)


@dataclass(frozen=True)
class Sample:
    """A prompt with the response to be learned."""

    prompt_ids: npt.NDArray[np.int32]
    response_ids: npt.NDArray[np.int32]
    logits: Any = None  # data.sparse_logits.RowLogits, read for a batch; of all samples or of none

    @staticmethod
    def of(row: Any, logits: Any = None) -> Sample:
        """A synthetic row, as arrays: four bytes a token."""
        prompt, response = (np.array(part, dtype=np.int32) for part in (row.prompt_ids, row.response_ids))
        return Sample(prompt, response, logits)

    @property
    def num_tokens(self) -> int:
        """Input tokens: the last response token is only predicted."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


def cut_to_context(samples: Iterable[Sample], context_length: int) -> tuple[list[Sample], int, int]:
    """Samples whose inputs fit into the context; how many were cut; how many dropped for want of any loss.

    A sample without a prompt loses its first response token as a label: nothing stands before it.
    """
    kept, num_cut, num_dropped = [], 0, 0
    for sample in samples:
        room = context_length + 1 - len(sample.prompt_ids)
        if room < 1 or not len(sample.response_ids) or sample.num_tokens < 1:
            num_dropped += 1
            continue
        num_cut += len(sample.response_ids) > room
        kept.append(replace(sample, response_ids=sample.response_ids[:room]))
    return kept, num_cut, num_dropped


def padded_batch(samples: Sequence[Sample]) -> Batch:
    """Samples side by side, padded with 0 on the right to the longest; labels are response tokens only."""
    length = max(sample.num_tokens for sample in samples)
    inputs = np.zeros((len(samples), length), dtype=np.int64)
    index, labels, stored = [], [], []
    for row, sample in enumerate(samples):
        ids = np.concatenate([sample.prompt_ids, sample.response_ids]).astype(np.int64)
        inputs[row, : len(ids) - 1] = ids[:-1]
        first = max(len(sample.prompt_ids), 1)
        index.append(row * length + np.arange(first - 1, len(ids) - 1))
        labels.append(ids[first:])
        if sample.logits is not None:
            stored.append(sample.logits.read(max(1 - len(sample.prompt_ids), 0), len(sample.response_ids)))
    target = None
    if stored:
        ids, logprobs = (np.concatenate([getattr(s, name) for s in stored]) for name in ("ids", "logprobs"))
        target = SparseTarget(torch.from_numpy(ids), torch.from_numpy(logprobs)).normalized()
    labels_N, index_N = torch.from_numpy(np.concatenate(labels)), torch.from_numpy(np.concatenate(index))
    num_tokens = sum(sample.num_tokens for sample in samples)
    return Batch(torch.from_numpy(inputs), labels_N, index_N, num_tokens, target)


def micro_batches(samples: Sequence[Sample], micro_batch_tokens: int) -> list[list[Sample]]:
    """Splits samples by length into groups of at most so many tokens, padding included, or one sample.

    A group also ends at a sample under 3/4 of the longest, once it is a quarter full: less padding.
    """
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda sample: -sample.num_tokens):
        if groups:
            longest, size = groups[-1][0].num_tokens, len(groups[-1])
            full = (size + 1) * longest > micro_batch_tokens
            wasteful = sample.num_tokens * 4 < longest * 3 and size * longest * 4 >= micro_batch_tokens
            if not full and not wasteful:
                groups[-1].append(sample)
                continue
        groups.append([sample])
    return groups


def plan_batches(
    lengths: npt.NDArray[np.int64], batch_tokens: int, seed: int, tokens: int
) -> list[npt.NDArray[np.int64]]:
    """Sample numbers of each step: a seeded permutation for each epoch, cut where `batch_tokens` are reached.

    Ends after `tokens` input tokens. A step never spans two epochs; the last step of an epoch may be smaller.
    """
    plan: list[npt.NDArray[np.int64]] = []
    epoch, total = 0, 0
    while total < tokens:
        order = np.random.default_rng([seed, 0xA119, epoch]).permutation(len(lengths))
        ends = np.cumsum(lengths[order])
        start = 0
        while start < len(order) and total < tokens:
            before = ends[start - 1] if start else 0
            end = int(np.searchsorted(ends, before + min(batch_tokens, tokens - total))) + 1
            plan.append(order[start : min(end, len(order))])
            total += int(lengths[plan[-1]].sum())
            start = end
        epoch += 1
    return plan


@dataclass(frozen=True)
class AlignmentBatches:
    """Steps of synthetic samples with a share of packed pre-training steps spread evenly between them."""

    samples: Sequence[Sample]
    plan: Sequence[npt.NDArray[np.int64]]  # sample numbers of each synthetic step, from `plan_batches`
    packed: PackedBatches | None = None  # source of pre-training steps
    packed_share: float = 0.0  # of all steps, below 1
    rank: int = 0  # of this process, which takes every `size`-th sample of a step, by length
    size: int = 1

    @property
    def steps(self) -> int:
        return len(self.plan) + self._num_packed

    @property
    def _num_packed(self) -> int:
        return round(len(self.plan) * self.packed_share / (1 - self.packed_share)) if self.packed else 0

    @property
    def tokens(self) -> int:
        packed = replace(self.packed, steps=self._num_packed).tokens if self.packed else 0
        return packed + sum(self.samples[int(i)].num_tokens for numbers in self.plan for i in numbers)

    def is_packed(self, step: int) -> bool:
        return (step + 1) * self._num_packed // self.steps > step * self._num_packed // self.steps

    def batches(self, step: int, micro_batch_tokens: int = 8192) -> list[Batch]:
        packed_before = step * self._num_packed // self.steps
        if self.packed and self.is_packed(step):
            return self.packed.batches(packed_before, micro_batch_tokens)
        chosen = [self.samples[i] for i in self.plan[step - packed_before]]
        mine = sorted(chosen, key=lambda sample: -sample.num_tokens)[self.rank :: self.size]
        return [padded_batch(group) for group in micro_batches(mine, micro_batch_tokens)]


BatchSource = PackedBatches | AlignmentBatches
