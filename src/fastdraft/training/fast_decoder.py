"""Picks the fastest decoder forward for training: hand-written layers on a CPU, flash attention on a GPU.

decoder = fast_decoder(model.get_decoder(), device)
with kept_memory(device): ...   # around the training loop
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastdraft.training.cpu_attention import Rotation
from fastdraft.training.cpu_layers import AttentionHalf, AttentionShape, FeedForwardHalf, Products, RMSNorm
from fastdraft.training.gpu_attention import FAMILIES, flash_decoder, has_windows

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # names of mallopt(3)
_NEVER = 2**31 - 1
_LARGEST_THRESHOLD = 32 << 20  # where glibc's own moving threshold ends


def fast_decoder(
    decoder: nn.Module, device: torch.device, *, compiled: bool = False, backend: str = "inductor"
) -> Any:
    """Gives `.last_hidden_state` for `input_ids`, `position_ids` and `use_cache`, as `decoder` does.

    `compiled`: torch.compile makes its kernels, with `backend`.
    """
    if device.type == "cpu":
        return torch.compile(decoder, backend=backend) if compiled else cpu_decoder(decoder) or decoder
    fast = flash_decoder(decoder, compiled=compiled, backend=backend)
    return fast or (torch.compile(decoder, backend=backend) if compiled else decoder)


@contextlib.contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Keeps freed memory for the next step, on a CPU with glibc; afterwards it goes back to the system."""
    # glibc returns large blocks at once and asks for them again at the next step, and the system clears every
    # page anew: a step of a 1.5 M draft can spend more time there than on arithmetic.
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt.argtypes, libc.malloc_trim.argtypes = [ctypes.c_int, ctypes.c_int], [ctypes.c_size_t]
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, 65536)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        libc.malloc_trim(0)


class HiddenStates(NamedTuple):
    """What a decoder gives."""

    last_hidden_state: Tensor  # [B, T, D]


class StackedLinear:
    """Linear layers that read the same input, as one matrix in the type of the products."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.weights = [layer.weight for layer in layers]
        self.biases = [layer.bias for layer in layers if layer.bias is not None]  # of all or of none
        self._stacked: list[Tensor | None] = [None, None]
        self._seen: tuple[object, ...] = ()

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    @torch.no_grad()
    def read(self, dtype: torch.dtype) -> list[Any]:
        """The stacked weight [O, D] and bias [O]; made anew when a weight has changed, once a step."""
        seen = (dtype, *((parameter.data_ptr(), parameter._version) for parameter in self.parameters))
        if seen != self._seen:
            groups: Any = zip((self.weights, self.biases), self._stacked, strict=True)
            self._stacked = [_joined(parts, dtype, before) if parts else None for parts, before in groups]
            self._seen = seen
        return self._stacked


def _joined(parts: Sequence[Tensor], dtype: torch.dtype, before: Tensor | None) -> Tensor:
    """One tensor of all rows, in the memory of `before` where that fits."""
    if len(parts) == 1 and parts[0].dtype == dtype:
        return parts[0].detach()
    if before is None or before.dtype != dtype:
        rows = sum(part.shape[0] for part in parts)
        before = torch.empty(rows, *parts[0].shape[1:], dtype=dtype, device=parts[0].device)
    for part, place in zip(parts, torch.split(before, [part.shape[0] for part in parts]), strict=True):
        place.copy_(part)
    return before


class _Layer:
    """One decoder layer; reads the module's own parameters, which stay where they are."""

    def __init__(self, layer: Any, config: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.into = StackedLinear(_present(attention, "qkv_proj", "q_proj", "k_proj", "v_proj"))
        self.inner = StackedLinear(_present(mlp, "gate_up_proj", "gate_proj", "up_proj"))
        self.out, self.down = StackedLinear([attention.o_proj]), StackedLinear([mlp.down_proj])
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.gains = [norm.weight for norm in _present(attention, "q_norm", "k_norm")]
        heads = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        eps = self.norms[0].variance_epsilon
        self.shape = AttentionShape(*heads, eps, attention.scaling, norm_heads=bool(self.gains))

    def __call__(self, x: Tensor, dtype: torch.dtype, rotation: Rotation, documents: Tensor | None) -> Tensor:
        attend, feed = cast(Any, AttentionHalf.apply), cast(Any, FeedForwardHalf.apply)
        weights = self.norms[0].weight, *self.into.parameters, *self.out.parameters, *self.gains
        products: Any = Products(*self.into.read(dtype), *self.out.read(dtype))
        x = attend(x, self.shape, products, rotation, documents, *weights)
        weights = self.norms[1].weight, *self.inner.parameters, *self.down.parameters
        products = Products(*self.inner.read(dtype), *self.down.read(dtype))
        done: Tensor = feed(x, self.norms[1].variance_epsilon, products, *weights)
        return done


class CpuDecoder:
    """Takes the place of `decoder` in a training step: same inputs, same hidden states, same gradients."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.layers = [_Layer(layer, decoder.config) for layer in decoder.layers]

    def __call__(
        self, input_ids: Tensor, use_cache: bool = False, position_ids: Tensor | None = None
    ) -> HiddenStates:
        """`position_ids` [B, T] begin anew at 0 at a row's next text, which sees nothing before it."""
        device = input_ids.device.type
        x = self.decoder.embed_tokens(input_ids)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            documents = None if position_ids is None else (position_ids == 0).cumsum(-1)
            if position_ids is None:
                position_ids = torch.arange(x.shape[1], device=x.device)[None]
            cos, sin = self.decoder.rotary_emb(x, position_ids=position_ids)
            half = cos.shape[-1] // 2  # the second half repeats the first
            rotation = Rotation(cos[:, None, :, :half].contiguous(), sin[:, None, :, :half].contiguous())
            for layer in self.layers:
                x = layer(x, dtype, rotation, documents)
            norm, apply = self.decoder.norm, cast(Any, RMSNorm.apply)
            return HiddenStates(apply(x, norm.weight, norm.variance_epsilon))


def cpu_decoder(decoder: nn.Module) -> CpuDecoder | None:
    """The decoder with layers by hand; None where it is not of Llama's build, or its config asks for more."""
    config: Any = getattr(decoder, "config", None)
    if (
        getattr(config, "model_type", None) not in FAMILIES
        or config.hidden_act != "silu"
        or has_windows(config)
    ):
        return None
    dropouts = [getattr(config, name, 0.0) for name in ("attention_dropout", "resid_pdrop", "embd_pdrop")]
    return None if any(dropouts) else CpuDecoder(decoder)


def _present(module: nn.Module, *names: str) -> list[Any]:
    return [getattr(module, name) for name in names if hasattr(module, name)]
