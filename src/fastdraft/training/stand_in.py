"""What runs in a training step in the place of the draft's decoder.

Decides by device: on a CPU the layers written out (training/written_out.py), elsewhere the model's modules with flash attention
(training/flash.py), the decoder itself where neither knows it; compiled where that was asked for. No recipe, so that benchmarks take
the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastdraft.training.flash import flash
from fastdraft.training.written_out import write_out


def stand_in(
    decoder: nn.Module, device: torch.device, *, compiled: bool = False, backend: str = "inductor"
) -> Any:
    """Gives `.last_hidden_state` [B, T, D] for `input_ids`, `position_ids` and `use_cache`, as `decoder` does.

    `compiled`: torch.compile makes its kernels, with `backend`.
    """
    if device.type != "cpu":
        fast = flash(decoder, compiled=compiled, backend=backend)
        if fast is not None:
            return fast
    if compiled:
        return torch.compile(decoder, backend=backend)
    return (write_out(decoder) if device.type == "cpu" else None) or decoder
