"""Which kernels compute cross-entropy over the vocabulary, and why.

Decides `run.cross_entropy: auto`: our own chunks on every device. They add gradients up in fp32 and wait for nothing; whether Liger's
kernels are faster on a GPU has not been measured here (benchmarks/loss_functions.py and train_step.py measure both), so they are used by
the recipe's word only, where they can run at all. torch's own `linear_cross_entropy` is in the benchmarks and not in a recipe: in
bf16 it returns the sum in bf16, which is no loss that one could log (docs/performance.md). Losses against the target's
distribution, and validation, always go in our chunks.
"""

from __future__ import annotations

import torch

from fastdraft.errors import RecipeError
from fastdraft.functional.liger import liger_function
from fastdraft.training.objective import CrossEntropy

KEY = "run.cross_entropy"


def cross_entropy(asked: str, device: torch.device, z_loss: float = 0.0) -> CrossEntropy:
    """The objective that `run.cross_entropy` means on this device.

    Raises:
        RecipeError: for `liger` on a device that is not CUDA's.
        MissingExtra: for `liger` where it is not installed, or is too old.
    """
    if asked != "liger":
        return CrossEntropy(z_loss)
    if device.type != "cuda":
        remedy = f"leave {KEY} out, or set it to auto, or train on a CUDA device"
        raise RecipeError(
            KEY, f"liger on {device.type}", "its kernels are Triton's and need a CUDA device", remedy
        )
    liger_function()
    return CrossEntropy(z_loss, path="liger")
