"""Muon with its iteration in the type of the step's products.

Decides one thing: torch.optim.Muon makes every step orthogonal in bf16, which is quick and as exact as a bf16 step needs; but a run in fp32
would get back differences of bf16's size from the last bit of a gradient, for example from sums that two processes add in another
order. Where products are in fp32, so is the iteration here; its state is that of torch.optim.Muon.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Fp32Muon(torch.optim.Muon):
    """torch.optim.Muon with Nesterov momentum and steps of AdamW's root mean square (arXiv 2502.16982), computed in the weights' type."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` as in every optimiser of torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            momentum, rate = group["momentum"], group["lr"]
            for parameter, gradient, mean in zip(parameters, gradients, momenta, strict=True):
                mean.lerp_(gradient, 1 - momentum)
                turned = orthogonal(
                    gradient.lerp(mean, momentum), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(turned, alpha=-0.2 * rate * math.sqrt(max(parameter.shape)))
        return loss


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The nearest orthogonal matrix, roughly: singular values of `matrix` [M, N] go to about 0.7 to 1.2 (a Newton-Schulz iteration).

    The quintic a x + b x^3 + c x^5 of Muon (K. Jordan, 2024, kellerjordan.github.io/posts/muon), all in the type of `matrix`.
    """
    a, b, c = coefficients
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x
