"""Token-level distillation: losses between the target's distribution of the next token and the draft's.

Written t for target_probs, d for draft_probs, sums over tokens or buckets; overlap = sum min(t, d), the
chance that speculative sampling accepts the draft's proposal; CE = -log d[label]:
    forward_kl  sum t log(t/d)                                            Hinton et al. 1503.02531
    reverse_kl  sum d log(d/t)                                            MiniLLM 2306.08543
    jsd         beta KL(t|m) + (1-beta) KL(d|m), m = beta t + (1-beta) d  GKD 2306.13649
    tvd         1/2 sum |t - d| = 1 - overlap                             DistillSpec 2310.08461
    ce_kl       1/2 CE + 1/2 forward_kl                                   FastDraft 2411.11055 compares both
    ce_tvd      1/2 CE + 1/2 tvd
    lk_hybrid   l forward_kl + (1-l) tvd, l = exp(-3 overlap) held fixed  LK losses 2602.23881
    lk_log      -log overlap                                              LK losses 2602.23881

Shapes: N tokens, D hidden, V vocabulary, K kept tokens, B buckets (V, or K + 1 with the tail last), C a
chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fastdraft.functional.losses import IGNORE_INDEX, chunked_loss, default_chunk

# Both distributions are at temperature 1 and neither is masked: a padding id has the probability that the
# model gives it. A target known by its k most likely tokens is compared bucket by bucket, those k and one
# tail for all others, in both: every loss but the cross-entropy is then a lower bound of the dense one.

# Log-probs of the target and of the draft, each [..., B] -> nats (or probability) [...]
Divergence = Callable[[Tensor, Tensor], Tensor]

LK_ETA = 3.0  # how fast lk_hybrid moves from KL to TVD as the overlap grows: the paper's best
# About four times as many tensors of a chunk's size stand at once as in cross-entropy: a quarter of its rows.
CHUNK_SHARE, CHUNK_ROWS = 4, 256  # at least so many
NO_ROW = -1  # label of rows whose token is outside of a trimmed head: no cross-entropy
LOG_FLOOR = -1e4  # stands for log 0 where a bucket is empty, so that 0 * log 0 is 0


def forward_kl(target_logp: Tensor, draft_logp: Tensor) -> Tensor:
    """KL(t|d): the draft must cover all that the target may say."""
    return (target_logp.exp() * (target_logp - draft_logp)).sum(-1)


def reverse_kl(target_logp: Tensor, draft_logp: Tensor) -> Tensor:
    """KL(d|t) = sum d log(d/t): the draft must not say what the target would not."""
    return (draft_logp.exp() * (draft_logp - target_logp)).sum(-1)


def jsd(target_logp: Tensor, draft_logp: Tensor, beta: float = 0.5) -> Tensor:
    """Jensen-Shannon: beta KL(t|m) + (1-beta) KL(d|m), m = beta t + (1-beta) d, 0 < beta < 1.

    Divided by beta it tends to forward KL for beta -> 0, divided by 1 - beta to reverse KL for beta -> 1.
    """
    middle_logp = torch.logaddexp(target_logp + math.log(beta), draft_logp + math.log1p(-beta))
    return beta * forward_kl(target_logp, middle_logp) + (1 - beta) * forward_kl(draft_logp, middle_logp)


def log_overlap(target_logp: Tensor, draft_logp: Tensor) -> Tensor:
    """The log of sum min(t, d), the chance of acceptance (Leviathan et al., arXiv 2211.17192)."""
    return torch.minimum(target_logp, draft_logp).logsumexp(-1)


def tvd(target_logp: Tensor, draft_logp: Tensor) -> Tensor:
    """1/2 sum |t - d| = 1 - overlap; bounded gradients, which vanish for a draft that is far off."""
    return 1 - torch.minimum(target_logp, draft_logp).exp().sum(-1)


def lk_hybrid(target_logp: Tensor, draft_logp: Tensor) -> Tensor:
    """L KL(t|d) + (1-l) TVD, l = exp(-3 overlap) of each token by itself, without gradient."""
    weight = (-LK_ETA * log_overlap(target_logp, draft_logp).detach().exp()).exp()
    # Of a target of which some mass is missed the KL is that of the rest, weighted by its mass.
    kl: Tensor = forward_kl(target_logp, draft_logp) + torch.special.entr(target_logp.exp().sum(-1))
    return weight * kl + (1 - weight) * tvd(target_logp, draft_logp)


def lk_log(target_logp: Tensor, draft_logp: Tensor) -> Tensor:
    """-log sum min(t, d): TVD's gradient divided by the overlap, so that it does not vanish."""
    return -log_overlap(target_logp, draft_logp)


@dataclass(frozen=True)
class TokenLoss:
    """`weight` * divergence + `ce_weight` * cross-entropy of the label, for each token."""

    divergence: Divergence
    weight: float = 1.0
    ce_weight: float = 0.0
    # Whether with a trimmed head the target is taken given that head's ids, weighted by their mass: KL to a
    # draft that cannot say what the target says has no bound. Where the overlap counts, the rest is missed.
    given_head: bool = True


def token_loss(name: str, beta: float = 0.5) -> TokenLoss:
    """The loss of that name in the list above; only jsd has a `beta`."""
    losses = {
        "forward_kl": TokenLoss(forward_kl),
        "reverse_kl": TokenLoss(reverse_kl),
        "jsd": TokenLoss(partial(jsd, beta=beta)),
        "tvd": TokenLoss(tvd, given_head=False),
        "ce_kl": TokenLoss(forward_kl, 0.5, 0.5),
        "ce_tvd": TokenLoss(tvd, 0.5, 0.5, given_head=False),
        "lk_hybrid": TokenLoss(lk_hybrid, given_head=False),
        "lk_log": TokenLoss(lk_log, given_head=False),
    }
    return losses[name]


@dataclass(frozen=True)
class DenseTarget:
    """The target's distribution over all tokens, made when a chunk asks for it."""

    logits: Callable[[slice], Tensor]  # raw logits [C, V] of some rows
    ids: Tensor | None = None  # [K] of the draft's trimmed head; None: it has all
    vocab_size: int = 0  # V, where there are `ids`


@dataclass(frozen=True)
class SparseTarget:
    """The target's distribution over its K most likely tokens and one tail."""

    ids: Tensor  # integers [N, K]; no id twice in a row
    logprobs: Tensor  # [N, K + 1], at temperature 1, the tail's mass last
    trimmed: bool = False  # `ids` are rows of a trimmed head, and their number those that it lacks

    def normalized(self) -> SparseTarget:
        """The same with rows that add to 1 exactly: what was stored in 16 bits is a little off."""
        return replace(self, logprobs=self.logprobs.log_softmax(-1))


TargetDistribution = DenseTarget | SparseTarget


def top_k_buckets(logits_NV: Tensor, k: int) -> SparseTarget:
    """The K most likely tokens, best first, with their log-probs and the log of the mass of all others."""
    values_NK, ids_NK = logits_NV.topk(k, dim=-1)
    # By hand and in place: with logsumexp and its copies it took two and a half times the processor time.
    best_N1 = values_NK[:, :1]
    rest_NV = (logits_NV - best_N1).scatter_(1, ids_NK, -torch.inf).exp_()
    rest_N1 = rest_NV.sum(-1, keepdim=True).log().clamp(min=LOG_FLOOR)
    buckets = torch.cat([values_NK - best_N1, rest_N1], dim=1)
    return SparseTarget(ids_NK, (buckets - buckets.logsumexp(-1, keepdim=True)).clamp(min=LOG_FLOOR))


def _bucketed(logits_NV: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs by bucket [N, K+1], of all tokens [N, V], of each given the tail [N, V] (-inf outside)."""
    lse_N1 = logits_NV.logsumexp(-1, keepdim=True)
    logp_NV = logits_NV - lse_N1
    rest_NV = logits_NV.scatter(1, ids_NK, -torch.inf)
    # A tail without tokens has no mass; a finite float keeps the subtraction below from being NaN.
    rest_N1 = rest_NV.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(rest_NV.dtype).min / 2)
    tail_N1 = (rest_N1 - lse_N1).clamp(min=LOG_FLOOR)
    kept_NK = logp_NV.gather(1, ids_NK).clamp(min=LOG_FLOOR)
    return torch.cat([kept_NK, tail_N1], dim=1), logp_NV, rest_NV.sub_(rest_N1)


def chunked_distillation(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    target: TargetDistribution,
    loss: TokenLoss,
    *,
    chunk: int = 0,
) -> Tensor:
    """Sum over tokens of `loss` between the target's distribution at these rows and softmax(hidden @ head^T).

    Types, `IGNORE_INDEX` among `labels_N` and `chunk` are as in `chunked_cross_entropy`; with a trimmed head
    labels are its rows, or `NO_ROW`.
    """
    widest = max(len(head_VD), target.vocab_size if isinstance(target, DenseTarget) else 0)
    chunk = chunk or max(CHUNK_ROWS, default_chunk(hidden_ND.device.type, widest) // CHUNK_SHARE)
    return chunked_loss(hidden_ND, head_VD, partial(_chunk_loss, labels_N, target, loss), chunk)


def _chunk_loss(
    labels_N: Tensor, target: TargetDistribution, loss: TokenLoss, logits_CV: Tensor, rows: slice, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of a chunk and its gradient by the logits.

    With h = d loss / d log-probs, the chain rule through the softmax gives h - d sum(h); a bucket's h goes to
    its tokens in proportion to their probability given the bucket.
    """
    labels_C, wide, size = labels_N[rows], logits_CV.dtype, logits_CV.shape[1]
    labelled_C, weight_C = labels_C >= 0, loss.weight * (labels_C != IGNORE_INDEX).to(wide)
    safe_C1 = labels_C.clamp(min=0)[:, None]
    if isinstance(target, SparseTarget):
        ids_CK, target_CB = target.ids[rows].long(), target.logprobs[rows].to(wide)
        trimmed = target.trimmed
        if (
            trimmed
        ):  # the ids that its head lacks are empty buckets in both; of the tail all counts as its own
            logits_CV = functional.pad(logits_CV, (0, 1), value=-torch.inf)
            target_CB = target_CB.masked_fill(functional.pad(ids_CK == size, (0, 1)), LOG_FLOOR)
        draft_CB, logp_CV, rest_CV = _bucketed(logits_CV, ids_CK)
    else:
        target_CB, trimmed = target.logits(rows).to(wide).log_softmax(-1), target.ids is not None
        if target.ids is not None:
            target_CB = target_CB.index_select(1, target.ids)
        draft_CB = logp_CV = logits_CV.log_softmax(-1)
    if trimmed and loss.given_head:
        mass_C1 = target_CB.logsumexp(-1, keepdim=True)
        target_CB, weight_C = target_CB - mass_C1, weight_C * mass_C1[:, 0].exp()
    total, h_CB = _divergence(loss.divergence, target_CB, draft_CB, weight_C, grad)
    ce_C = loss.ce_weight * labelled_C.to(wide)
    total = total - (ce_C * logp_CV.gather(1, safe_C1)[:, 0]).where(labelled_C, 0).sum()
    if h_CB is None:
        return total, None
    grad_CV = logp_CV.exp().mul_((ce_C - h_CB.sum(-1))[:, None])
    if isinstance(target, SparseTarget):
        grad_CV.addcmul_(rest_CV.exp_(), h_CB[:, -1:]).scatter_add_(1, ids_CK, h_CB[:, :-1])
    else:
        grad_CV += h_CB
    return total, grad_CV.scatter_add_(1, safe_C1, -ce_C[:, None])[:, :size]


def _divergence(
    divergence: Divergence, target_CB: Tensor, draft_CB: Tensor, weight_C: Tensor, grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Weighted sum over rows and its gradient by the draft's log-probs; rows of weight 0 have none."""
    with torch.set_grad_enabled(grad):
        leaf_CB = draft_CB.detach().requires_grad_(grad)
        total = (weight_C * divergence(target_CB, leaf_CB)).where(weight_C != 0, 0).sum()
    if not grad:
        return total, None
    (h_CB,) = torch.autograd.grad(total, leaf_CB)
    return total.detach(), h_CB.where(weight_C[:, None] != 0, 0)
