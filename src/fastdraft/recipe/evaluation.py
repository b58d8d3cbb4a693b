"""`evaluate:`, `export:`, `benchmark:` and `report:`: tasks, texts, and what is measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fastdraft.recipe.base import (
    EACH_ONCE,
    NAMES_DIFFER,
    Config,
    Count,
    FolderName,
    Ks,
    Temperatures,
    each_between,
)
from fastdraft.recipe.synthesize import TranscriptLog, Variable, Weights, server_address

_Shipped = Literal["code", "instructions", "text", "summarization"]


class TaskSettings(Config):
    """What every task has."""

    name: FolderName = ""
    """How results call the task; the default is its kind, for files the file's name."""
    prompts: int = Field(default=100, ge=1)
    """At most this many prompts, spread evenly over the file."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Length at which an answer is cut."""

    @model_validator(mode="before")
    @classmethod
    def _name_it(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("name"):
            return value
        stem = Path(str(value.get("path") or value.get("kind"))).stem
        return {**value, "name": re.sub("[^A-Za-z0-9._-]", "-", stem).lstrip("._-")[:100] or "file"}


class ShippedTask(TaskSettings):
    """A task that ships with the package: HumanEval headers, held-out instructions, openings from books, or
    public-domain prose to sum up.
    """

    kind: _Shipped

    @property
    def path(self) -> str:
        return f"shipped:tasks/{self.kind}.jsonl"

    @property
    def chat(self) -> bool:
        return self.kind in ("summarization", "instructions")  # code and text are bare, as in the paper


class FileTask(TaskSettings):
    """Prompts of the user's own."""

    kind: Literal["file"]
    path: str = Field(min_length=1)
    """JSONL with `prompt` (text) or `messages` (every turn is a prompt, after the target's greedy answers);
    `id` and `reference` if wanted."""
    chat: bool = False
    """Puts each text into the target's chat template; conversations always go through it, if there is one."""


TaskConfig = Annotated[ShippedTask | FileTask, Field(discriminator="kind")]


class AutoTexts(Config):
    """As `target`; where `synthesize.engine` runs on this machine too (OpenVINO, llama.cpp), that writes."""

    kind: Literal["auto"] = "auto"


class TargetTexts(Config):
    """transformers answers the tasks here; with this and `auto` alone there are exact runs and latencies."""

    kind: Literal["target"]


class EngineTexts(Config):
    """`synthesize.engine` answers the tasks, so that a served target needs no weights here."""

    kind: Literal["engine"]


class HeldOutTexts(Config):
    """The held-out rows of synthesize: every source of prompts is a task, at every temperature it has."""

    kind: Literal["synthesize"]
    logprobs: Literal["own", "target"] = "own"
    """own: as they were written; target: those of target.model's weights, by a scoring pass."""


class LoggedTexts(TranscriptLog):
    """Logs of the target as a task; prompts that the draft was trained on are left out."""

    name: FolderName
    """How tables call this log."""
    count: Count | None = Field(default=None, ge=1)
    """At most this many answers, after a seeded shuffle; unset takes all."""
    logprobs: Literal["processed", "raw", "none", "target"] = "none"  # type: ignore[assignment]
    """What the logged log-probs are of; target: take those of target.model's weights, by a scoring pass."""


TextsConfig = Annotated[
    AutoTexts | TargetTexts | EngineTexts | HeldOutTexts | LoggedTexts, Field(discriminator="kind")
]
# `texts: synthesize` for `texts: {kind: synthesize}`
_BARE_KIND = BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value)
Checkpoint = Literal["design", "pretrain", "continue_pretrain", "align"]


class ExactConfig(Config):
    """Real speculative decoding, beside replay: slower, and proof that greedy text is the target's own."""

    num_speculative_tokens: Ks = Field(default=[3], min_length=1)
    """K of the exact runs."""
    prompts: int = Field(default=16, ge=0)
    """Prompts of each task and temperature, from the front; 0 leaves exact runs out."""


class EvaluateConfig(Config):
    """`evaluate:` — on what, and how, drafts are compared."""

    tasks: Annotated[list[TaskConfig], NAMES_DIFFER] = []
    """Shipped tasks by kind or `kind: file`; needed unless `texts` stand already."""
    texts: Annotated[TextsConfig, _BARE_KIND] = AutoTexts()
    """Whose texts drafts are replayed over: the target's own here or at its servers, held-out rows, logs."""
    temperatures: Temperatures = Field(default=[0.0, 0.6], min_length=1)
    """At which the target answers the tasks; 0 is greedy."""
    num_speculative_tokens: Ks = Field(default=[1, 2, 3, 4, 5, 6, 7, 8], min_length=1)
    """Every K that replay covers: one pass of the draft serves them all."""
    checkpoints: list[Checkpoint] = Field(default=["pretrain", "continue_pretrain", "align"], min_length=1)
    """Which drafts of this run, where their stage is in the recipe (design: the draft as it began)."""
    exact: ExactConfig = ExactConfig()
    """Exact runs of the last checkpoint."""
    top_k: int = Field(default=0, ge=0)
    """Of target and draft; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of target and draft; 1 keeps all."""
    draft_temperature: float | None = Field(default=None, ge=0, le=10)
    """The draft's own where the target samples; 0: its likeliest token, as in vLLM; null: the target's."""
    batch_rows: int = Field(default=64, ge=1, le=65_536)
    """Prompts that the target answers together."""

    @model_validator(mode="after")
    def _something_to_do(self) -> EvaluateConfig:
        if not self.tasks and self.texts.kind in ("auto", "target", "engine"):
            raise ValueError("tasks must name at least 1 task, unless texts are of synthesize or transcripts")
        return self


class OpenVINOFormat(Config):
    """Precision of the pair in OpenVINO; the paper serves an int4 target with an int8 draft."""

    target: Literal["none", "fp16", "int8", "int4"] = "int4"
    """int4 reads the fewest bytes; int8 is kinder to targets under 1B parameters; none: the draft alone."""
    draft: Literal["fp16", "int8", "int4"] = "int8"
    """A small draft loses acceptance in int4."""


GGUFWeights = Literal["f32", "f16", "q8_0"]


class GGUFFormat(Config):
    """Precision of the GGUF files that are written for llama.cpp, LM Studio and Ollama."""

    draft: GGUFWeights = "q8_0"
    """A small draft loses acceptance in fewer bits."""
    target: Literal["none"] | GGUFWeights = "none"
    """Of a target that is no GGUF file itself: none where you have its file from elsewhere."""


class ExportConfig(Config):
    """`export:` — for which runtimes, with which settings pinned."""

    formats: Annotated[list[Literal["huggingface", "openvino", "gguf"]], EACH_ONCE] = Field(
        default=["huggingface"], min_length=1
    )
    """huggingface: what vLLM loads and others are converted from, so always written; openvino: needs the
    extra `openvino`; gguf: for llama.cpp, needs the extra `llamacpp`."""
    openvino: OpenVINOFormat = OpenVINOFormat()
    """Used when `formats` names it."""
    gguf: GGUFFormat = GGUFFormat()
    """Used when `formats` names it."""
    num_speculative_tokens: int = Field(default=3, ge=1, le=64)
    """K, pinned in the generation config. The paper serves with 3 to 5."""


class WeightsPair(Config):
    """Precision of a target and its draft."""

    target: Weights = "int4"
    """int4 is how targets are served on PCs: one token reads the fewest bytes."""
    draft: Weights = "int8"
    """A small draft loses acceptance in int4 and gains little time."""


RuntimeName = Literal["openvino", "llamacpp", "vllm"]
BenchmarkRuntime = Literal[RuntimeName, "fastdraft"]
_Lengths = Annotated[list[int], each_between(1, 2**20)]


class SweepConfig(Config):
    """One factor at a time, at the best K of the first pair, on the tasks' prompts; [] leaves one out."""

    prompt_tokens: _Lengths = [128, 1024]
    """Lengths of the prompts: the longer, the more a pass costs beside its weights."""
    max_new_tokens: _Lengths = [32, 128, 512]
    """Most tokens of an answer: in short ones the prompt's own pass, which no draft hastens, weighs more."""
    concurrency: Annotated[list[int], each_between(1, 256)] = [1, 4, 16]
    """Texts at a time: with more of them a pass verifies less cheaply, and a draft gains less."""


class LlamaCppConfig(Config):
    """How llama.cpp runs the pair; it needs the extra `llamacpp`."""

    server: str = ""
    """A llama-server of your own, for your GPU or CPU; empty: the one in xllamacpp, for every CPU."""
    threads: int = Field(default=0, ge=0, le=4096)
    """CPU threads; 0: those of `run.threads`."""
    target: str = ""
    """The target's GGUF file; empty: `target.model` where it is one, else that of `synthesize.engine`."""
    draft: str = ""
    """The draft's GGUF file; empty: the one that export made for its format gguf."""


_AddressOrNone = Annotated[str, AfterValidator(lambda value: value and server_address(value))]


class VLLMConfig(Config):
    """How vLLM runs the pair: one server without and one with each draft, started here or running already."""

    server: str = ""
    """Python of an environment that has vLLM, or its program `vllm`; empty: of this environment."""
    arguments: str = ""
    """Further arguments of every server that is started: `--dtype bfloat16 --tensor-parallel-size 2`."""
    base_url: _AddressOrNone = ""
    """Instead: the address of a server that runs already, of the target alone."""
    draft_base_url: _AddressOrNone = ""
    """And of one with the draft, whose K `num_speculative_tokens` names alone."""
    api_key_env: Variable = "OPENAI_API_KEY"
    """Environment variable that holds the key of servers that run already, if there is one."""

    @model_validator(mode="after")
    def _both_or_none(self) -> VLLMConfig:
        if bool(self.base_url) != bool(self.draft_base_url):
            raise ValueError(
                "base_url and draft_base_url go together: one server without and one with the draft"
            )
        if self.base_url and (self.server or self.arguments):
            raise ValueError("a server that runs already (base_url) is not started: no server, no arguments")
        return self


class BenchmarkConfig(Config):
    """`benchmark:` — what is measured on this device, and how often."""

    runtimes: Annotated[list[BenchmarkRuntime], EACH_ONCE] | None = Field(default=None, min_length=1)
    """What runs the pair, one after the other; null: llamacpp for a GGUF target whose draft is a GGUF
    file too, else openvino. fastdraft: this program's own decoder over the same exports as openvino, one
    text at a time on a CPU; vllm: as it is served."""
    llamacpp: LlamaCppConfig = LlamaCppConfig()
    """Used where llama.cpp runs."""
    vllm: VLLMConfig = VLLMConfig()
    """Used where vLLM runs."""

    device: str = Field(default="CPU", min_length=1)
    """OpenVINO's name of the device that runs the target: CPU, GPU, GPU.1."""
    draft_device: str = ""
    """The draft's; "" is the target's."""
    precision: Literal["fast", "exact"] = "fast"
    """fast: as users run it; exact: float32, where greedy text cannot differ and times mean nothing."""
    weights: Annotated[list[WeightsPair], EACH_ONCE] = Field(default=[WeightsPair()], min_length=1)
    """The first is the deployed one: best K, verdict and sweeps are its; others show what they would gain."""
    tasks: Annotated[list[TaskConfig], NAMES_DIFFER] | None = Field(default=None, min_length=1)
    """As in `evaluate.tasks`; null: those, or the four shipped ones where it has none."""
    prompts: int = Field(default=8, ge=1)
    """Of each task, from the front: ranges over the repeats tell whether they suffice."""
    num_speculative_tokens: Ks = Field(default=[1, 2, 3, 4, 5], min_length=1)
    """Every K that the draft is timed at; the best depends on acceptance and both models' costs here."""
    lookup: Ks = [3, 5]
    """K of prompt lookup, which needs no draft: what a draft must beat; [] leaves it out. The runtime
    fastdraft runs both together at the fastest K of each."""
    temperatures: Temperatures = Field(default=[0.0], min_length=1)
    """Of the target; 0 is greedy. OpenVINO 2026.4 samples with losses: such rows give no verdict."""
    sweep: SweepConfig = SweepConfig()
    """Prompt length, answer length, texts at a time."""
    repeats: int = Field(default=3, ge=1, le=100)
    """Timed runs of everything, target alone and with the draft in turn; medians and ranges are over them."""

    def runtimes_of(self, formats: Sequence[str], *, gguf: bool) -> list[BenchmarkRuntime]:
        """Those named, or what the target (a GGUF file or not) and `export.formats` allow."""
        if self.runtimes:
            return list(self.runtimes)
        return ["llamacpp" if gguf and ("gguf" in formats or self.llamacpp.draft) else "openvino"]

    def tasks_of(self, sections: Mapping[str, Config]) -> list[Any]:
        """Its own tasks, those of `evaluate`, or the shipped ones; `sections` are the recipe's."""
        if self.tasks is not None:
            return self.tasks
        evaluated = list(getattr(sections.get("evaluate"), "tasks", []))
        return evaluated or [ShippedTask(kind=kind) for kind in get_args(_Shipped)]


class ReportConfig(Config):
    """`report:` — one page about the run; it has no keys."""
