"""From logits to the distribution that text is drawn from: temperature, then top-k, then top-p (the order of transformers, vLLM, OpenVINO).

Target and draft go through these same functions, which is what makes speculative sampling and replay exact. Everything is
computed in float32. Shapes: B stands for any leading axes, V for the vocabulary.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def warp(logits_BV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits of the sampling distribution, float32; removed tokens are -inf.

    Args:
        logits_BV: Raw logits, any float type.
        temperature: Divides the logits; must be above 0.
        top_k: Keeps the k largest, ties included; 0 keeps all.
        top_p: Keeps the smallest set of most likely tokens that holds at least this mass (Holtzman et al., 1904.09751); 1 keeps all.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0; greedy has no logits to warp")
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


def probabilities(logits_BV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution that the next token is drawn from, float32, shape of `logits_BV`; one-hot at the argmax for temperature 0."""
    if temperature == 0:
        return torch.zeros_like(logits_BV, dtype=torch.float32).scatter_(
            -1, logits_BV.argmax(-1, keepdim=True), 1.0
        )
    return warp(logits_BV, temperature, top_k, top_p).softmax(-1)


def mask_ids(logits_BV: Tensor, ids_M: Tensor | None) -> Tensor:
    """`logits_BV` with the given token ids at -inf, in place; the same tensor when there are none.

    A draft must never propose an id that the tokenizer does not have (the padding of a rounded-up vocabulary).
    """
    if ids_M is not None and ids_M.numel():
        logits_BV.index_fill_(-1, ids_M, -torch.inf)
    return logits_BV


def precise(device: torch.device) -> torch.dtype:
    """The type in which probabilities are cumulated: in float32 the rare tokens of a large vocabulary would melt into their neighbours."""
    return torch.float64 if _has_float64(device) else torch.float32


@functools.cache
def _has_float64(device: torch.device) -> bool:
    if device.type == "xpu":  # integrated and older Arc graphics have none
        return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))
    return device.type != "mps"


def token_at(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token under which a number in [0, 1) falls in the cumulated probabilities (inverse transform sampling), shape B.

    Rows need not sum to 1; a token without probability is never given.
    """
    cumulated_BV = probs_BV.cumsum(-1, dtype=precise(probs_BV.device))
    total_B1 = cumulated_BV[..., -1:].contiguous()
    token_B1 = torch.searchsorted(cumulated_BV, uniform_B[..., None].to(total_B1) * total_B1, right=True)
    # Rounding may reach the total itself, behind which nothing has mass: the last token that has any stands for it.
    return (
        torch.minimum(token_B1, torch.searchsorted(cumulated_BV, total_B1))
        .clamp(max=probs_BV.shape[-1] - 1)
        .squeeze(-1)
    )


def draw(probs_BV: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token id for each row, shape B: one random number a row, where `torch.multinomial` draws one for every token."""
    device = probs_BV.device
    return token_at(
        probs_BV, torch.rand(probs_BV.shape[:-1], dtype=precise(device), device=device, generator=generator)
    )
