"""From last hidden states to logits, for every family.

Decides that whoever computes logits from hidden states goes through one place, because some families do more than one
product there: Gemma 2 caps its logits, Cohere multiplies and Granite divides them, and others add a bias.

Shape suffixes: N positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdraft.errors import TargetError
from fastdraft.modeling.families import text_config

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class OutputHead:
    """softcap * tanh((hidden @ weight^T + bias) * scale / softcap); a softcap of 0 caps nothing."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None = None
    """[V]."""
    scale: float = 1.0
    softcap: float = 0.0

    @property
    def vocab_size(self) -> int:
        """V, padding rows included."""
        return int(self.weight.shape[0])

    @property
    def is_plain(self) -> bool:
        """Whether logits are one matrix product and nothing else."""
        return self.bias is None and self.scale == 1.0 and self.softcap == 0.0

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V]; the product in the model's own type, as the model does it, the result in fp32."""
        return self.finish(hidden_ND @ self.weight.T).float()

    def finish(self, product_NV: Tensor) -> Tensor:
        """Logits [N, V] from hidden states times weight, in the product's type; the product itself where the head is plain."""
        logits_NV = product_NV
        if self.bias is not None:
            logits_NV = logits_NV + self.bias.to(logits_NV.dtype)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap:
            logits_NV = (logits_NV / self.softcap).tanh() * self.softcap
        return logits_NV


def output_head(model: PreTrainedModel) -> tuple[nn.Module, OutputHead]:
    """The decoder of the text part, whose output has `last_hidden_state` [batch, tokens, D], and the head behind it.

    Raises:
        TargetError: for a model without an output matrix.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise TargetError(
            type(model).__name__,
            "no output matrix",
            "a language model must have a head",
            "choose another target",
        )
    config: Any = text_config(model.config)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    return model.get_decoder(), OutputHead(head.weight, getattr(head, "bias", None), scale, softcap)


def split_head(model: PreTrainedModel) -> tuple[nn.Module, Tensor]:
    """The decoder and the head's weight [V, D] of a draft, for losses that never hold the logits of all tokens at once.

    Raises:
        TargetError: where the logits are more than one product, through which those losses make no gradient; no draft that
            FastDraft designs is of such a family, and a target's logits come from `output_head`.
    """
    decoder, head = output_head(model)
    if not head.is_plain:
        rule = "the head must be one matrix without bias, cap or scale"
        raise TargetError(
            type(model).__name__, "its logits are more than one product", rule, "design a new draft, which is"
        )
    return decoder, head.weight
