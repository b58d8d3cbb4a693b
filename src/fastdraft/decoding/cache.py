"""Key-value caches for decoding that takes steps back.

Decides that a cache has its final size from the start and is written in place (growing by concatenation copies the whole
cache at every token), that every layer keeps all positions, also those with a sliding window (the window is applied by
the model's mask, and a layer that forgets cannot be cropped), and that models with a state which cannot be cropped are
refused. And that keys are read where they stand, not copied for every query head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from fastdraft.decoding.grouped_attention import grouped_attention
from fastdraft.errors import TargetError
from fastdraft.modeling.families import text_config

_CROPPABLE = {"full_attention", "sliding_attention", "chunked_attention"}


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
        buffers = tuple(
            states.new_empty((*states.shape[:2], self.capacity, states.shape[-1]))
            for states in (key_states, value_states)
        )
        if start:
            buffers[0][:, :, :start], buffers[1][:, :, :start] = self.keys, self.values
        self._buffers = (buffers[0], buffers[1])
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True


def new_cache(model: PreTrainedModel, capacity: int) -> Cache:
    """An empty cache with room for `capacity` positions of one or more sequences.

    Raises:
        TargetError: when the model keeps a state that cannot be taken back (recurrent or linear attention layers).
    """
    kinds = set(getattr(text_config(model.config), "layer_types", None) or ()) - _CROPPABLE
    if kinds:
        rule = "speculative decoding must take back rejected tokens, which only attention layers allow"
        found = f"has layers of kind {', '.join(sorted(kinds))}"
        raise TargetError(
            model.config.model_type, found, rule, "choose a target whose layers are all attention"
        )
    return Cache(layer_class_to_replicate=partial(PreallocatedLayer, capacity))


class Reader:
    """A model that reads one token sequence piece by piece and can take back the last tokens."""

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model, self.cache = model, new_cache(model, capacity)
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
            )  # a negative count is taken back by every release of transformers
            self.length = length
