"""A draft's decoder on an accelerator with flash attention and no wait: `flash_decoder(model.get_decoder())`.

Given nothing but ids, transformers asks the device whether the positions are those of one text: a wait in
every forward pass. Under torch.compile it cannot ask, and makes a dense mask that no flash kernel takes.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
_NAME = "fastdraft_causal"  # transformers makes no masks for an attention that it has none for
_HEAD_SIZES = (16, 32, 64, 128, 256)  # that FlexAttention's kernels take without padding


class FlashDecoder:
    """Takes the place of `decoder` in a training step: same inputs, same hidden states, same gradients.

    Whole rows are causal and need no mask (SDPA's flash kernel); rows of several texts get a mask of blocks
    (FlexAttention, arXiv 2412.05496), or a dense one where that cannot run.
    """

    def __init__(self, decoder: nn.Module, *, compiled: bool = False, backend: str = "inductor") -> None:
        self.decoder: Any = decoder
        self._runs: Any = torch.compile(decoder, backend=backend) if compiled else decoder
        AttentionInterface.register(_NAME, _attend)

    def __call__(self, input_ids: Tensor, use_cache: bool = False, position_ids: Tensor | None = None) -> Any:
        """`position_ids` [B, T] begin anew at 0 at a row's next text, which sees nothing before it."""
        inputs, config = {"input_ids": input_ids, "position_ids": position_ids}, self.decoder.config
        blocks = position_ids is not None and _has_blocks(self.decoder, input_ids.device)
        mask = None if position_ids is None else text_mask(position_ids, blocks=blocks)
        before = config._attn_implementation_internal
        config._attn_implementation_internal = _NAME  # the public setter walks through the model each time
        try:
            return self._runs(**inputs, attention_mask=mask, use_cache=False)
        finally:  # validation and generation have caches and padding
            config._attn_implementation_internal = before


def flash_decoder(
    decoder: nn.Module, *, compiled: bool = False, backend: str = "inductor"
) -> FlashDecoder | None:
    """`decoder` with flash attention; None where it may attend to something else than all tokens before."""
    config: Any = getattr(decoder, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES or has_windows(config):
        return None
    fits = config._attn_implementation == "sdpa"
    return FlashDecoder(decoder, compiled=compiled, backend=backend) if fits else None


def has_windows(config: Any) -> bool:
    """Whether some layers see only the last tokens."""
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def text_mask(position_ids: Tensor, *, blocks: bool) -> Any:
    """Each token sees itself and those before it in its text, which begins where `position_ids` [B, T] is 0.

    `blocks`: a `BlockMask`, which is FlexAttention's; else bool [B, 1, T, T], true where a token is seen.
    """
    texts_BT, length = (position_ids == 0).cumsum(-1), position_ids.shape[1]
    if not blocks:
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
        return (texts_BT[:, None, :, None] == texts_BT[:, None, None, :]) & causal_TT

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (texts_BT[b, q] == texts_BT[b, kv])

    return create_block_mask(sees, position_ids.shape[0], None, length, length, device=position_ids.device)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """[B, H, T, D] thrice -> [B, T, H, D]; without a mask causal."""
    if isinstance(attention_mask, BlockMask):
        # Autocast, which brings what SDPA reads to one type, does not know this kernel.
        query, key = query.to(value.dtype), key.to(value.dtype)  # fp32 since their rotation
        return flex_attention_forward(module, query, key, value, attention_mask, **options)[0], None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0], None


def _has_blocks(decoder: Any, device: torch.device) -> bool:
    size = getattr(decoder.layers[0].self_attn, "head_dim", 0)
    fits = device.type == "cuda" and size in _HEAD_SIZES
    plain = not getattr(decoder.config, "attention_dropout", 0.0)
    return fits and plain and importlib.util.find_spec("triton") is not None
