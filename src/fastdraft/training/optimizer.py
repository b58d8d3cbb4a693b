"""Which weights are updated by what: AdamW throughout, or Muon for the matrices of the body beside AdamW for the rest.

Decides the groups: matrices of the body and an untied head decay, embeddings (tied ones too), gains and biases do not; Muon
gets the body's matrices only, with steps scaled to AdamW's root mean square (arXiv 2502.16982) so that one rate means the same
for both. Each group remembers its peak rate, and `set_rate` scales all by the schedule's factor.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdraft.training.muon import Fp32Muon

PEAK = "peak_rate"
_FUSED_DEVICES = ("cpu", "cuda", "xpu")


def build_optimizers(
    model: nn.Module,
    *,
    kind: Literal["adamw", "muon"],
    learning_rate: float,
    embedding_learning_rate: float | None = None,
    weight_decay: float = 0.1,
    beta2: float = 0.95,
    low: bool = True,
) -> list[torch.optim.Optimizer]:
    """One optimiser (AdamW) or two (Muon, AdamW) over all weights of a Hugging Face causal language model.

    `learning_rate` is the peak of the body's matrices, `embedding_learning_rate` that of all other weights (None: the same);
    `weight_decay` is decoupled, per unit of rate; `beta2` is AdamW's; `low`: the step's products are in bf16, and so are
    Muon's own; else those are in the type of the weights.
    """
    groups = split_parameters(model)
    rest_rate = learning_rate if embedding_learning_rate is None else embedding_learning_rate
    plain = [
        _group(groups["head"], rest_rate, weight_decay),
        _group(groups["embedding"] + groups["vector"], rest_rate, 0.0),
    ]
    body = _group(groups["body"], learning_rate, weight_decay)
    optimizers: list[torch.optim.Optimizer] = []
    if kind == "muon":
        muon = torch.optim.Muon if low else Fp32Muon
        optimizers.append(
            muon([body], lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    else:
        plain.insert(0, body)
    plain = [group for group in plain if group["params"]]
    if plain:
        fused = plain[0]["params"][0].device.type in _FUSED_DEVICES
        optimizers.append(torch.optim.AdamW(plain, lr=learning_rate, betas=(0.9, beta2), fused=fused))
    return optimizers


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every trainable weight once: `embedding` (also the head when tied), `head`, `body` (matrices), `vector` (gains, biases)."""
    embedding = _weight(model, "get_input_embeddings")
    head = _weight(model, "get_output_embeddings")
    groups: dict[str, list[nn.Parameter]] = {"embedding": [], "head": [], "body": [], "vector": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        name = (
            "embedding"
            if parameter is embedding
            else "head"
            if parameter is head
            else "body"
            if parameter.ndim == 2
            else "vector"
        )
        groups[name].append(parameter)
    return groups


def set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Sets every group's rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group[PEAK] * factor


def _group(parameters: list[nn.Parameter], rate: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": rate, PEAK: rate, "weight_decay": weight_decay}


def _weight(model: nn.Module, getter: str) -> Tensor | None:
    layer = getattr(model, getter)() if hasattr(model, getter) else None
    return None if layer is None else layer.weight
