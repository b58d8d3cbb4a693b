"""`synthesize:` — prompts, what the target is asked, and the engine that answers."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from fastdraft.recipe.base import EACH_ONCE, NAMES_DIFFER, Config, Count, FolderName, each_between
from fastdraft.recipe.prepare import HubRows

Weights = Literal["fp32", "fp16", "int8", "int4"]
LogprobKind = Literal["processed", "raw", "none"]


class Prompts(Config):
    """What every source of prompts has."""

    name: FolderName
    """How manifests and tables call this source."""
    share: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Part of the budget's tokens, relative to the other sources."""
    count: Count | None = Field(default=None, ge=1)
    """At most this many prompts, after the seeded shuffle (hub: rows from its beginning, 100k if unset)."""


class TextPrompts(Prompts):
    """What sources of text or conversations have."""

    chat: bool = True
    """Puts each text into the target's chat template, if there is one; conversations always go through it."""
    field: str = "prompt"
    """The key or column of the prompt: text, or messages whose every answer the target gives anew."""


class JsonlPrompts(TextPrompts):
    """JSON objects, one a line or in an array, or Parquet; plain, .gz, .xz, .bz2 or .zst."""

    kind: Literal["jsonl"]
    path: str = Field(min_length=1)
    """A file, a folder or a pattern; `shipped:` and `python:` names too."""


class HubPrompts(HubRows, TextPrompts):
    """A data set of the Hugging Face hub, streamed from its beginning and held in memory."""

    kind: Literal["hub"]


class MagpiePrompts(Prompts):
    """The target writes the instruction too, given the chat template's beginning (arXiv 2406.08464)."""

    kind: Literal["magpie"]


class CorpusPrompts(Prompts):
    """Beginnings of prepared documents, continued without template: how base models write."""

    kind: Literal["corpus"]
    corpus: str = Field(min_length=1)
    """One of `prepare.corpora`; only its training split is used."""
    prompt_tokens: tuple[int, int] = (16, 128)
    """Shortest and longest prefix, in tokens; drawn evenly."""

    @model_validator(mode="after")
    def _ordered(self) -> CorpusPrompts:
        if not 1 <= self.prompt_tokens[0] <= self.prompt_tokens[1]:
            raise ValueError("prompt_tokens must be [shortest, longest] with 1 <= shortest <= longest")
        return self


class TranscriptLog(Config):
    """Logged prompts and answers of the target: nothing is asked, no weights are needed.

    Rows with messages or a prompt and the answer, in the formats of OpenAI (chat, completions, responses, the
    output of a batch with its `requests`), Anthropic and Ollama, or as {"request": ..., "response": ...}; and
    conversations that end with the answer: messages, ShareGPT, prompt and completion, Alpaca.
    """

    kind: Literal["transcripts"]
    path: str = Field(min_length=1)
    """A file, a folder or a pattern; .gz, .xz and .zst too."""
    requests: str = ""
    """Of outputs of the Batch API (answers only): the files of their requests, joined by `custom_id`."""
    temperature: float | None = Field(default=None, ge=0, le=10)
    """Of lines that do not tell theirs; unset, such a line stops the run."""
    top_k: int = Field(default=0, ge=0)
    """Of lines that do not tell theirs."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of lines that do not tell theirs."""
    logprobs: LogprobKind = "none"
    """What they are of: processed, the sampled distribution; raw, the logits (for temperature 1)."""


class TranscriptPrompts(TranscriptLog, Prompts):
    """Logs as training rows."""


PromptConfig = Annotated[
    JsonlPrompts | HubPrompts | MagpiePrompts | CorpusPrompts | TranscriptPrompts, Field(discriminator="kind")
]


class NoLogitsConfig(Config):
    """Only the tokens: all that sequence-level distillation needs."""

    kind: Literal["none"] = "none"


class TopKLogitsConfig(Config):
    """The likeliest tokens at every response token, at temperature 1, by a pass of the model that writes
    here, as it runs; of what a server or a log has, of the target's weights.
    """

    kind: Literal["top_k"]
    k: int = Field(default=64, ge=1, le=1024)
    """Tokens kept. For 64 of them 258 bytes a response token, 386 where the vocabulary is above 65,536
    ids.
    """


class AutoEngineConfig(Config):
    """OpenVINO on a CPU where it is installed (int8, or what `target.dtype` names), else transformers."""

    kind: Literal["auto"] = "auto"


class HuggingFaceEngineConfig(Config):
    """transformers, in this process: wherever torch runs; reproducible bit for bit for equal threads."""

    kind: Literal["huggingface"] = "huggingface"


class OpenVINOEngineConfig(Config):
    """OpenVINO's continuous batching, here, on CPUs and Intel's GPUs; needs the extra `openvino`."""

    kind: Literal["openvino"] = "openvino"
    weights: Weights = "int8"
    """Precision of the target that writes: the fewer bits, the faster and the further from the original."""
    precision: Literal["fast", "exact"] = "fast"
    """fast: the device's own, on a CPU with an 8-bit KV cache; exact: float32 throughout."""
    device: str = "CPU"
    """OpenVINO's name: CPU, GPU, GPU.1."""
    logprobs: Literal["engine", "target"] = "engine"
    """engine: of the distribution drawn from; target: by a scoring pass in `target.dtype`."""


def server_address(value: str) -> str:
    """Of a server, without a key in it."""
    parts = urlsplit(value)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("must be addresses without a key: name its environment variable in api_key_env")
    # port: ValueError beyond 65535
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError("must be addresses such as http://127.0.0.1:8000/v1")
    return value.rstrip("/")


Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class OpenAIEngineConfig(Config):
    """Servers with an OpenAI-compatible API, such as vLLM; needs the extra `server`, no weights."""

    kind: Literal["openai"]
    servers: Annotated[list[Annotated[str, AfterValidator(server_address)]], EACH_ONCE] = Field(min_length=1)
    """Base addresses, such as http://127.0.0.1:8000/v1; several of one model share the work."""
    model: str = ""
    """The target's name at the servers; empty: the only one that they serve."""
    api: Literal["auto", "completions", "chat"] = "auto"
    """completions takes every prompt, as token ids if it can; chat: messages that the server renders; auto:
    completions if there."""
    logprobs: Literal["processed", "raw", "none", "target"] = "none"
    """What they are of: processed, the sampled distribution (vLLM: --logprobs-mode processed_logprobs); raw,
    the logits, for temperature 1 untruncated; target: by a pass of the weights here."""
    concurrency: int = Field(default=16, ge=1, le=1024)
    """Questions under way at each server."""
    timeout: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Seconds for one whole answer."""
    retries: int = Field(default=6, ge=0, le=100)
    """Times that a question is asked again, after longer pauses: 6 bear about 24 s."""
    api_key_env: Variable = "OPENAI_API_KEY"
    """Environment variable that holds the key, if there is one; its value is never written anywhere."""


class LlamaCppEngineConfig(Config):
    """llama.cpp's own server, started here: the text of a GGUF file as it will be served; needs the extra
    `llamacpp`, no weights.
    """

    kind: Literal["llamacpp"]
    model: str = Field(min_length=1)
    """The target's GGUF file; of several parts any one."""
    server: str = ""
    """A llama-server of your own, for your GPU or CPU; empty: the one in xllamacpp, for every CPU."""
    slots: int = Field(default=8, ge=1, le=256)
    """Answers written at a time."""
    logprobs: Literal["engine", "none"] = "engine"
    """engine: of the distribution drawn from; llama.cpp tells none where a token is no whole character."""


# Do not change the text.
TRANSPORT = frozenset({"servers", "concurrency", "timeout", "retries", "api_key_env", "server", "slots"})
Looping = Literal["cut", "drop", "keep"]
ChosenEngine = HuggingFaceEngineConfig | OpenVINOEngineConfig | OpenAIEngineConfig | LlamaCppEngineConfig
EngineConfig = Annotated[AutoEngineConfig | ChosenEngine, Field(discriminator="kind")]
_AskedAt = Annotated[list[float], each_between(0, 10, in_order=False)]


class SynthesizeConfig(Config):
    """`synthesize:` — what the target is asked, and how it answers."""

    prompts: Annotated[list[PromptConfig], NAMES_DIFFER] = Field(min_length=1)
    """Where prompts come from; `share` divides the budget's tokens."""
    tokens: Count = Field(default=250_000, ge=1)
    """Response tokens to write; the unit that reaches it is the last. (The paper's is not published.)"""
    temperatures: _AskedAt = Field(default=[0.0, 0.6, 0.8, 1.0], min_length=1)
    """Greedy and the paper's three; each prompt is asked at one, then, if the budget lasts, at the next."""
    samples: int = Field(default=1, ge=1)
    """Answers for each prompt at each temperature above 0, if the budget lasts; greedy is asked once."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Length at which an answer is cut."""
    batch_rows: int = Field(default=64, ge=1, le=65_536)
    """Prompts in a unit: generated together, committed together."""
    top_k: int = Field(default=0, ge=0)
    """0 keeps all: the draft learns the whole distribution."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """1 keeps all."""
    logits: Annotated[NoLogitsConfig | TopKLogitsConfig, Field(discriminator="kind")] = NoLogitsConfig()
    """none, or top_k: the writer's distributions, for token-level distillation without a model beside."""
    looping: Looping = "cut"
    """Of an answer that runs into a loop: cut behind its second round, drop the row, or keep it going."""
    engine: EngineConfig = AutoEngineConfig()
    """What runs the target: auto, huggingface, openvino, llamacpp, or openai for a server."""
    writer: str = ""
    """A smaller model of the target's vocabulary that writes in its place, in a fraction of the time; the
    draft then learns a text that is nearly the target's. `evaluate` always has the target's own."""

    @model_validator(mode="after")
    def _fits_together(self) -> SynthesizeConfig:
        if self.writer and self.engine.kind in ("openai", "llamacpp"):
            rule = f"must be left out for engine.kind: {self.engine.kind}, which names its own model"
            raise ValueError(f"writer: {self.writer}: {rule}")
        raw = self.engine.kind == "openai" and self.engine.logprobs == "raw" and self.asks
        truncated = self.top_k > 0 or self.top_p < 1
        if raw and any(t > 0 and (t != 1 or truncated) for t in self.temperatures):
            rule = "engine.logprobs: raw are of the sampled distribution only at temperature 1 untruncated"
            raise ValueError(f"{rule}; set none, target, or processed where the server gives those")
        return self

    @property
    def asks(self) -> bool:
        """Whether the target is asked anything: not where all answers stand already."""
        return any(source.kind != "transcripts" for source in self.prompts)

    @property
    def needs_weights(self) -> bool:
        """Whether the target's weights must be on this machine: they write, or score what others wrote."""
        served = self.engine.kind == "openai" and self.engine.logprobs != "target"
        served |= self.engine.kind == "llamacpp"  # a file of its own
        return self.logits.kind == "top_k" or (self.asks and not served)
