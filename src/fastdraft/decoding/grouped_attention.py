"""Attention of a few new tokens per row for models whose query heads share keys (grouped-query attention).

Decides that, while a batch writes or proposals are verified, the query heads of one group stand as several queries over
their one key head. The scores are the same, but keys and values are not first copied for every query head, which for a
long cache costs more than the attention itself.

Shape suffixes: B rows, H query heads, N key heads, G = H / N, T positions, F = G x new positions, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "fastdraft_grouped"
FEW = 16
"""New tokens up to which copying their mask for every query head costs less than copying keys and values."""


def attend(  # noqa: PLR0917 -- called by transformers
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BNTD: Tensor,
    value_BNTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A function of transformers' shape; all but a few new tokens under a mask of one head goes to its own `sdpa`."""
    groups, new = getattr(module, "num_key_value_groups", 1), query_BHTD.shape[2]
    one_mask = (
        new == 1
        if attention_mask is None
        else attention_mask.shape[1] == 1 and attention_mask.shape[2] == new
    )
    if groups == 1 or new > FEW or not one_mask:
        return sdpa_attention_forward(
            module, query_BHTD, key_BNTD, value_BNTD, attention_mask, scaling=scaling, **kwargs
        )  # type: ignore[no-any-return]
    batch, heads, _, size = query_BHTD.shape
    query_BNFD = query_BHTD.reshape(batch, heads // groups, groups * new, size)
    mask = (
        None
        if attention_mask is None
        else attention_mask.repeat(1, 1, groups, 1)
        if new > 1
        else attention_mask.expand(-1, -1, groups, -1)
    )
    output_BNFD = torch.nn.functional.scaled_dot_product_attention(
        query_BNFD, key_BNTD, value_BNTD, attn_mask=mask, scale=scaling
    )
    return output_BNFD.reshape(batch, heads, new, size).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """Uses `attend` inside the block for a model that runs on `sdpa`; any other model is left alone."""
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "_attn_implementation", None) != "sdpa":
        yield
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    # Set directly: the public setter also checks hub kernels and takes milliseconds, and the layers read just this.
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
