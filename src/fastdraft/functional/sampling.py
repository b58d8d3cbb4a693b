"""From logits to the distribution that text is drawn from: temperature, then top-k, then top-p.

Target and draft go through these same functions, which is what makes speculative sampling and replay exact.
Everything is computed in float32. Shapes: B stands for any leading axes, V for the vocabulary.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def warp(logits_BV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits of the sampling distribution, float32, `temperature` above 0; removed tokens are -inf.

    `top_k` keeps the k largest, ties included, 0 all; `top_p` the smallest set of most likely tokens that
    holds at least this mass (Holtzman et al., 1904.09751), 1 all.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    warped_BV = logits_BV.float()
    if temperature != 1.0:
        warped_BV = warped_BV / temperature
    if 0 < top_k < warped_BV.shape[-1]:
        kth_B1 = warped_BV.topk(top_k, dim=-1).values[..., -1:]
        warped_BV = warped_BV.masked_fill(warped_BV < kth_B1, -torch.inf)
    if top_p < 1.0:
        ordered_BV, index_BV = warped_BV.sort(dim=-1, descending=True, stable=True)
        probs_BV = ordered_BV.softmax(-1)
        beyond_BV = probs_BV.cumsum(-1) - probs_BV >= top_p
        beyond_BV[..., 0] = False
        warped_BV = warped_BV.masked_fill(beyond_BV.scatter(-1, index_BV, beyond_BV), -torch.inf)
    return warped_BV


def likeliest(logits_BV: Tensor) -> Tensor:
    """The id of the largest logit, [B] int64, the first of equal ones."""
    # On one core and four rows of 152 k numpy takes 50 us and torch 1 ms; and its threads would spin beside
    # those of a runtime.
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:
        return torch.as_tensor(logits_BV.numpy().argmax(-1))
    return logits_BV.argmax(-1)


def probabilities(logits_BV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution that the next token is drawn from, float32; one-hot for temperature 0."""
    if temperature == 0:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.zeros_like(logits_BV, dtype=torch.float32).scatter_(-1, best_B1, 1.0)
    return warp(logits_BV, temperature, top_k, top_p).softmax(-1)


def mask_ids(logits_BV: Tensor, ids_M: Tensor | None) -> Tensor:
    """`logits_BV` with the given token ids at -inf, in place: a draft must not propose padding."""
    if ids_M is not None and ids_M.numel():
        logits_BV.index_fill_(-1, ids_M, -torch.inf)
    return logits_BV


@functools.cache
def precise(device: torch.device) -> torch.dtype:
    """The type in which probabilities are cumulated: in float32 rare tokens melt into their neighbours."""
    has_float64 = device.type != "mps"
    if device.type == "xpu":  # integrated and older Arc graphics have none
        has_float64 = bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))
    return torch.float64 if has_float64 else torch.float32


def token_at(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token under which a number in [0, 1) falls in the cumulated probabilities, shape B.

    Rows need not sum to 1; a token without probability is never given.
    """
    cumulated_BV = probs_BV.cumsum(-1, dtype=precise(probs_BV.device))
    total_B1 = cumulated_BV[..., -1:].contiguous()
    token_B1 = torch.searchsorted(cumulated_BV, uniform_B[..., None].to(total_B1) * total_B1, right=True)
    # Rounding may reach the total itself, behind which nothing has mass: the last token that has any stands
    # for it.
    token_B1 = torch.minimum(token_B1, torch.searchsorted(cumulated_BV, total_B1))
    return token_B1.clamp(max=probs_BV.shape[-1] - 1).squeeze(-1)


def draw(probs_BV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token id for each row, shape B: one random number a row, where `torch.multinomial` draws V."""
    device, shape = probs_BV.device, probs_BV.shape[:-1]
    uniform_B = torch.rand(shape, dtype=precise(device), device=device, generator=generator)
    return token_at(probs_BV, uniform_B)
