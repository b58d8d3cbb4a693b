"""Key-value caches for decoding that takes tokens back, and attention that reads them where they stand.

    reader = ReadableModel(model).reader(capacity=512); logits = reader.read(ids_T, keep=4);
    reader.take_back(reader.length - 2)

Shape suffixes: B rows, H query heads, N key heads, T positions, F = (H / N) x new positions, D head size, V
vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastdraft.errors import TargetError
from fastdraft.modeling.families import text_config

# A recurrent or linear layer's state cannot be cropped. A sliding window can: every layer here keeps all
# positions, and the model's mask applies the window.
_CROPPABLE = {"full_attention", "sliding_attention", "chunked_attention"}
_GROUPED = "fastdraft_grouped"
_FEW = 16  # new tokens for which repeating their mask per query head costs less than copying keys and values


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # transformers comes without types
    """One layer's keys and values: views into fixed buffers, so that nothing old is copied."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [batch, heads, new, head_dim] states; returns views of all that is held."""
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self._buffers is None:
            batch, heads, _, size = key_states.shape
            value_size = value_states.shape[-1]  # another than the keys' in some families
            self._buffers = (
                key_states.new_empty(batch, heads, self.capacity, size),
                value_states.new_empty(batch, heads, self.capacity, value_size),
            )
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        keys, values = self._buffers
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        self.keys, self.values = keys[:, :, :stop], values[:, :, :stop]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only these rows of the batch."""
        if self._buffers is None:
            return
        length, (keys, values) = self.get_seq_length(), self._buffers
        fresh = [buffer.new_empty(len(indices), *buffer.shape[1:]) for buffer in (keys, values)]
        for kept, buffer in zip(fresh, (keys, values), strict=True):
            kept[:, :, :length] = buffer[indices, :, :length]
        self._buffers = fresh[0], fresh[1]
        self.keys, self.values = (kept[:, :, :length] for kept in fresh)


def new_cache(capacity: int) -> Cache:
    """An empty cache with room for `capacity` positions of one or more sequences."""
    return Cache(layer_class_to_replicate=partial(PreallocatedLayer, capacity))


class ModelReader:
    """A model of transformers that reads one text piece by piece and can take back its end."""

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        kinds = set(getattr(text_config(model.config), "layer_types", None) or ()) - _CROPPABLE
        if kinds:
            raise TargetError(
                f"{model.config.model_type}: layers {', '.join(sorted(kinds))} cannot take back tokens",
                "choose a target whose layers are all attention",
            )
        self.model, self.cache, self.length = model, new_cache(capacity), 0

    def read(self, ids_T: Tensor, keep: int = 1) -> Tensor:
        """Reads T more tokens; the logits after each of the last `keep`, [keep, V]."""
        with grouped_attention(self.model):
            output = self.model(
                input_ids=ids_T[None], past_key_values=self.cache, use_cache=True, logits_to_keep=keep
            )
        self.length += ids_T.shape[0]
        logits_TV: Tensor = output.logits[0]
        return logits_TV

    def take_back(self, length: int) -> None:
        """Keeps the first `length` tokens only; nothing happens when fewer were read."""
        if length < self.length:
            self.cache.crop(
                length - self.length
            )  # every release of transformers understands a negative count
            self.length = length


@dataclass(frozen=True)
class ReadableModel:
    """A model of transformers, in evaluation mode, for decoding."""

    model: PreTrainedModel
    columns = None  # a trimmed head gives -inf for the ids without a row

    @property
    def context_length(self) -> int:
        return int(text_config(self.model.config).max_position_embeddings)

    @property
    def device(self) -> torch.device:
        return self.model.device  # type: ignore[no-any-return]

    def reader(self, capacity: int) -> ModelReader:
        return ModelReader(self.model, capacity)


def _attend(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BNTD: Tensor,
    value_BNTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`sdpa` with a group's query heads as several queries over their one key head, which is not copied."""
    groups, new, mask = getattr(module, "num_key_value_groups", 1), query_BHTD.shape[2], attention_mask
    one_mask = new == 1 if mask is None else mask.shape[1] == 1 and mask.shape[2] == new
    if groups == 1 or new > _FEW or not one_mask:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query_BHTD, key_BNTD, value_BNTD, mask, scaling=scaling, **kwargs
        )
    batch, heads, _, size = query_BHTD.shape
    query_BNFD = query_BHTD.reshape(batch, heads // groups, groups * new, size)
    if mask is not None:
        mask = mask.repeat(1, 1, groups, 1) if new > 1 else mask.expand(-1, -1, groups, -1)
    output_BNFD = torch.nn.functional.scaled_dot_product_attention(
        query_BNFD, key_BNTD, value_BNTD, attn_mask=mask, scale=scaling
    )
    return output_BNFD.reshape(batch, heads, new, size).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Attention without copied keys inside the block, for a model on `sdpa`; any other is left alone."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        yield
        return
    AttentionInterface.register(_GROUPED, _attend)
    AttentionMaskInterface.register(_GROUPED, sdpa_mask)
    # Set directly: the public setter also checks hub kernels and takes milliseconds, and the layers read just
    # this.
    config._attn_implementation = _GROUPED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
