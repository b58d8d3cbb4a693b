"""From last hidden states to logits, for every family: whoever computes logits from hidden states goes
through here.

Gemma 2 caps its logits, Cohere multiplies and Granite divides them, and others add a bias. Shape suffixes: N
positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdraft.errors import TargetError
from fastdraft.modeling.families import text_config
from fastdraft.modeling.trimmed_head import TrimmedHead, widen


@dataclass(frozen=True)
class OutputHead:
    """softcap * tanh((hidden @ weight^T + bias) * scale / softcap); a softcap of 0 caps nothing."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float = 0.0
    rows: Tensor | None = None  # [V] of a trimmed head, whose weight is [K, D]: the row of each id, else K

    @property
    def vocab_size(self) -> int:
        """V, padding rows included."""
        return len(self.weight if self.rows is None else self.rows)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V]; the product in the model's own type, as the model does it, the result in fp32."""
        logits = self.finish(hidden_ND @ self.weight.T)
        return (logits if self.rows is None else widen(logits, self.rows)).float()

    def finish(self, product_NV: Tensor) -> Tensor:
        """Logits [N, V] from hidden states times weight, in the product's type."""
        logits_NV = product_NV
        if self.bias is not None:
            logits_NV = logits_NV + self.bias.to(logits_NV.dtype)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap:
            logits_NV = (logits_NV / self.softcap).tanh() * self.softcap
        return logits_NV


def output_head(model: PreTrainedModel) -> tuple[nn.Module, OutputHead]:
    """The text part's decoder, which gives `last_hidden_state` [batch, tokens, D], and the head behind it."""
    head: Any = model.get_output_embeddings()
    config: Any = text_config(model.config)
    multiplied, divided = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    scale = float(multiplied or 1.0) / float(divided or 1.0)
    rows = head.rows if isinstance(head, TrimmedHead) else None
    return model.get_decoder(), OutputHead(head.weight, getattr(head, "bias", None), scale, softcap, rows)


def split_head(model: PreTrainedModel) -> tuple[nn.Module, Tensor]:
    """The decoder and the head's weight [V, D] (trimmed [K, D]) of a draft, for losses that never hold all
    logits at once.
    """
    decoder, head = output_head(model)
    # Those losses make no gradient through a bias, cap or scale, and no designed draft has one.
    if head.bias is not None or head.scale != 1.0 or head.softcap:
        rule = "its logits are more than one product; a draft's head must be one matrix"
        raise TargetError(f"{type(model).__name__}: {rule}", "design a new draft")
    return decoder, head.weight
