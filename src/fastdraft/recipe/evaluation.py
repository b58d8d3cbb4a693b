"""Where the target's texts come from, over which an evaluation replays drafts.

Decides the kinds: the target writes them here, the engine of synthesize writes them, held-out rows of synthesize, logs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from fastdraft.data.openai_format import LogprobKind
from fastdraft.data.transcript_lines import TranscriptLog
from fastdraft.recipe.base import Config, distinct
from fastdraft.tasks import ShippedTask, TaskConfig, refuse_equal_names


class TargetTexts(Config):
    """The target answers the tasks here, with its weights; only then are there exact runs and latencies."""

    kind: Literal["target"] = "target"
    """By transformers, in this process."""


class EngineTexts(Config):
    """`synthesize.engine` answers the tasks, so that a served target needs no weights here."""

    kind: Literal["engine"]
    """The engine that wrote the training rows."""


class HeldOutTexts(Config):
    """The held-out rows of synthesize; every source of prompts is a task, every temperature that it has counts."""

    kind: Literal["synthesize"]
    """Nothing is asked: the target's weights are not needed."""
    logprobs: Literal["own", "target"] = "own"
    """own: as they were written; target: those of target.model's weights, by a scoring pass."""


class LoggedTexts(TranscriptLog):
    """Logs of the target as a task; prompts that the draft was trained on are left out."""

    logprobs: LogprobKind | Literal["target"] = "none"  # type: ignore[assignment]
    """What the logged log-probs are of; target: take those of target.model's weights instead, by a scoring pass."""


TextsConfig = Annotated[TargetTexts | EngineTexts | HeldOutTexts | LoggedTexts, Field(discriminator="kind")]


def bare_kind(value: object) -> object:
    """`texts: synthesize` for `texts: {kind: synthesize}`."""
    return {"kind": value} if isinstance(value, str) else value


Checkpoint = Literal["design", "pretrain", "continue_pretrain", "align"]


class ExactConfig(Config):
    """Real speculative decoding, beside replay: slower, and proof that both agree and that greedy text is the target's own."""

    num_speculative_tokens: list[int] = Field(default=[3], min_length=1)
    """K of the exact runs."""
    prompts: int = Field(default=16, ge=0)
    """Prompts of each task and temperature, from the front; 0 leaves exact runs out."""

    @field_validator("num_speculative_tokens")
    @classmethod
    def _checked(cls, values: list[int]) -> list[int]:
        return distinct(values, 1, 64, "num_speculative_tokens must be between 1 and 64")


class EvaluateConfig(Config):
    """`evaluate:` — on what, and how, drafts are compared."""

    tasks: list[TaskConfig] = Field(default=[])
    """Shipped tasks by kind (code, summarization, text, instructions) or `kind: file`; needed unless `texts` stand already."""
    texts: Annotated[TextsConfig, BeforeValidator(bare_kind)] = TargetTexts()
    """Where the target's texts come from, over which drafts are replayed: the target itself, its servers, held-out rows, logs."""
    temperatures: list[float] = Field(default=[0.0, 0.6], min_length=1)
    """At which the target answers the tasks; 0 is greedy."""
    num_speculative_tokens: list[int] = Field(default=[1, 2, 3, 4, 5, 6, 7, 8], min_length=1)
    """Every K that replay covers: one pass of the draft serves them all."""
    checkpoints: list[Checkpoint] = Field(default=["pretrain", "continue_pretrain", "align"], min_length=1)
    """Which drafts of this run; those whose stage is not in the recipe are left out (design: the draft as it began)."""
    exact: ExactConfig = ExactConfig()
    """Exact runs of the last checkpoint."""
    top_k: int = Field(default=0, ge=0)
    """Of target and draft; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of target and draft; 1 keeps all."""
    draft_temperature: float | None = Field(default=None, ge=0, le=10)
    """The draft's own temperature where the target samples; any value is lossless; null: the target's."""
    draft_sampling: Literal["sampled", "greedy"] = "sampled"
    """greedy: the draft proposes its likeliest token even where the target samples, as vLLM does by default."""
    batch_rows: int = Field(default=64, ge=1, le=65_536)
    """Prompts that the target answers together."""

    @field_validator("temperatures")
    @classmethod
    def _temperatures(cls, values: list[float]) -> list[float]:
        return distinct(values, 0, 10, "temperatures must be between 0 and 10")

    @field_validator("num_speculative_tokens")
    @classmethod
    def _every_k(cls, values: list[int]) -> list[int]:
        return distinct(values, 1, 64, "num_speculative_tokens must be between 1 and 64")

    @field_validator("tasks")
    @classmethod
    def _names(cls, tasks: list[Any]) -> list[Any]:
        refuse_equal_names(tasks)
        return tasks

    @model_validator(mode="after")
    def _something_to_do(self) -> EvaluateConfig:
        if not self.tasks and self.texts.kind in ("target", "engine"):
            raise ValueError(
                "tasks must name at least 1 task, unless texts are of kind synthesize or transcripts"
            )
        if self.draft_sampling == "greedy" and self.draft_temperature:
            raise ValueError("draft_sampling: greedy means draft_temperature: 0; give one of them")
        return self

    @property
    def proposing_temperature(self) -> float | None:
        """Of the draft where the target samples; None: the target's."""
        return 0.0 if self.draft_sampling == "greedy" else self.draft_temperature


class OpenVINOFormat(Config):
    """Precision of the pair in OpenVINO; the paper serves an int4 target with an int8 draft."""

    target: Literal["none", "fp16", "int8", "int4"] = "int4"
    """int4 reads the fewest bytes; int8 is kinder to targets below a billion parameters; none exports the draft alone."""
    draft: Literal["fp16", "int8", "int4"] = "int8"
    """A small draft loses acceptance in int4."""


class ExportConfig(Config):
    """`export:` — for which runtimes, with which settings pinned."""

    formats: list[Literal["huggingface", "openvino"]] = Field(default=["huggingface"], min_length=1)
    """huggingface: safetensors, config, tokenizer; what vLLM loads and what others are converted from, so always written.
    openvino: IR of target and draft; needs the extra `openvino`."""
    openvino: OpenVINOFormat = OpenVINOFormat()
    """Used when `formats` names it."""
    num_speculative_tokens: int = Field(default=3, ge=1, le=64)
    """K, pinned in the generation config. The paper serves with 3 to 5."""
    confidence_threshold: float = Field(default=0.0, ge=0, le=1)
    """The draft stops proposing below this probability; 0: never, for dynamic lengths bring nothing to drafts this small (FastDraft)."""

    @field_validator("formats")
    @classmethod
    def _once(cls, formats: list[str]) -> list[str]:
        return list(dict.fromkeys(formats))


SHIPPED_TASKS: tuple[Literal["code", "summarization", "text", "instructions"], ...] = (
    "code",
    "instructions",
    "text",
    "summarization",
)


NPU_MOST = 5


class WeightsPair(Config):
    """Precision of a target and its draft."""

    target: Literal["fp32", "fp16", "int8", "int4"] = "int4"
    """int4 is how targets are served on PCs: one token reads the fewest bytes."""
    draft: Literal["fp32", "fp16", "int8", "int4"] = "int8"
    """A small draft loses acceptance in int4 and gains little time."""


class SweepConfig(Config):
    """One factor at a time, at the best K of the first pair, on the tasks' prompts in turn; an empty list leaves a factor out."""

    prompt_tokens: list[int] = Field(default=[128, 1024])
    """Lengths of the prompts: the longer, the more a pass costs beside its weights. Shorter ones get texts of their task in front."""
    max_new_tokens: list[int] = Field(default=[32, 128, 512])
    """Most tokens of an answer: in short ones the prompt's own pass, which no draft hastens, weighs more."""
    concurrency: list[int] = Field(default=[1, 4, 16])
    """Texts at a time: with more of them a pass verifies less cheaply, and a draft gains less."""

    @field_validator("prompt_tokens", "max_new_tokens")
    @classmethod
    def _lengths(cls, values: list[int]) -> list[int]:
        return distinct(values, 1, 2**20, "lengths must be between 1 and 1048576 tokens")

    @field_validator("concurrency")
    @classmethod
    def _texts(cls, values: list[int]) -> list[int]:
        return distinct(values, 1, 256, "concurrency must be between 1 and 256 texts")


class BenchmarkConfig(Config):
    """`benchmark:` — what is measured on this device, and how often."""

    runtime: Literal["openvino"] = "openvino"
    """Needs the extra `openvino`."""
    device: str = Field(default="CPU", min_length=1)
    """OpenVINO's name of the device that runs the target: CPU, GPU, GPU.1, NPU."""
    draft_device: str = ""
    """The draft's; "" is the target's."""
    precision: Literal["fast", "exact"] = "fast"
    """fast: the device's own, as users run it; exact: float32 throughout, where greedy text cannot differ but times mean nothing."""
    weights: list[WeightsPair] = Field(default=[WeightsPair()], min_length=1)
    """The first is the deployed one: best K, verdict and sweeps are its; others show what another precision would cost and gain."""
    tasks: list[TaskConfig] | None = Field(default=None, min_length=1)
    """As in `evaluate.tasks`; null: those, or the four shipped ones where it has none."""
    prompts: int = Field(default=8, ge=1)
    """Of each task, from the front: ranges over the repeats tell whether they suffice."""
    num_speculative_tokens: list[int] = Field(default=[1, 2, 3, 4, 5], min_length=1)
    """Every K that is timed; the best depends on acceptance and on both models' costs here."""
    temperatures: list[float] = Field(default=[0.0], min_length=1)
    """Of the target; 0 is greedy. OpenVINO 2026.4 does not sample losslessly with a draft: other rows are marked and give no verdict."""
    confidence_thresholds: list[float] = Field(default=[])
    """Drafts of varying length beside the fixed K: a round proposes until the draft is less sure of a token than this."""
    sweep: SweepConfig = SweepConfig()
    """Prompt length, answer length, texts at a time."""
    repeats: int = Field(default=3, ge=1, le=100)
    """Timed runs of everything, target alone and with the draft in turn; medians and ranges are over them."""

    @field_validator("num_speculative_tokens")
    @classmethod
    def _every_k(cls, values: list[int]) -> list[int]:
        return distinct(values, 1, 64, "num_speculative_tokens must be between 1 and 64")

    @field_validator("temperatures")
    @classmethod
    def _temperatures(cls, values: list[float]) -> list[float]:
        return distinct(values, 0, 10, "temperatures must be between 0 and 10")

    @field_validator("confidence_thresholds")
    @classmethod
    def _thresholds(cls, values: list[float]) -> list[float]:
        return distinct(values, 1e-6, 1 - 1e-6, "confidence thresholds must be above 0 and below 1")

    @field_validator("weights")
    @classmethod
    def _once(cls, values: list[WeightsPair]) -> list[WeightsPair]:
        return list(dict.fromkeys(values))

    @field_validator("tasks")
    @classmethod
    def _names(cls, tasks: list[Any] | None) -> list[Any] | None:
        refuse_equal_names(tasks or ())
        return tasks

    @model_validator(mode="after")
    def _what_an_npu_takes(self) -> BenchmarkConfig:
        if not any(name.startswith("NPU") for name in (self.device, self.draft_device)):
            return self
        if max(self.num_speculative_tokens) > NPU_MOST:
            raise ValueError(
                f"with an NPU num_speculative_tokens must be at most {NPU_MOST}: OpenVINO adapts it from there"
            )
        if self.confidence_thresholds or max(self.temperatures) > 0:
            raise ValueError(
                "with an NPU only temperature 0 and no confidence thresholds: OpenVINO's pipeline knows neither with a draft"
            )
        return self

    def tasks_of(self, sections: Mapping[str, Config]) -> list[Any]:
        """Its own tasks, those of `evaluate`, or the shipped ones.

        Args:
            sections: Of the recipe.
        """
        if self.tasks is not None:
            return self.tasks
        evaluated = list(getattr(sections.get("evaluate"), "tasks", []))
        return evaluated or [ShippedTask(kind=kind) for kind in SHIPPED_TASKS]


class ReportConfig(Config):
    """`report:` — how the report presents itself."""

    title: str | None = None
    """Headline of the page; without it, the run's name."""
