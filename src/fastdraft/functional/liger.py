"""Cross-entropy by Liger's fused kernels (arXiv 2410.10989, section 3.2), in place of our chunks: the one importer of liger-kernel.

Decides how they are called, so that value and gradients are those of `chunked_cross_entropy`: hidden states and head in the type of the
products, sums in fp32, a sum over tokens and no mean, the same ignored label, the same z-loss. Two things differ. The head's gradient is
rounded to the type of the products once a call, which ours never is. And the kernels read the number of trained tokens back to the host
in every call, so that a micro-batch waits for the device; ours does not.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from fastdraft.errors import MissingExtra
from fastdraft.functional.losses import IGNORE_INDEX, compute_dtypes

LIBRARY, EXTRA = "liger-kernel", "liger"


def liger_function() -> Callable[..., Tensor]:
    """`liger_kernel.transformers.functional.liger_fused_linear_cross_entropy`.

    Raises:
        MissingExtra: when liger-kernel is not installed, or is older than 0.6.2, which could not yet add gradients up in fp32.
    """
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        raise MissingExtra(LIBRARY, EXTRA) from None
    function: Callable[..., Tensor] = liger_fused_linear_cross_entropy
    if "accum_dtype" not in inspect.signature(function).parameters:
        raise MissingExtra(f"{LIBRARY} 0.6.2 or newer", EXTRA)
    return function


def liger_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum over tokens of `-log softmax(hidden @ head^T)[label] + z_loss * logsumexp^2`, on a device that Triton has kernels for.

    Args:
        hidden_ND: last hidden states, float [N, D].
        head_VD: weight of the output head without bias, float [V, D].
        labels_N: the wanted next token of each row, int64 [N]; `ignore_index` takes a row out of the loss.
        ignore_index: label of rows without a loss.
        z_loss: weight of the squared log-partition, 0 to leave it out.

    Returns:
        The sum in nats: scalar, fp32, differentiable once by hidden and head.

    Raises:
        MissingExtra: when liger-kernel is not there.
    """
    function, (compute, _) = liger_function(), compute_dtypes(hidden_ND)
    with torch.autocast(hidden_ND.device.type, enabled=False):  # it knows no autocast for the head's gradient
        total = function(
            hidden_ND.to(compute),
            head_VD.to(compute),
            labels_N,
            ignore_index=ignore_index,
            lse_square_scale=z_loss,
            reduction="sum",
            accum_dtype=torch.float32,
        )
    return total.float()
