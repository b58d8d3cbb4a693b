"""What one pass of a model costs on this device: the measured side of the cost ratio.

latency = measure_latency(target, draft, widths=[2, 4]); latency.cost_ratio
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from fastdraft.decoding.cache import ModelReader
from fastdraft.json_rows import JsonRow


@dataclass(frozen=True)
class Latency(JsonRow):
    """Median seconds of one pass after a prefix of `prefix_tokens`, batch 1."""

    draft_seconds: float  # the draft reads one token
    target_seconds: dict[int, float]  # the target reads this many tokens at once
    prefix_tokens: int
    device: str
    draft_dtype: str
    target_dtype: str
    draft_seconds_more: float = 0.0  # what each token more, read in the same pass of the draft, adds
    # A server: a pass of the draft over the next token of so many texts.
    draft_seconds_by_texts: dict[int, float] = field(default_factory=dict)

    @property
    def cost_ratio(self) -> float:
        """Draft over target, one token each."""
        return self.draft_seconds / self.target_seconds[1]


@torch.inference_mode()
def measure_latency(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    widths: Sequence[int],
    prefix_tokens: int = 128,
    repeats: int = 15,
) -> Latency:
    """Times single passes: the draft over one token and over the largest of `widths`, the target over one and
    over each of `widths` at once.

    `prefix_tokens` stand in the cache before each pass, fewer in a short context; two turns warm up.
    """
    widths = sorted({1, *widths})
    contexts = [int(m.config.get_text_config(decoder=True).max_position_embeddings) for m in (target, draft)]
    prefix = max(1, min(prefix_tokens, min(contexts) - widths[-1]))
    readers = [ModelReader(m, prefix + widths[-1]) for m in (target, draft)]
    for reader in readers:
        reader.read(_any_ids(reader, prefix))
    # The draft needs logits behind its last token alone, the target behind all.
    jobs = [(readers[1], 1, 1), (readers[1], widths[-1], 1)]
    jobs += [(readers[0], width, width) for width in widths]
    # In turns: a slow spell of the machine hits all.
    seconds = [[_one_pass(*job, prefix) for job in jobs] for _ in range(repeats + 2)][2:]
    draft_seconds, draft_wide, *by_width = map(statistics.median, zip(*seconds, strict=True))
    target_dtype, draft_dtype = (str(m.dtype).removeprefix("torch.") for m in (target, draft))
    target_seconds = dict(zip(widths, by_width, strict=True))
    more = seconds_more(draft_seconds, draft_wide, widths[-1])
    return Latency(draft_seconds, target_seconds, prefix, str(target.device), draft_dtype, target_dtype, more)


def seconds_more(seconds_1: float, seconds_wide: float, width: int) -> float:
    """What each token beyond the first adds to a pass, from passes over one and over `width` tokens."""
    return max(0.0, seconds_wide - seconds_1) / max(1, width - 1)


def _one_pass(reader: ModelReader, width: int, keep: int, prefix: int) -> float:
    ids_T = _any_ids(reader, width)
    if reader.model.device.type != "cpu":
        torch.accelerator.synchronize(reader.model.device)
    start = time.perf_counter()
    reader.read(ids_T, keep=keep).argmax(-1).tolist()
    seconds = time.perf_counter() - start
    reader.take_back(prefix)
    return seconds


def _any_ids(reader: ModelReader, count: int) -> torch.Tensor:
    vocab_size = int(reader.model.config.get_text_config(decoder=True).vocab_size)
    return torch.arange(5, 5 + count, device=reader.model.device) % vocab_size
