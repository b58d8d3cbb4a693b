"""The two halves of a gated decoder layer with their backward passes by hand, for training on a CPU.

Same mathematics and types as the modules under autocast: the stream, norms, rotations and softmax sums in
fp32, products in bf16 (without autocast in the weights' type). Activations change type once; projections of
one input are one product. N = B*T, D hidden, F feed-forward, O features of query, key and value together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fastdraft.training.cpu_attention import Rotation, causal_attention, causal_attention_backward


class Products(NamedTuple):
    """Weights of the products of one half, in their type: several that read the same input are stacked."""

    into: Tensor  # query, key and value [O, D], or gate and up [2F, D]
    into_bias: Tensor | None
    out: Tensor  # [D, H*E] or [D, F]
    out_bias: Tensor | None


class AttentionShape(NamedTuple):
    """What the attention half needs to know beside its weights."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    eps: float
    scale: float  # of the scores
    norm_heads: bool = False  # queries and keys of every head are normed before they are turned (Qwen 3)


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays (arXiv 1910.07467)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, gain: Tensor, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `x * scale * gain` by x [N, D] (plus `added`) and by gain [D]; overwrites `grad`."""
    product = grad * x
    grad_gain = (scale.t() @ product)[0]
    factor = (product @ gain)[:, None].mul_(scale**3).div_(-x.shape[-1])
    grad.mul_(gain)
    total = grad.mul_(scale) if added is None else torch.addcmul(added, grad, scale)
    return total.addcmul_(x, factor), grad_gain


class RMSNorm(torch.autograd.Function):
    """x * rms_scale(x) * gain, all in the type of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        scale = rms_scale(x, eps)
        ctx.save_for_backward(x, scale, gain)
        return (x * scale).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, gain = ctx.saved_tensors
        flat = (grad.flatten(0, -2).clone(), x.flatten(0, -2), scale.flatten(0, -2))
        grad_x, grad_gain = rms_norm_backward(*flat, gain)
        return grad_x.view_as(x), grad_gain, None


class AttentionHalf(torch.autograd.Function):
    """x + attention(norm(x)), x [B, T, D] in the stream's type.

    `parameters`: gain, the query, key and value weights (one or three), their biases, output weight, its
    bias, gains of the heads' norms. They are there to receive gradients: the products read `products`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: AttentionShape,
        products: Products,
        rotation: Rotation,
        documents: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        keep = any(ctx.needs_input_grad)
        flat_ND = x.flatten(0, 1)
        scale_N1 = rms_scale(flat_ND, shape.eps)
        normed_ND = (flat_ND * scale_N1).mul_(parameters[0]).to(products.into.dtype)
        qkv_NO = functional.linear(normed_ND, products.into, products.into_bias)
        query, key, value = _heads(qkv_NO, x.shape, shape)
        if shape.norm_heads:
            query = _normed(query, parameters[-2], rotation.cos.dtype, shape.eps)
            key = _normed(key, parameters[-1], rotation.cos.dtype, shape.eps)
        query = rotation.apply(query, value.new_empty(query.shape), factor=shape.scale)
        key = rotation.apply(key, value.new_empty(key.shape))
        seen, memory = causal_attention(query, key, value.contiguous(), documents, keep)
        seen_NO = seen.transpose(1, 2).flatten(2).flatten(0, 1)
        out = functional.linear(seen_NO, products.out, products.out_bias)
        if keep:
            ctx.facts, before = (shape, products, rotation, memory), qkv_NO if shape.norm_heads else None
            ctx.save_for_backward(flat_ND, scale_N1, normed_ND, before, seen_NO, *parameters)
        return _added(x, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, products, rotation, memory = ctx.facts
        flat_ND, scale_N1, normed_ND, qkv_NO, seen_NO, *parameters = ctx.saved_tensors
        grad_ND = grad.flatten(0, 1)
        low_ND = grad_ND.to(products.out.dtype)
        grad_out = _weight_gradients(low_ND, seen_NO, products.out_bias)
        grad_seen = (low_ND @ products.out).view(*grad.shape[:2], shape.num_heads, shape.head_size)
        grad_query, grad_key, grad_value = causal_attention_backward(grad_seen.transpose(1, 2), memory)
        grad_NO = low_ND.new_empty(low_ND.shape[0], products.into.shape[0])
        parts, grad_gains = _heads(grad_NO, grad.shape, shape), list[Tensor]()
        for number, (part, factor) in enumerate(((grad_query, shape.scale), (grad_key, 1.0))):
            if not shape.norm_heads:
                rotation.apply(part, parts[number], factor=factor, back=True)
                continue
            wide = torch.empty(part.shape, dtype=rotation.cos.dtype, device=part.device)
            turned = rotation.apply(part, wide, factor=factor, back=True).flatten(0, -2)
            before = _heads(qkv_NO, grad.shape, shape)[number].to(turned.dtype).contiguous().flatten(0, -2)
            scale = rms_scale(before, shape.eps)
            turned, grad_gain = rms_norm_backward(turned, before, scale, parameters[number - 2])
            parts[number].copy_(turned.view_as(part))
            grad_gains.append(grad_gain)
        parts[2].copy_(grad_value)
        grad_into = _weight_gradients(grad_NO, normed_ND, products.into_bias)
        into = (grad_NO @ products.into).to(grad.dtype)
        grad_x, grad_gain = rms_norm_backward(into, flat_ND, scale_N1, parameters[0], grad_ND)
        gradients = _by_parameter(grad_into, grad_out, grad_gains, parameters[1:])
        return grad_x.view_as(grad), None, None, None, None, grad_gain, *gradients


class FeedForwardHalf(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) * up(norm(x))), x [B, T, D] in the stream's type (arXiv 2002.05202).

    `parameters`: gain, the gate and up weights (stacked or two), their biases, the down weight, its bias.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, products: Products, *parameters: Tensor) -> Tensor:
        flat_ND = x.flatten(0, 1)
        scale_N1 = rms_scale(flat_ND, eps)
        normed_ND = (flat_ND * scale_N1).mul_(parameters[0]).to(products.into.dtype)
        both = functional.linear(normed_ND, products.into, products.into_bias)
        gate_NF, up_NF = both.chunk(2, dim=1)
        inner_NF = functional.silu(gate_NF).mul_(up_NF)
        out = functional.linear(inner_NF, products.out, products.out_bias)
        if any(ctx.needs_input_grad):
            ctx.products = products
            ctx.save_for_backward(flat_ND, scale_N1, normed_ND, both, inner_NF, *parameters)
        return _added(x, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        products: Products = ctx.products
        flat_ND, scale_N1, normed_ND, both, inner_NF, *parameters = ctx.saved_tensors
        grad_ND = grad.flatten(0, 1)
        low_ND = grad_ND.to(products.out.dtype)
        grad_out = _weight_gradients(low_ND, inner_NF, products.out_bias)
        grad_inner = low_ND @ products.out
        gate_NF, up_NF = both.chunk(2, dim=1)
        grad_both = torch.empty_like(both)
        grad_gate, grad_up = grad_both.chunk(2, dim=1)
        torch.mul(functional.silu(gate_NF), grad_inner, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_inner.mul_(up_NF), gate_NF, grad_input=grad_gate)
        grad_into = _weight_gradients(grad_both, normed_ND, products.into_bias)
        into = (grad_both @ products.into).to(grad.dtype)
        grad_x, grad_gain = rms_norm_backward(into, flat_ND, scale_N1, parameters[0], grad_ND)
        gradients = _by_parameter(grad_into, grad_out, [], parameters[1:])
        return grad_x.view_as(grad), None, None, grad_gain, *gradients


def _added(x: Tensor, out: Tensor) -> Tensor:
    """The stream and a half's share of it: two passes of one type each are quicker than one of two types."""
    out = out.view_as(x)
    return x + out if out.dtype == x.dtype else out.to(x.dtype).add_(x)


def _heads(qkv_NO: Tensor, size: Sequence[int], shape: AttentionShape) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, H, T, E] and twice [B, J, T, E] of the stacked projections."""
    parts = qkv_NO.view(size[0], size[1], -1, shape.head_size).transpose(1, 2)
    query, key, value = torch.split(parts, [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
    return query, key, value


def _normed(part: Tensor, gain: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    """The heads' own norm; contiguous, in the stream's type."""
    wide = torch.empty(part.shape, dtype=dtype, device=part.device).copy_(part)
    return wide.mul_(rms_scale(wide, eps)).mul_(gain)


def _weight_gradients(grad_NO: Tensor, input_ND: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Of a weight [O, D], and of its bias where there is one."""
    wide = torch.promote_types(grad_NO.dtype, torch.float32)
    return [grad_NO.t() @ input_ND, *([] if bias is None else [grad_NO.sum(0, dtype=wide)])]


def _by_parameter(
    into: list[Tensor], out: list[Tensor], gains: list[Tensor], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """One gradient for each parameter, in its type; stacked weights and biases are taken apart."""
    own = parameters[: len(parameters) - len(out) - len(gains)]
    parts: list[Tensor] = []
    for ndim, stacked in zip((2, 1), into, strict=False):
        parts += torch.split(stacked, [parameter.shape[0] for parameter in own if parameter.ndim == ndim])
    pairs = zip([*parts, *out, *gains], parameters, strict=True)
    return [part.to(parameter.dtype) for part, parameter in pairs]
