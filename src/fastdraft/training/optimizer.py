"""AdamW for every weight, or Muon for the body's matrices and AdamW for the rest; rates over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

PEAK = "peak_rate"


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
    `embedding_learning_rate` is the peak of all other weights (None: the same); `low`: Muon's products are in
    bf16, as the step's, else in the type of the weights.
    """

    def group(parameters: list[nn.Parameter], rate: float, decay: float) -> dict[str, Any]:
        return {"params": parameters, "lr": rate, PEAK: rate, "weight_decay": decay}

    parts = split_parameters(model)
    rest = learning_rate if embedding_learning_rate is None else embedding_learning_rate
    body, head = group(parts["body"], learning_rate, weight_decay), group(parts["head"], rest, weight_decay)
    groups = [head, group(parts["embedding"] + parts["vector"], rest, 0.0)]
    optimizers: list[torch.optim.Optimizer] = []
    if kind == "muon":
        muon, scale = torch.optim.Muon if low else Fp32Muon, "match_rms_adamw"
        optimizers = [muon([body], lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn=scale)]
    else:
        groups.insert(0, body)
    groups = [group for group in groups if group["params"]]
    fused = parts["embedding"][0].device.type in ("cpu", "cuda", "xpu")
    optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), fused=fused))
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


def warmup_steps(steps: int, warmup: float) -> int:
    """Steps of linear warm-up: the share `warmup` of all steps, rounded up."""
    return math.ceil(steps * warmup - 1e-9)


def decay_start(steps: int, decay: float) -> int:
    """Number of steps before the decay begins; the weights after that many steps are the un-decayed ones."""
    return steps - round(steps * decay)


def wsd_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Of a 0-based step: up linearly, 1, then down linearly; it would reach 0 one step after the last."""
    rising = warmup_steps(steps, warmup)
    start = decay_start(steps, decay)
    factor = min(1.0, (step + 1) / rising) if rising else 1.0
    return min(factor, (steps - step) / (steps - start + 1)) if step >= start else factor


def cosine_factor(step: int, steps: int, warmup: float) -> float:
    """Of a 0-based step: up linearly, then half a cosine from 1 down to 0."""
    rising = warmup_steps(steps, warmup)
    if step < rising:
        return (step + 1) / rising
    share = (step - rising + 1) / (steps - rising + 1)
    return 0.5 * (1 + math.cos(math.pi * share))
