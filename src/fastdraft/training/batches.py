"""What the loop trains on at each step, as a pure function of the step's number.

Decides that no data position needs saving: a source maps a step to its micro-batches, always the same ones. Pre-training rows
come packed; synthetic samples are padded on the right (causal attention then needs no mask), each from position 0, and only
response tokens have a loss. What the target's stored logits say of those tokens travels with them.

Shapes: B rows of a micro-batch, T positions, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdraft.data.sparse_logits import SparseLogits
from fastdraft.functional.distillation import SparseTarget

if TYPE_CHECKING:
    from fastdraft.data.rows import SyntheticRow


@dataclass(frozen=True)
class Batch:
    """One micro-batch: inputs, and where the loss is."""

    input_ids: Tensor
    """int64 [B, T], right-padded."""
    labels: Tensor
    """int64 [N]: the wanted next token at each trained position."""
    index: Tensor | None = None
    """int64 [N]: trained positions in the flattened B*T; None when every position is trained."""
    num_tokens: int = 0
    """Input tokens without padding."""
    target: SparseTarget | None = None
    """The target's distribution at each trained position, where it was stored."""
    position_ids: Tensor | None = None
    """int64 [B, T]: places counted anew in every text of a row, where texts shall not see each other; None: from 0 along the row."""
    arrived: Any = None
    """Event of the device after which a copy that was begun early may be read (training/transfer.py)."""

    @property
    def num_trained(self) -> int:
        return self.labels.numel()

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; copies to CUDA run beside the computation."""
        if device.type in ("cpu", self.input_ids.device.type):
            return self

        def move(tensor: Tensor) -> Tensor:
            return (
                tensor.pin_memory().to(device, non_blocking=True)
                if device.type == "cuda"
                else tensor.to(device)
            )

        index = None if self.index is None else move(self.index)
        target = SparseTarget(move(self.target.ids), move(self.target.logprobs)) if self.target else None
        positions = None if self.position_ids is None else move(self.position_ids)
        return Batch(move(self.input_ids), move(self.labels), index, self.num_tokens, target, positions)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the decoder is called with."""
        places = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.input_ids, **places}


@dataclass(frozen=True)
class Share:
    """Which part of every step this process trains on: that of process `rank` of `size`.

    All shares together are the step, whatever their number, so that a run may go on with more processes or fewer.
    """

    rank: int = 0
    size: int = 1

    def rows(self, count: int) -> tuple[int, int]:
        """First and last + 1 of `count` rows; shares differ by one row at most."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def deal(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Samples of near-equal total length: the longest first, each to whoever has least so far (Graham's rule, 1969)."""
        if self.size == 1:
            return samples
        load, mine = [0] * self.size, []
        for sample in sorted(samples, key=lambda sample: -sample.num_tokens):
            taker = load.index(min(load))
            load[taker] += sample.num_tokens
            if taker == self.rank:
                mine.append(sample)
        return mine


WHOLE = Share()


class BatchSource(Protocol):
    """Steps of training data."""

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        ...

    @property
    def tokens(self) -> int:
        """Input tokens of all steps, without padding."""
        ...

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of step `step`, 0-based, of this process's share; equal at every call."""
        ...

    def is_packed(self, step: int) -> bool:
        """Whether that step's rows are packed text, trained at every position."""
        ...


Ids = Sequence[int] | npt.NDArray[np.int32]
"""Token ids of a text; arrays where there are many texts."""


class RowMixture(Protocol):
    """Packed rows of each step (`data.mixture.Mixture`)."""

    rows_per_step: int

    def rows(self, step: int, part: slice = slice(None)) -> npt.NDArray[np.int64]: ...


def packed_batch(rows: npt.NDArray[np.int64], separator: int | None = None) -> Batch:
    """Rows of length T+1 as a batch that trains on every position.

    `separator`: id before every text, where the texts of a row shall not see each other.
    """
    tokens = torch.from_numpy(np.ascontiguousarray(rows))
    inputs_BT = tokens[:, :-1].contiguous()
    positions_BT = None if separator is None else text_positions(inputs_BT, separator)
    return Batch(inputs_BT, tokens[:, 1:].reshape(-1), None, inputs_BT.numel(), position_ids=positions_BT)


def text_positions(inputs_BT: Tensor, separator: int) -> Tensor:
    """Place of every token in its text, int64 [B, T]: 0 at each separator and at the beginning of a row."""
    places_T = torch.arange(inputs_BT.shape[1])
    starts_BT = places_T.where(inputs_BT == separator, 0)
    return places_T - starts_BT.cummax(dim=1).values


def text_separator(manifest: Mapping[str, Any]) -> int | None:
    """The id between texts that shall not see each other, from prepare's manifest; None where they may."""
    return int(manifest["separator_id"]) if manifest.get("document_masking") else None


@dataclass(frozen=True)
class PackedBatches:
    """Steps of packed rows: `rows_per_batch` rows a step, `rows_per_micro` at a time."""

    mixture: RowMixture
    steps: int
    row_length: int
    rows_per_batch: int
    rows_per_micro: int
    separator: int | None = None
    """Id before every text, where texts of a row shall not see each other."""
    share: Share = WHOLE
    """Of this process."""

    @property
    def tokens(self) -> int:
        return self.steps * self.rows_per_batch * self.row_length

    def is_packed(self, step: int) -> bool:
        return True

    def batches(self, step: int) -> list[Batch]:
        first, end = self.share.rows(self.rows_per_batch)
        if first == end:  # more processes than rows
            return []
        rows = self.mixture.rows(step, slice(first, end))
        starts = range(0, len(rows), self.rows_per_micro)
        return [packed_batch(rows[start : start + self.rows_per_micro], self.separator) for start in starts]


class ResponseLogits(Protocol):
    """The target's stored distributions at the tokens of one response; read when a batch needs them."""

    def read(self, start: int, stop: int) -> SparseLogits: ...


@dataclass(frozen=True)
class Sample:
    """A prompt with the response to be learned."""

    prompt_ids: Ids
    response_ids: Ids
    logits: ResponseLogits | None = None
    """Of all samples of a step or of none."""

    @property
    def num_tokens(self) -> int:
        """Input tokens: the last response token is only predicted."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


def as_samples(rows: Iterable[tuple[SyntheticRow, ResponseLogits | None]]) -> list[Sample]:
    """Rows of text as arrays, not lists: four bytes a token, and the rows' log-probs are let go."""
    return [
        Sample(np.array(row.prompt_ids, dtype=np.int32), np.array(row.response_ids, dtype=np.int32), logits)
        for row, logits in rows
    ]


def cut_to_context(samples: Sequence[Sample], context_length: int) -> tuple[list[Sample], int, int]:
    """Samples whose inputs fit into `context_length` positions; the number cut short; the number dropped for want of any loss.

    A sample without a prompt loses its first response token as a label: nothing stands before it.
    """
    kept, num_cut, num_dropped = [], 0, 0
    for sample in samples:
        room = context_length + 1 - len(sample.prompt_ids)
        if room < 1 or not len(sample.response_ids) or sample.num_tokens < 1:
            num_dropped += 1
            continue
        num_cut += len(sample.response_ids) > room
        kept.append(Sample(sample.prompt_ids, sample.response_ids[:room], sample.logits))
    return kept, num_cut, num_dropped


def padded_batch(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Samples side by side, padded on the right to the longest; labels are response tokens only, by the stored boundary."""
    length = max(sample.num_tokens for sample in samples)
    inputs = np.full((len(samples), length), pad_id, dtype=np.int64)
    index, labels = [], []
    for row, sample in enumerate(samples):
        ids = np.concatenate(
            [np.asarray(part, dtype=np.int64) for part in (sample.prompt_ids, sample.response_ids)]
        )
        inputs[row, : len(ids) - 1] = ids[:-1]
        first = max(len(sample.prompt_ids), 1)
        index.append(row * length + np.arange(first - 1, len(ids) - 1))
        labels.append(ids[first:])
    tokens = sum(sample.num_tokens for sample in samples)
    labels_N, index_N = torch.from_numpy(np.concatenate(labels)), torch.from_numpy(np.concatenate(index))
    return Batch(torch.from_numpy(inputs), labels_N, index_N, tokens, _stored_target(samples))


def _stored_target(samples: Sequence[Sample]) -> SparseTarget | None:
    """The distributions that belong to the labels of `padded_batch`, in its order."""
    parts = [
        sample.logits.read(max(1 - len(sample.prompt_ids), 0), len(sample.response_ids))
        for sample in samples
        if sample.logits is not None
    ]
    if not parts:
        return None
    ids, logprobs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "logprobs"))
    return SparseTarget(torch.from_numpy(ids), torch.from_numpy(logprobs)).normalized()


def micro_batches(samples: Sequence[Sample], micro_batch_tokens: int) -> list[list[Sample]]:
    """Splits one step's samples by length into groups whose padded size is at most `micro_batch_tokens` (one sample always fits).

    A group also ends where a sample is under three quarters of the longest, once the group is a quarter full: less padding.
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
    lengths: npt.NDArray[np.int64],
    batch_tokens: int,
    seed: int,
    *,
    epochs: float | None = None,
    tokens: int | None = None,
) -> list[npt.NDArray[np.int64]]:
    """Sample numbers of each step: seeded permutations, one per epoch, cut wherever `batch_tokens` are reached.

    Ends after `epochs` (a fraction is part of an epoch) or after `tokens` input tokens, whichever is given. A step never spans
    two epochs; the last step of an epoch may be smaller.
    """
    limit = int(lengths.sum() * epochs) if epochs is not None else int(tokens or 0)
    plan: list[npt.NDArray[np.int64]] = []
    epoch, total = 0, 0
    while total < limit:
        order = np.random.default_rng([seed, 0xA119, epoch]).permutation(len(lengths))
        ends = np.cumsum(lengths[order])
        start = 0
        while start < len(order) and total < limit:
            before = ends[start - 1] if start else 0
            end = int(np.searchsorted(ends, before + min(batch_tokens, limit - total))) + 1
            plan.append(order[start : min(end, len(order))])
            total += int(lengths[plan[-1]].sum())
            start = end
        epoch += 1
    return plan


@dataclass(frozen=True)
class AlignmentBatches:
    """Steps of synthetic samples with a share of packed pre-training steps spread evenly between them."""

    samples: Sequence[Sample]
    plan: Sequence[npt.NDArray[np.int64]]
    """Sample numbers of each synthetic step, from `plan_batches`."""
    pad_id: int
    micro_batch_tokens: int
    packed: PackedBatches | None = None
    """Source of pre-training steps; None for none."""
    packed_share: float = 0.0
    """Share of all steps that are pre-training steps, below 1."""
    share: Share = WHOLE
    """Of this process."""

    @property
    def steps(self) -> int:
        return len(self.plan) + self._num_packed

    @property
    def _num_packed(self) -> int:
        return round(len(self.plan) * self.packed_share / (1 - self.packed_share)) if self.packed else 0

    @property
    def tokens(self) -> int:
        packed: int = (
            self._num_packed * self.packed.rows_per_batch * self.packed.row_length if self.packed else 0
        )
        return packed + sum(self.samples[int(i)].num_tokens for numbers in self.plan for i in numbers)

    def is_packed(self, step: int) -> bool:
        return (step + 1) * self._num_packed // self.steps > step * self._num_packed // self.steps

    def batches(self, step: int) -> list[Batch]:
        packed_before = step * self._num_packed // self.steps
        if self.packed and self.is_packed(step):
            return self.packed.batches(packed_before)
        chosen = [self.samples[i] for i in self.plan[step - packed_before]]
        return [
            padded_batch(group, self.pad_id)
            for group in micro_batches(self.share.deal(chosen), self.micro_batch_tokens)
        ]
