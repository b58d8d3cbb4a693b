"""Attention of one new token per row for models whose query heads share keys (grouped-query attention).

Decides that, while a batch writes, the query heads of one group stand as several queries over their one key head. The
scores are the same, but keys and values are not first copied for every query head, which for a long cache costs more
than the attention itself.

Shape suffixes: B rows, H query heads, N key heads, G = H / N, T positions, D head size.
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


def attend(  # noqa: PLR0917 -- called by transformers
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BNTD: Tensor,
    value_BNTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An function of transformers' shape; everything but one new token under a mask of one head goes to its own `sdpa`."""
    groups = getattr(module, "num_key_value_groups", 1)
    one_mask = attention_mask is None or (attention_mask.shape[1] == 1 and attention_mask.shape[2] == 1)
    if groups == 1 or query_BHTD.shape[2] != 1 or not one_mask:
        return sdpa_attention_forward(module, query_BHTD, key_BNTD, value_BNTD, attention_mask, scaling=scaling, **kwargs)  # type: ignore[no-any-return]
    batch, heads, _, size = query_BHTD.shape
    query_BNGD = query_BHTD.reshape(batch, heads // groups, groups, size)
    mask = None if attention_mask is None else attention_mask.expand(-1, -1, groups, -1)
    output_BNGD = torch.nn.functional.scaled_dot_product_attention(query_BNGD, key_BNTD, value_BNTD, attn_mask=mask, scale=scaling)
    return output_BNGD.reshape(batch, 1, heads, size), None


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
