"""`design:`, `pretrain:`, `continue_pretrain:` and `align:`: the draft's shape, and how it is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fastdraft.recipe.base import Config, Count


def kind_default(kind: str) -> Any:
    """Lets a section that gives only some keys leave `kind` out: `{decay: 0.2}` is a wsd schedule."""
    return lambda value: {"kind": kind, **value} if isinstance(value, dict) and "kind" not in value else value


class OptimizerConfig(Config):
    """`adamw` for every weight, or `muon` for the body's matrices and AdamW for all others."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw or muon."""
    learning_rate: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Peak rate (muon: of the matrices, in AdamW's scale); left out: by size (3e-3 at 1M parameters, 2e-3 at
    50M, 1.5e-3 at 150M; less for align)."""
    embedding_learning_rate: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """Peak rate of embeddings, head, gains and biases; left out: the same (muon: by the draft's size)."""
    weight_decay: float | None = Field(default=None, ge=0, lt=1, allow_inf_nan=False)
    """Never on embeddings, gains, biases; left out: 0.1 in pre-training, 0 in align."""


class CosineConfig(Config):
    """Warm-up, then half a cosine to zero."""

    kind: Literal["cosine"] = "cosine"
    warmup: float = Field(default=0.01, ge=0, lt=1)
    """Share of the steps."""


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


ScheduleConfig = Annotated[WSDConfig | CosineConfig, Field(discriminator="kind")]


class SequenceKDConfig(Config):
    """Cross-entropy on responses that the target wrote: the paper's alignment."""

    kind: Literal["sequence_kd"] = "sequence_kd"


TokenLossName = Literal["forward_kl", "reverse_kl", "jsd", "tvd", "ce_kl", "ce_tvd", "lk_hybrid", "lk_log"]


class TokenKDConfig(Config):
    """Distils the target's distribution at every token (functional/distillation.py)."""

    kind: Literal["token_kd"] = "token_kd"
    loss: TokenLossName = "forward_kl"
    """ce_kl: half cross-entropy, half KL; lk_hybrid: KL, then tvd; lk_log: -log of the acceptance."""
    source: Literal["target", "stored"] = "target"
    """target: loaded beside the draft, compared on the pre-training mixture too. stored: what
    `synthesize.logits` kept; the mixture's steps have cross-entropy."""


ObjectiveConfig = Annotated[SequenceKDConfig | TokenKDConfig, Field(discriminator="kind")]


class BudgetDraft(Config):
    """A shape found for a number of parameters, within 3 %; shallow ones are preferred."""

    kind: Literal["budget"] = "budget"
    parameters: Count = Field(gt=0)
    """All parameters, the vocabulary's matrices included."""
    layers: int | None = Field(default=None, ge=1, le=128)
    """Fixes the depth; null lets the search choose."""


class ShapeDraft(Config):
    """A shape given by numbers."""

    kind: Literal["shape"]
    hidden_size: int = Field(ge=2)
    """Width; multiples of 256 keep every quantisation open."""
    num_layers: int = Field(ge=1)
    """Depth: what latency depends on most."""
    intermediate_size: int = Field(ge=1)
    """Width of the feed-forward part."""
    num_heads: int | None = Field(default=None, ge=1)
    """null: heads 64 wide, narrower in small drafts."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """null: in the target's ratio to the heads."""
    tied: bool | None = None
    """Whether embedding and head share one matrix; null: when the target's do and the draft has under 14M."""


class PresetDraft(Config):
    """A published FastDraft shape, reconstructed from its file size."""

    kind: Literal["preset"]
    name: Literal["phi-3-mini-50m", "llama-3.1-8b-150m"]
    """52,107,776 parameters at Phi-3-mini's vocabulary, 154,147,328 at Llama-3.1's."""


class EarlierDraft(Config):
    """Starts from an earlier draft or a small sibling of the target, of its vocabulary: shape and weights.

    With `export` and `benchmark` alone behind it, the recipe measures a sibling as it is.
    """

    kind: Literal["from"]
    path: str = Field(min_length=1)
    """A Hugging Face directory, a GGUF file, or a stage's folder such as `runs/NAME/pretrain[/undecayed]`."""


class TrainedStart(Config):
    """What is taken of a trained model: chosen and fitted on rows of `prepare` (design then runs behind it)
    or of shipped text.
    """

    hidden_size: int | None = Field(default=None, ge=2)
    """null: the model's. Smaller: the main directions of its states; embedding and head are then two."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """null: the model's. Smaller: the neurons that add most."""
    num_heads: int | None = Field(default=None, ge=1)
    """null: the model's. Fewer: the heads that add most, in whole groups of one key-value head."""


class PrunedDraft(TrainedStart):
    """Starts from a few layers of a trained model, fitted to stand in for the others: far ahead of random
    weights.
    """

    kind: Literal["pruned"]
    model: str | None = Field(default=None, min_length=1)
    """A directory, hub id or GGUF file of the target's vocabulary, such as a sibling; null: the target."""
    layers: Annotated[int, Field(ge=2)] | list[int] | None = 4
    """How many (those between which the least is lost), or which ones, from 0; null: all."""


class TransplantDraft(TrainedStart):
    """Starts from a small trained model of another vocabulary: each token of the target has the rows of the
    pieces that spell it.
    """

    kind: Literal["transplant"]
    model: str = Field(min_length=1)
    """A directory, hub id or GGUF file."""
    layers: Annotated[int, Field(ge=2)] | list[int] | None = None
    """As for pruned; null: all."""


DraftConfig = Annotated[
    BudgetDraft | ShapeDraft | PresetDraft | EarlierDraft | PrunedDraft | TransplantDraft,
    Field(discriminator="kind"),
]


class FullVocabulary(Config):
    """The draft's head has every id."""

    kind: Literal["full"] = "full"


class FrequentVocabulary(Config):
    """A head of its own over the ids that the target writes most, special and EOS ids always among them;
    input embeddings stay whole. Counted over the answers of `synthesize` (nine tenths of the weight) and the
    corpora of `prepare`, whichever the recipe has: design then runs behind them.
    """

    kind: Literal["frequent"] = "frequent"
    size: Count | None = Field(default=None, gt=0)
    """Ids of the head; 8k to 16k is usual."""
    coverage: float | None = Field(default=None, gt=0, le=1)
    """Instead: the share of the text that they must write, such as 0.98."""

    @model_validator(mode="after")
    def _one_of_them(self) -> FrequentVocabulary:
        if (self.size is None) == (self.coverage is None):
            raise ValueError("must have either size or coverage")
        return self


VocabularyConfig = Annotated[FullVocabulary | FrequentVocabulary, Field(discriminator="kind")]


class DesignConfig(Config):
    """`design:` — the draft's shape and first weights."""

    draft: DraftConfig
    """budget, shape, preset, from, pruned or transplant."""
    initialization: Literal["random", "target_embeddings"] = "random"
    """target_embeddings projects the target's embedding and head to the draft's width."""
    vocabulary: Annotated[VocabularyConfig, BeforeValidator(kind_default("frequent"))] = FullVocabulary()
    """full, or frequent: a head over the ids that matter, which makes training and drafting cheaper. The
    budget of `draft` counts a whole head."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The stages whose rows it reads, and behind which it therefore runs, in their order."""
        if isinstance(self.vocabulary, FrequentVocabulary):
            return ("prepare", "synthesize")
        return ("prepare",) if isinstance(self.draft, TrainedStart) else ()

    @model_validator(mode="after")
    def _from_has_weights(self) -> DesignConfig:
        if isinstance(self.draft, EarlierDraft | TrainedStart) and self.initialization != "random":
            kind = self.draft.kind
            raise ValueError(
                f"initialization must be left out for kind: {kind}, which brings its own weights"
            )
        return self


class TrainingConfig(Config):
    """What every stage that trains has."""

    batch_tokens: Count | None = Field(default=None, gt=0)
    """Tokens of one optimiser step; left out: by size and budget (16k at 1M parameters, 262k at 50M, 524k at
    150M; align: 64k from 50M on)."""
    micro_batch_tokens: Count | None = Field(default=None, gt=0)
    """Tokens in the model at once: memory and speed, not the result. Left out: 8k on a CPU, else 32k."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """adamw or muon; best the same in all stages."""
    checkpoint_every: int | None = Field(default=None, ge=0)
    """Steps between resume checkpoints; 0: only at the end and on Ctrl-C. Left out: twenty times a run."""
    validate_every: int | None = Field(default=None, ge=0)
    """Steps between validations (align keeps the best); 0: only at the ends. Left out: ten times a run."""


class PretrainConfig(TrainingConfig):
    """`pretrain:` — next-token training on packed rows."""

    tokens: Count = Field(gt=0)
    """Budget; the paper: 5B of text, then 7.5B of code and text."""
    mixture: dict[str, float] = Field(default={"text": 1.0}, min_length=1)
    """Share of each prepared corpus, on any scale."""
    schedule: Annotated[ScheduleConfig, BeforeValidator(kind_default("wsd"))] = WSDConfig()
    """wsd keeps the weights from before the decay, from which continue_pretrain starts; or cosine."""

    @model_validator(mode="after")
    def _budget_holds_a_batch(self) -> PretrainConfig:
        if self.batch_tokens and self.tokens < self.batch_tokens:
            raise ValueError(f"tokens ({self.tokens}) must be at least one batch ({self.batch_tokens})")
        shares = self.mixture.values()
        if any(not 0 <= share < float("inf") for share in shares) or not any(shares):
            raise ValueError("mixture must have shares of 0 or more, one of them above 0")
        return self


class ContinuePretrainConfig(PretrainConfig):
    """`continue_pretrain:` — the same on a mixture with code, from pretrain's weights."""

    mixture: dict[str, float] = Field(default={"code": 2.0, "text": 1.0}, min_length=1)
    """Share of each prepared corpus; the paper: 2 parts code, 1 part text."""
    start: Literal["undecayed", "decayed"] = "undecayed"
    """pretrain's weights from before its rate fell, or its result (an open rate is then halved)."""


class AlignConfig(TrainingConfig):
    """`align:` — fine-tuning on the target's own text."""

    tokens: Count | None = Field(default=None, gt=0)
    """Budget in input tokens of synthetic text; left out: three passes over it."""
    pretraining_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of the steps from the pre-training mixture (or all corpora in equal parts): without them the
    draft forgets what the prompts do not cover. Left out: 0.1, or 0 without corpora."""
    objective: Annotated[ObjectiveConfig, BeforeValidator(kind_default("sequence_kd"))] = SequenceKDConfig()
    """sequence_kd: cross-entropy on the target's responses; token_kd: its distribution at each token."""
    schedule: Annotated[ScheduleConfig, BeforeValidator(kind_default("cosine"))] = CosineConfig(warmup=0.03)
    """cosine to zero, or wsd."""
