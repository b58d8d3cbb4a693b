"""The two halves of a gated decoder layer with their backward passes written out, for a CPU.

Decides what an ordinary autograd graph of the same layer leaves to chance: activations go to the type of the matrix products once,
projections of the same input are one product, gradients of a residual stream are added in place, and nothing is kept that a
cheap pass makes again. Same mathematics and the same types as the eager modules under autocast: the stream, norms, rotations and
softmax sums in fp32, matrix products in `low` (bf16 under autocast, else the weights' own type).

Shapes: B rows, T positions, N = B*T, D hidden size, F feed-forward size, O features of all of query, key and value; H, J, E as in
functional/attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fastdraft.functional.attention import Rotation, causal_attention, causal_attention_backward


@dataclass(frozen=True)
class Products:
    """Weights of the products of one half, in their type: several that read the same input are stacked."""

    into: Tensor
    """Query, key and value [O, D], or gate and up [2F, D]."""
    into_bias: Tensor | None
    out: Tensor
    """[D, H*E] or [D, F]."""
    out_bias: Tensor | None


@dataclass(frozen=True)
class AttentionShape:
    """What the attention half needs to know beside its weights."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    eps: float
    scale: float
    """Of the scores."""
    norm_heads: bool = False
    """Queries and keys of every head are normed before they are turned (Qwen 3)."""


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays with size 1 (arXiv 1910.07467)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm_backward(
    grad: Tensor, x: Tensor, scale: Tensor, gain: Tensor, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `x * scale * gain` by x (plus `added` where given) and by gain.

    All [N, D] but scale [N, 1] and gain [D]; overwrites `grad`.
    """
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
        grad_x, grad_gain = rms_norm_backward(
            grad.flatten(0, -2).clone(), x.flatten(0, -2), scale.flatten(0, -2), gain
        )
        return grad_x.view_as(x), grad_gain, None


class AttentionHalf(torch.autograd.Function):
    """x + attention(norm(x)), x [B, T, D] in the stream's type.

    `parameters` in order: gain, the query, key and value weights (one or three), their biases, output weight, its bias, gains of
    the heads' norms. They are only there to receive gradients: the products read `products`.
    """

    @staticmethod
    def forward(  # noqa: PLR0917
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
        gains = parameters[-2:] if shape.norm_heads else ()
        query, key, value = _heads(qkv_NO, x.shape, shape)
        if shape.norm_heads:
            query, key = (
                _normed(part, gain, rotation.cos.dtype, shape.eps)
                for part, gain in zip((query, key), gains, strict=True)
            )
        query = rotation.apply(
            query, torch.empty(query.shape, dtype=value.dtype, device=x.device), factor=shape.scale
        )
        key = rotation.apply(key, torch.empty(key.shape, dtype=value.dtype, device=x.device))
        seen, kept = causal_attention(query, key, value.contiguous(), documents, keep)
        seen_NO = seen.transpose(1, 2).flatten(2).flatten(0, 1)
        out = functional.linear(seen_NO, products.out, products.out_bias)
        if keep:
            ctx.facts = shape, products, rotation, kept
            ctx.save_for_backward(
                flat_ND, scale_N1, normed_ND, qkv_NO if shape.norm_heads else None, seen_NO, *parameters
            )
        return _added(x, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, products, rotation, kept = ctx.facts
        flat_ND, scale_N1, normed_ND, qkv_NO, seen_NO, *parameters = ctx.saved_tensors
        batch, length, _ = grad.shape
        grad_ND = grad.flatten(0, 1)
        low_ND = grad_ND.to(products.out.dtype)
        grad_out, grad_out_bias = _weight_gradients(low_ND, seen_NO, products.out_bias)
        grad_seen = (
            (low_ND @ products.out).view(batch, length, shape.num_heads, shape.head_size).transpose(1, 2)
        )
        grad_query, grad_key, grad_value = causal_attention_backward(grad_seen, kept)
        grad_NO = low_ND.new_empty(low_ND.shape[0], products.into.shape[0])
        parts = _heads(grad_NO, grad.shape, shape)
        grad_gains: list[Tensor] = []
        for number, (part, factor) in enumerate(((grad_query, shape.scale), (grad_key, 1.0))):
            if not shape.norm_heads:
                rotation.apply(part, parts[number], factor=factor, back=True)
                continue
            turned = rotation.apply(
                part,
                torch.empty(part.shape, dtype=rotation.cos.dtype, device=part.device),
                factor=factor,
                back=True,
            )
            before = _heads(qkv_NO, grad.shape, shape)[number]
            turned, grad_gain = _head_norm_backward(turned, before, parameters[number - 2], shape.eps)
            parts[number].copy_(turned)
            grad_gains.append(grad_gain)
        parts[2].copy_(grad_value)
        grad_into, grad_into_bias = _weight_gradients(grad_NO, normed_ND, products.into_bias)
        into = (grad_NO @ products.into).to(grad.dtype)
        grad_x, grad_gain = rms_norm_backward(into, flat_ND, scale_N1, parameters[0], grad_ND)
        count = len(parameters) - 2 - (grad_out_bias is not None) - len(grad_gains)
        own = _split((grad_into, grad_into_bias), parameters[1 : 1 + count])
        rest = [grad_out, *([] if grad_out_bias is None else [grad_out_bias]), *grad_gains]
        return (
            grad_x.view_as(grad),
            None,
            None,
            None,
            None,
            grad_gain,
            *own,
            *_typed(rest, parameters[1 + count :]),
        )


class FeedForwardHalf(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) * up(norm(x))), x [B, T, D] in the stream's type (arXiv 2002.05202).

    `parameters` in order: gain, the gate and up weights (stacked or two), their biases, the down weight, its bias.
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
        grad_out, grad_out_bias = _weight_gradients(low_ND, inner_NF, products.out_bias)
        grad_inner = low_ND @ products.out
        gate_NF, up_NF = both.chunk(2, dim=1)
        grad_both = torch.empty_like(both)
        grad_gate, grad_up = grad_both.chunk(2, dim=1)
        torch.mul(functional.silu(gate_NF), grad_inner, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_inner.mul_(up_NF), gate_NF, grad_input=grad_gate)
        grad_into, grad_into_bias = _weight_gradients(grad_both, normed_ND, products.into_bias)
        into = (grad_both @ products.into).to(grad.dtype)
        grad_x, grad_gain = rms_norm_backward(into, flat_ND, scale_N1, parameters[0], grad_ND)
        count = len(parameters) - 2 - (grad_out_bias is not None)
        own = _split((grad_into, grad_into_bias), parameters[1 : 1 + count])
        rest = [grad_out, *([] if grad_out_bias is None else [grad_out_bias])]
        return grad_x.view_as(grad), None, None, grad_gain, *own, *_typed(rest, parameters[1 + count :])


def _added(x: Tensor, out: Tensor) -> Tensor:
    """The stream and a half's share of it: two passes of one type each are quicker than one of two types."""
    out = out.view_as(x)
    return x + out if out.dtype == x.dtype else out.to(x.dtype).add_(x)


def _heads(qkv_NO: Tensor, size: Sequence[int], shape: AttentionShape) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, H, T, E] and twice [B, J, T, E] of the stacked projections."""
    heads, kv_heads, width = shape.num_heads, shape.num_kv_heads, shape.head_size
    parts = qkv_NO.view(size[0], size[1], -1, width).transpose(1, 2)
    query, key, value = torch.split(parts, [heads, kv_heads, kv_heads], dim=1)
    return query, key, value


def _normed(part: Tensor, gain: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    """The heads' own norm; contiguous, in the stream's type."""
    wide = torch.empty(part.shape, dtype=dtype, device=part.device).copy_(part)
    return wide.mul_(rms_scale(wide, eps)).mul_(gain)


def _head_norm_backward(grad: Tensor, before: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = before.to(grad.dtype).contiguous().flatten(0, -2)
    grad_before, grad_gain = rms_norm_backward(grad.flatten(0, -2), wide, rms_scale(wide, eps), gain)
    return grad_before.view_as(grad), grad_gain


def _weight_gradients(grad_NO: Tensor, input_ND: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    wide = torch.promote_types(grad_NO.dtype, torch.float32)
    return grad_NO.t() @ input_ND, None if bias is None else grad_NO.sum(0, dtype=wide)


def _split(stacked: tuple[Tensor, Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of stacked weights and biases, one for each parameter in its type."""
    weights = [parameter for parameter in parameters if parameter.ndim == 2]
    biases = [parameter for parameter in parameters if parameter.ndim == 1]
    parts = list(torch.split(stacked[0], [weight.shape[0] for weight in weights]))
    if stacked[1] is not None:
        parts += torch.split(stacked[1], [bias.shape[0] for bias in biases])
    return _typed(parts, parameters)


def _typed(gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    return [gradient.to(parameter.dtype) for gradient, parameter in zip(gradients, parameters, strict=True)]
