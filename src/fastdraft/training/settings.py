"""The recipe keys that every training stage shares: optimiser, schedule, objective.

Decides names and limits; what each means is in training/optimizer.py, schedule.py and objective.py. Imports no torch, so that a
recipe loads quickly.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastdraft.config import Config

Precision = Literal["auto", "bf16", "fp32"]


class AdamWConfig(Config):
    """AdamW for every weight."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Peak rate; left out: by the draft's size (training/rates.py: 3e-3 at 1M parameters, 2e-3 at 50M, 1.5e-3 at 150M; less for align)."""
    embedding_learning_rate: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Peak rate of embeddings, head, gains and biases; left out: the same."""
    weight_decay: float | None = Field(default=None, ge=0, lt=1, allow_inf_nan=False)
    """Never on embeddings, gains, biases; left out: 0.1 in pre-training, 0 in align."""
    beta2: float | None = Field(default=None, gt=0, lt=1, allow_inf_nan=False)
    """Memory of squared gradients; left out: 0.99 for batches under 524k tokens, else 0.95 (small batches are noisier)."""


class MuonConfig(Config):
    """Muon for the body's matrices, AdamW for embeddings, head, gains and biases."""

    kind: Literal["muon"] = "muon"
    learning_rate: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Peak rate of the matrices, in AdamW's scale; left out: by the draft's size."""
    embedding_learning_rate: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Peak rate of the AdamW part; left out: by the draft's size."""
    weight_decay: float | None = Field(default=None, ge=0, lt=1, allow_inf_nan=False)
    """Never on embeddings, gains, biases; left out: 0.1 in pre-training, 0 in align."""
    beta2: float | None = Field(default=None, gt=0, lt=1, allow_inf_nan=False)
    """Of the AdamW part; left out: by the batch size, as for adamw."""


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]


class WSDConfig(Config):
    """Warm-up, constant, linear to zero; the weights before the decay are kept for continued training."""

    kind: Literal["wsd"] = "wsd"
    warmup: float = Field(default=0.01, ge=0, lt=1)
    """Share of the steps."""
    decay: float = Field(default=0.25, ge=0, le=1)
    """Share of the steps; 0.2 to 0.3 is usual."""

    @model_validator(mode="after")
    def _fits(self) -> WSDConfig:
        if self.warmup + self.decay > 1:
            raise ValueError("warmup and decay together must be at most 1")
        return self


class CosineConfig(Config):
    """Warm-up, then half a cosine."""

    kind: Literal["cosine"] = "cosine"
    warmup: float = Field(default=0.01, ge=0, lt=1)
    """Share of the steps."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Rate at the end as a share of the peak."""


ScheduleConfig = Annotated[WSDConfig | CosineConfig, Field(discriminator="kind")]


class SequenceKDConfig(Config):
    """Cross-entropy on responses that the target wrote: the paper's alignment."""

    kind: Literal["sequence_kd"] = "sequence_kd"


TokenLossName = Literal["forward_kl", "reverse_kl", "jsd", "tvd", "ce_kl", "ce_tvd", "lk_hybrid", "lk_log"]


class TokenKDConfig(Config):
    """Distils the target's distribution at every token, not only the token that it chose (functional/distillation.py)."""

    kind: Literal["token_kd"] = "token_kd"
    loss: TokenLossName = "forward_kl"
    """forward_kl, reverse_kl, jsd, tvd, ce_kl (half cross-entropy, half KL), ce_tvd, lk_hybrid (KL, then tvd) or lk_log (-log of the
    chance of acceptance)."""
    source: Literal["target", "stored"] = "target"
    """target: loaded beside the draft, all tokens compared, on the pre-training mixture too. stored: what `synthesize.logits` kept; the
    mixture's steps have cross-entropy."""
    beta: float | None = Field(default=None, gt=0, lt=1)
    """Of jsd: the target's weight in the mean of both distributions; left out: 0.5."""

    @model_validator(mode="after")
    def _beta_belongs_to_jsd(self) -> TokenKDConfig:
        if self.beta is not None and self.loss != "jsd":
            raise ValueError("beta belongs to loss: jsd; leave it out")
        return self


ObjectiveConfig = Annotated[SequenceKDConfig | TokenKDConfig, Field(discriminator="kind")]


def kind_default(kind: str) -> Any:
    """Lets a section that gives only some keys leave `kind` out: `{learning_rate: 1e-3}` is an AdamW."""
    return lambda value: {"kind": kind, **value} if isinstance(value, dict) and "kind" not in value else value
