"""The decoder of a draft on an accelerator: attention by flash kernels, and no wait for the device to find that out.

Given nothing but ids, transformers asks the device whether the positions are those of one text: a wait in every forward pass. Under
torch.compile it cannot ask, and makes a mask [B, 1, T, T] that no flash kernel takes. Decides instead what the training loop knows: whole
rows are causal and need no mask (SDPA's own flash kernel), and rows whose texts shall not see each other need a mask of blocks
(FlexAttention, arXiv 2412.05496), which skips what lies outside the diagonal blocks; where that cannot run, a dense one.

Decides too for which decoders: those that attend to everything before a token, within one text, and nothing else. The model's own
setting is put back after each call, since validation and generation have caches and padding.

Shapes: B rows, T positions, H heads, D of a head.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

NAME = "fastdraft_causal"
"""Of the attention, as transformers knows it; it makes no masks for a name that it has no mask for."""
_FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
_HEAD_SIZES = (16, 32, 64, 128, 256)
"""That FlexAttention's kernels take without padding."""


class Flash:
    """Stands in for `decoder` in a training step: same inputs, same hidden states, same gradients.

    Args:
        decoder: One that `flash` takes.
        compiled: Whether torch.compile makes its kernels.
        backend: torch.compile's.
    """

    def __init__(self, decoder: nn.Module, *, compiled: bool = False, backend: str = "inductor") -> None:
        self.decoder: Any = decoder
        self._runs: Any = torch.compile(decoder, backend=backend) if compiled else decoder
        _register()

    def __call__(self, input_ids: Tensor, use_cache: bool = False, position_ids: Tensor | None = None) -> Any:
        """The decoder's own output for `input_ids` [B, T]; `position_ids` [B, T] begin anew at 0 where a row's next text begins."""
        mask = (
            None
            if position_ids is None
            else text_mask(position_ids, blocks=_has_blocks(self.decoder, input_ids.device))
        )
        with _attention(self.decoder.config, NAME):
            return self._runs(
                input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
            )


def flash(decoder: nn.Module, *, compiled: bool = False, backend: str = "inductor") -> Flash | None:
    """`decoder` with flash attention, or None where it may attend to something else than all tokens before."""
    config: Any = getattr(decoder, "config", None)
    known = (
        getattr(config, "model_type", None) in _FAMILIES
        and getattr(config, "_attn_implementation", None) == "sdpa"
    )
    return Flash(decoder, compiled=compiled, backend=backend) if known and not _has_windows(config) else None


def text_mask(position_ids: Tensor, *, blocks: bool) -> Any:
    """Which tokens of its own text each token sees: itself and those before.

    Args:
        position_ids: int64 [B, T], 0 where a text begins.
        blocks: A `BlockMask`, which is FlexAttention's; else bool [B, 1, T, T], true where a token is seen.
    """
    texts_BT, length = (position_ids == 0).cumsum(-1), position_ids.shape[1]
    if not blocks:
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=position_ids.device).tril()
        return (texts_BT[:, None, :, None] == texts_BT[:, None, None, :]) & causal_TT
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (texts_BT[b, q] == texts_BT[b, kv])

    return create_block_mask(sees, position_ids.shape[0], None, length, length, device=position_ids.device)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """[B, H, T, D] thrice -> [B, T, H, D]; without a mask causal."""
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if isinstance(
        attention_mask, BlockMask
    ):  # autocast, which brings what SDPA reads to one type, does not know this kernel
        query, key = query.to(value.dtype), key.to(value.dtype)  # fp32 since their rotation
        return flex_attention_forward(module, query, key, value, attention_mask, **options)[0], None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0], None


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


@contextlib.contextmanager
def _attention(config: Any, name: str) -> Iterator[None]:
    before = config._attn_implementation_internal
    config._attn_implementation_internal = (
        name  # the public setter looks through the parts of a model each time
    )
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def _has_blocks(decoder: Any, device: torch.device) -> bool:
    size = getattr(decoder.layers[0].self_attn, "head_dim", 0)
    dropout = getattr(decoder.config, "attention_dropout", 0.0)
    return (
        device.type == "cuda"
        and size in _HEAD_SIZES
        and not dropout
        and importlib.util.find_spec("triton") is not None
    )


def _has_windows(config: Any) -> bool:
    return getattr(config, "sliding_window", None) is not None and bool(
        getattr(config, "use_sliding_window", True)
    )
