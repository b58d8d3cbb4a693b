"""Key-value caches for decoding that takes tokens back, and attention that reads them where they stand.

    reader = ModelReader(model, capacity=512); logits = reader.read(ids_T, keep=4); reader.take_back(reader.length - 2)

Shape suffixes: B rows, H query heads, N key heads, T positions, F = (H / N) x new positions, D head size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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

# A recurrent or linear layer's state cannot be cropped. A sliding window can: every layer here keeps all positions, and
# the model's mask applies the window.
_CROPPABLE = {"full_attention", "sliding_attention", "chunked_attention"}
_GROUPED = "fastdraft_grouped"
_FEW = (
    16  # new tokens up to which repeating their mask per query head costs less than copying keys and values
)


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # transformers comes without types
    """One layer's keys and values: views into buffers of a fixed capacity, so that writing and cropping copy nothing old."""

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
        if self._buffers is None or stop > self.capacity:
            self._make_room(key_states, value_states, start, stop)
        assert self._buffers is not None
        keys, values = self._buffers
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        self.keys, self.values = keys[:, :, :stop], values[:, :, :stop]
        return self.keys, self.values

    def _make_room(self, key_states: Tensor, value_states: Tensor, start: int, stop: int) -> None:
        """Allocates at the first use, and again, larger, when more is appended than was foreseen."""
        self.capacity = max(self.capacity, stop if self._buffers is None else 2 * stop)
        keys, values = (
            states.new_empty((*states.shape[:2], self.capacity, states.shape[-1]))
            for states in (key_states, value_states)
        )
        if start:
            keys[:, :, :start], values[:, :, :start] = self.keys, self.values
        self._buffers = keys, values
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only these rows of the batch."""
        if self._buffers is None:
            return
        length = self.get_seq_length()
        fresh = [buffer.new_empty(len(indices), *buffer.shape[1:]) for buffer in self._buffers]
        for kept, buffer in zip(fresh, self._buffers, strict=True):
            kept[:, :, :length] = buffer[indices, :, :length]
        self._buffers = fresh[0], fresh[1]
        self.keys, self.values = fresh[0][:, :, :length], fresh[1][:, :, :length]


def new_cache(capacity: int) -> Cache:
    """An empty cache with room for `capacity` positions of one or more sequences."""
    return Cache(layer_class_to_replicate=partial(PreallocatedLayer, capacity))


class ModelReader:
    """A model of transformers that reads one text piece by piece and can take back its end."""

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        kinds = set(getattr(text_config(model.config), "layer_types", None) or ()) - _CROPPABLE
        if kinds:
            raise TargetError(
                f"{model.config.model_type}: has layers of kind {', '.join(sorted(kinds))}, whose state cannot take "
                "back rejected tokens",
                "choose a target whose layers are all attention",
            )
        self.model, self.cache = model, new_cache(capacity)
        self.length = 0
        """Tokens read so far and not taken back."""

    def read(self, ids_T: Tensor, keep: int = 1) -> Tensor:
        """Reads T more tokens; the logits after each of the last `keep`, [keep, V]."""
        with grouped_attention(self.model):
            output = self.model(
                input_ids=ids_T[None], past_key_values=self.cache, use_cache=True, logits_to_keep=keep
            )
        self.length += ids_T.shape[0]
        logits_1TV: Tensor = output.logits
        return logits_1TV[0]

    def take_back(self, length: int) -> None:
        """Keeps the first `length` tokens only; nothing happens when fewer were read."""
        if length < self.length:
            self.cache.crop(
                length - self.length
            )  # a negative count is understood by every release of transformers
            self.length = length


def _attend(  # noqa: PLR0917 -- called by transformers
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BNTD: Tensor,
    value_BNTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The query heads of one group stand as several queries over their one key head: the same scores, but keys and
    values are not first copied for every query head. All but a few new tokens goes to transformers' own `sdpa`."""
    groups, new = getattr(module, "num_key_value_groups", 1), query_BHTD.shape[2]
    mask = attention_mask
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
    """Attention without copied keys inside the block, for a model that runs on `sdpa`; any other model is left alone."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        yield
        return
    AttentionInterface.register(_GROUPED, _attend)
    AttentionMaskInterface.register(_GROUPED, sdpa_mask)
    # Set directly: the public setter also checks hub kernels and takes milliseconds, and the layers read just this.
    config._attn_implementation = _GROUPED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
