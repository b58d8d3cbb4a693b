"""AdamW for every weight, or Muon for the body's matrices beside AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

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

    Matrices of the body and an untied head decay; embeddings (tied ones too), gains and biases do not. Muon's
    steps are scaled to AdamW's root mean square (arXiv 2502.16982), so that one rate means the same for both.
    `embedding_learning_rate` is the peak of all other weights (None: the same); `low`: the step's products are in
    bf16, and so are Muon's, else Muon's are in the type of the weights.
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
    """Every trainable weight once: `embedding` (with a tied head), `head`, `body` (matrices), `vector`."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    groups: dict[str, list[nn.Parameter]] = {"embedding": [], "head": [], "body": [], "vector": []}
    for parameter in model.parameters():
        if parameter is embedding.weight:
            groups["embedding"].append(parameter)
        elif parameter is head.weight:
            groups["head"].append(parameter)
        elif parameter.requires_grad:
            groups["body" if parameter.ndim == 2 else "vector"].append(parameter)
    return groups


def set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Sets every group's rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group[PEAK] * factor


def _group(parameters: list[nn.Parameter], rate: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": rate, PEAK: rate, "weight_decay": weight_decay}


class Fp32Muon(torch.optim.Muon):
    """torch.optim.Muon with its Newton-Schulz iteration in the weights' type instead of bf16.

    A run in fp32 would get differences of bf16's size back from the last bit of a gradient, for example from
    sums that two processes add in another order.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            momentum, rate = group["momentum"], group["lr"]
            for parameter, gradient, mean in zip(parameters, gradients, momenta, strict=True):
                mean.lerp_(gradient, 1 - momentum)
                nesterov = gradient.lerp(mean, momentum)
                turned = _orthogonal(nesterov, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(turned, alpha=-0.2 * rate * math.sqrt(max(parameter.shape)))


def _orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The nearest orthogonal matrix, roughly, by Muon's quintic (kellerjordan.github.io/posts/muon)."""
    a, b, c = coefficients
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x
