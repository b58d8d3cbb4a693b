"""Picks the fastest decoder forward for training: hand-written layers on a CPU, flash attention on a GPU.

decoder = fast_decoder(model.get_decoder(), device)
with kept_memory(device): ...   # around the training loop
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastdraft.training.cpu_attention import Rotation
from fastdraft.training.cpu_layers import AttentionHalf, AttentionShape, FeedForwardHalf, Products, RMSNorm
from fastdraft.training.gpu_attention import FAMILIES, flash_decoder, has_windows

_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Phi3RMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # names of mallopt(3)
_NEVER = 2**31 - 1
_LARGEST_THRESHOLD = 32 << 20  # where glibc's own moving threshold ends


def fast_decoder(
    decoder: nn.Module, device: torch.device, *, compiled: bool = False, backend: str = "inductor"
) -> Any:
    """Gives `.last_hidden_state` for `input_ids`, `position_ids` and `use_cache`, as `decoder` does.

    `compiled`: torch.compile makes its kernels, with `backend`.
    """
    if device.type != "cpu":
        fast = flash_decoder(decoder, compiled=compiled, backend=backend)
        if fast is not None:
            return fast
    if compiled:
        return torch.compile(decoder, backend=backend)
    return (cpu_decoder(decoder) if device.type == "cpu" else None) or decoder


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


@dataclass
class StackedLinear:
    """Linear layers that read the same input, as one matrix in the type of the products."""

    layers: Sequence[nn.Linear]
    _weight: Tensor | None = field(default=None, init=False)
    _bias: Tensor | None = field(default=None, init=False)
    _seen: tuple[object, ...] = field(default=(), init=False)

    @property
    def parameters(self) -> list[Tensor]:
        """Weights, then biases."""
        return [
            *(one.weight for one in self.layers),
            *(one.bias for one in self.layers if one.bias is not None),
        ]

    @torch.no_grad()
    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The stacked weight [O, D] and bias [O]; made anew when a weight has changed, once a step."""
        parameters, count = self.parameters, len(self.layers)
        seen = (dtype, *((parameter.data_ptr(), parameter._version) for parameter in parameters))
        if self._weight is None or seen != self._seen:
            self._weight = _joined(parameters[:count], dtype, self._weight)
            self._bias = _joined(parameters[count:], dtype, self._bias) if len(parameters) > count else None
            self._seen = seen
        return self._weight, self._bias


def _joined(parts: Sequence[Tensor], dtype: torch.dtype, before: Tensor | None) -> Tensor:
    """One tensor of all rows, in the memory of `before` where that fits."""
    if len(parts) == 1 and parts[0].dtype == dtype:
        return parts[0].detach()
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    fits = before is not None and before.dtype == dtype and before.shape == shape
    joined = (
        before if fits and before is not None else torch.empty(shape, dtype=dtype, device=parts[0].device)
    )
    start = 0
    for part in parts:
        joined[start : start + part.shape[0]].copy_(part)
        start += part.shape[0]
    return joined


class _Layer:
    """One decoder layer; reads the module's own parameters, which stay where they are."""

    def __init__(self, layer: Any, config: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        queries = _present(attention, "qkv_proj", "q_proj", "k_proj", "v_proj")
        inner = _present(mlp, "gate_up_proj", "gate_proj", "up_proj")
        groups = (queries, [attention.o_proj], inner, [mlp.down_proj])
        if any(type(module) is not nn.Linear for group in groups for module in group):
            raise TypeError("a layer is no nn.Linear")
        if any(len({module.bias is None for module in group}) > 1 for group in groups):
            raise TypeError("some of the stacked layers have a bias")
        self.into, self.out, self.inner, self.down = map(StackedLinear, groups)
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.head_gains = [norm.weight for norm in _present(attention, "q_norm", "k_norm")]
        heads = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        eps = self.norms[0].variance_epsilon
        self.shape = AttentionShape(*heads, eps, attention.scaling, norm_heads=bool(self.head_gains))

    def __call__(self, x: Tensor, dtype: torch.dtype, rotation: Rotation, documents: Tensor | None) -> Tensor:
        parameters = (self.norms[0].weight, *self.into.parameters, *self.out.parameters, *self.head_gains)
        products = Products(*self.into.read(dtype), *self.out.read(dtype))
        apply: Any = AttentionHalf.apply
        x = apply(x, self.shape, products, rotation, documents, *parameters)
        parameters = (self.norms[1].weight, *self.inner.parameters, *self.down.parameters)
        products = Products(*self.inner.read(dtype), *self.down.read(dtype))
        apply = FeedForwardHalf.apply
        done: Tensor = apply(x, self.norms[1].variance_epsilon, products, *parameters)
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
    """The decoder with layers by hand; None where its build is not Llama's, or its config asks for more."""
    read: Any = decoder
    config: Any = getattr(decoder, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES or config.hidden_act != "silu":
        return None
    dropouts = [getattr(config, name, 0.0) for name in ("attention_dropout", "resid_pdrop", "embd_pdrop")]
    if has_windows(config) or any(dropouts):
        return None
    try:
        found = CpuDecoder(decoder)
        norms = [read.norm, *(norm for layer in found.layers for norm in layer.norms)]
        return found if all(type(norm).__name__ in _NORMS for norm in norms) else None
    except (AttributeError, TypeError):  # other modules than those named here: wrapped, quantised, replaced
        return None


def _present(module: nn.Module, *names: str) -> list[Any]:
    return [getattr(module, name) for name in names if hasattr(module, name)]
