"""Causal attention over whole rows as matrix products of blocks, with its backward pass by hand, for a CPU.

torch's fused kernel does the same; on a CPU its small inner products leave most of the machine idle.
B rows, T positions, H heads, J of keys and values (H a multiple of J), E head size, R rotated part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Queries of one block: it meets only the keys up to its own end, so half of the scores are mostly never made.
BLOCK = 128
# Probabilities kept for the backward pass, per layer and micro-batch, at most (64 MB of bf16); longer rows
# make them again.
KEEP_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding (arXiv 2104.09864) of the first R features of every head."""

    cos: Tensor  # [1 or B, 1, T, R/2], fp32 (float64 for float64)
    sin: Tensor

    def apply(self, x: Tensor, out: Tensor, *, factor: float = 1.0, back: bool = False) -> Tensor:
        """`out` [B, H, T, E]: `x` turned and times `factor`; `back` turns the other way."""
        half = self.cos.shape[-1]
        cos, sin = self.cos * factor, self.sin * (-factor if back else factor)
        # The two halves of all heads lie apart in between: short runs of memory take several times as long.
        halves, turned = torch.empty(2, 2, *x.shape[:-1], half, dtype=cos.dtype, device=x.device)
        left, right = halves.copy_(_halves(x, half))
        torch.mul(left, cos, out=turned[0]).addcmul_(right, sin, value=-1)
        torch.mul(right, cos, out=turned[1]).addcmul_(left, sin)
        _halves(out, half).copy_(turned)
        if 2 * half < x.shape[-1]:
            out[..., 2 * half :] = x[..., 2 * half :].to(cos.dtype) * factor
        return out


def _halves(x: Tensor, half: int) -> Tensor:
    """View [2, B, H, T, half] of the rotated features of [B, H, T, E]."""
    return x[..., : 2 * half].view(*x.shape[:-1], 2, half).movedim(3, 0)


@dataclass(frozen=True)
class AttentionMemory:
    """What the backward pass needs."""

    query: Tensor  # [B, H, T, E], scaled
    key: Tensor  # [B, J, T, E]
    value: Tensor
    probs: list[Tensor] | None  # of every block [B*J, H/J * block, keys]; None: made again, bit for bit
    later: Tensor  # [BLOCK, BLOCK]: -inf above the diagonal, else 0
    documents: Tensor | None  # int64 [B, T]: a position sees only those of its own number


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, keep: bool
) -> tuple[Tensor, AttentionMemory | None]:
    """softmax(query @ key^T) @ value: [B, H, T, E] in memory [B, T, H, E], and what the backward pass needs.

    Scores have the type of the queries (bf16 under autocast); each softmax is summed in fp32.

    `query` [B, H, T, E] is multiplied by the scale of the scores already; `key` and `value` [B, J, T, E] are
    contiguous; `documents` as in `AttentionMemory`; `keep`: a backward pass will come.
    """
    batch, heads, length, _ = query.shape
    kept: list[Tensor] | None = [] if keep and batch * heads * length * length // 2 <= KEEP_ELEMENTS else None
    later = torch.full((BLOCK, BLOCK), -torch.inf, dtype=query.dtype, device=query.device).triu_(1)
    memory = AttentionMemory(query, key, value, kept, later, documents)
    flat_value = value.flatten(0, 1)
    out = query.new_empty(batch, length, *query.shape[1::2]).transpose(1, 2)
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        probs = _probs(memory, start, end)
        _put(out, start, end, torch.bmm(probs, flat_value[:, :end]))
        if kept is not None:
            kept.append(probs)
    return out, memory if keep else None


def causal_attention_backward(grad: Tensor, memory: AttentionMemory) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query (in its type), key and value (summed in fp32, or float64); `grad` in any layout."""
    query, key, value = memory.query, memory.key, memory.value
    wide = torch.promote_types(query.dtype, torch.float32)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.empty_like(key, dtype=wide), torch.empty_like(value, dtype=wide)
    flat_key, flat_value = key.flatten(0, 1), value.flatten(0, 1)
    into_key, into_value = grad_key.flatten(0, 1), grad_value.flatten(0, 1)
    length = query.shape[2]
    for number, start in reversed(list(enumerate(range(0, length, BLOCK)))):
        end = min(start + BLOCK, length)
        add = Tensor.copy_ if end == length else Tensor.add_  # the last block meets all keys: it fills them
        probs = _probs(memory, start, end) if memory.probs is None else memory.probs[number]
        grad_block = _take(grad, key.shape[1], start, end)
        add(into_value[:, :end], torch.bmm(probs.transpose(1, 2), grad_block))
        grad_probs = torch.bmm(grad_block, flat_value[:, :end].contiguous().transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        query_block = _take(query, key.shape[1], start, end)
        add(into_key[:, :end], torch.bmm(grad_scores.transpose(1, 2), query_block))
        _put(grad_query, start, end, torch.bmm(grad_scores, flat_key[:, :end]))
    return grad_query, grad_key, grad_value


def _probs(memory: AttentionMemory, start: int, end: int) -> Tensor:
    """Probabilities of queries `start:end` over keys `:end`: [B*J, H/J * (end - start), end]."""
    batch, groups = memory.key.shape[:2]
    keys, rows = memory.key.flatten(0, 1)[:, :end].contiguous(), end - start
    scores = torch.bmm(_take(memory.query, groups, start, end), keys.transpose(1, 2))
    shaped = scores.view(batch, groups, -1, rows, end)
    shaped[..., start:].add_(memory.later[:rows, :rows])
    if memory.documents is not None:
        other = memory.documents[:, start:end, None] != memory.documents[:, None, :end]
        shaped.masked_fill_(other[:, None, None], -torch.inf)
    return torch.softmax(scores, -1, out=scores)


def _take(x: Tensor, groups: int, start: int, end: int) -> Tensor:
    """Positions of [B, H, T, E], heads that share keys side by side: [B*J, H/J * (end - start), E]."""
    batch, heads, _, size = x.shape
    return x[:, :, start:end].reshape(batch * groups, heads // groups * (end - start), size)


def _put(x: Tensor, start: int, end: int, block: Tensor) -> None:
    """The reverse of `_take`: writes a block to its place in [B, H, T, E]."""
    x[:, :, start:end] = block.view(x.shape[0], x.shape[1], end - start, x.shape[3])
