"""Which proposals the target keeps, and which token it adds: the step that makes speculative decoding lossless.

Decides acceptance by Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318): a proposal x drawn from
draft_probs is kept with probability min(1, target_probs[x] / draft_probs[x]); the first one refused is replaced by a draw
from norm(max(0, target_probs - draft_probs)) (the recovered token), and after K acceptances one more token is drawn from
the target (the bonus token). What comes out is distributed exactly as the target's own text, whatever the draft.

Shape suffixes: K proposals, E = K + 1 positions of the target, V vocabulary. One sequence, no batch axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdraft.functional.sampling import draw, precise


def verify(
    target_probs_EV: Tensor, draft_probs_KV: Tensor, proposed_K: Tensor, generator: torch.Generator | None = None
) -> tuple[int, Tensor]:
    """The number of proposals kept, and the token after them.

    Args:
        target_probs_EV: The target's distribution at each proposal and after the last one; rows sum to 1.
        draft_probs_KV: The very distributions that the proposals were drawn from.
        proposed_K: The proposals.
        generator: The source of randomness, on the tensors' device.

    Returns:
        (num_accepted in 0..K, the recovered or bonus token as a tensor of shape [1])
    """
    index_K1 = proposed_K[:, None]
    target_K = target_probs_EV[:-1].gather(-1, index_K1).squeeze(-1)
    draft_K = draft_probs_KV.gather(-1, index_K1).squeeze(-1)
    device = proposed_K.device
    uniform_K = torch.rand(proposed_K.shape, dtype=precise(device), device=device, generator=generator)
    num_accepted = leading(uniform_K * draft_K < target_K)
    final_V = target_probs_EV[num_accepted]
    if num_accepted < len(proposed_K):
        final_V = recovery(final_V, draft_probs_KV[num_accepted])
    return num_accepted, draw(final_V[None], generator)


def verify_greedy(target_ids_E: Tensor, proposed_K: Tensor) -> tuple[int, Tensor]:
    """`verify` for temperature 0, where the target's distribution is one-hot at `target_ids_E`."""
    num_accepted = leading(proposed_K == target_ids_E[:-1])
    return num_accepted, target_ids_E[num_accepted : num_accepted + 1]


def recovery(target_probs_V: Tensor, draft_probs_V: Tensor) -> Tensor:
    """norm(max(0, target_probs - draft_probs)): the distribution of the token that replaces a refused proposal.

    Where rounding leaves nothing over (the two distributions are equal), a refusal has probability 0 and the target's own
    distribution is returned.
    """
    rest_V = (target_probs_V - draft_probs_V).clamp(min=0)
    total = rest_V.sum()
    return torch.where(total > 0, rest_V / total, target_probs_V)


def leading(accepted_K: Tensor) -> int:
    """How many entries are true before the first false one."""
    return int(accepted_K.long().cumprod(0).sum())
