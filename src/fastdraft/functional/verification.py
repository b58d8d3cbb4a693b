"""Which proposals the target keeps, and which token it adds: what makes speculative decoding lossless.

Leviathan et al. (arXiv 2211.17192), Chen et al. (arXiv 2302.01318): a proposal x is kept with probability
min(1, target_probs[x] / draft_probs[x]); the first refused is replaced by a draw from `recovery`. One
sequence, no batch axis. Shape suffixes: K proposals, E = K + 1 positions of the target, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdraft.functional.sampling import draw, precise


def verify(
    target_probs_EV: Tensor,
    draft_probs_KV: Tensor,
    proposed_K: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """num_accepted in 0..K, int64 without axes, and ids, [E], whose first num_accepted + 1 are written: those
    proposals and the recovered or bonus token. Without a wait.

    The target's distributions stand at each proposal and after the last one; the draft's are those that the
    proposals, at least one, were drawn from. `generator` lives on the tensors' device.
    """
    index_K1, num_proposed = proposed_K[:, None], len(proposed_K)
    target_K = target_probs_EV[:-1].gather(-1, index_K1).squeeze(-1)
    draft_K = draft_probs_KV.gather(-1, index_K1).squeeze(-1)
    device = proposed_K.device
    uniform_K = torch.rand(proposed_K.shape, dtype=precise(device), device=device, generator=generator)
    num_accepted = leading(uniform_K * draft_K < target_K)
    target_1V = target_probs_EV.index_select(0, num_accepted[None])
    draft_1V = draft_probs_KV.index_select(0, num_accepted[None].clamp(max=num_proposed - 1))
    final_1V = torch.where(num_accepted < num_proposed, recovery(target_1V, draft_1V), target_1V)
    final_1 = draw(final_1V, generator)
    return num_accepted, torch.cat([proposed_K, final_1]).scatter_(0, num_accepted[None], final_1)


def verify_certain(target_ids_E: Tensor, proposed_K: Tensor) -> tuple[Tensor, Tensor]:
    """`verify` for proposals that were not drawn, any number of them, none too: those of a greedy draft, of
    lookup.

    `target_ids_E` were drawn from the target's distributions at the same places; greedy, they are the
    likeliest. Draft probabilities that are one-hot at x ask for an acceptance with probability
    target_probs[x], and else for a token from the rest of target_probs, renormalised: just what drawing the
    target's token and comparing it with x does.
    """
    return leading(proposed_K == target_ids_E[:-1]), target_ids_E


def recovery(target_probs_V: Tensor, draft_probs_V: Tensor) -> Tensor:
    """norm(max(0, target_probs - draft_probs)): the distribution of what replaces a refused proposal.

    Where the two are equal nothing is left over, and a refusal has probability 0: the target's own stands for
    it.
    """
    rest_V = (target_probs_V - draft_probs_V).clamp(min=0)
    total = rest_V.sum()
    return torch.where(total > 0, rest_V / total, target_probs_V)


def leading(accepted_K: Tensor) -> Tensor:
    """How many entries are true before the first false one: int64, no axes."""
    return accepted_K.cumprod(0).sum()
