"""The keys of `synthesize.engine`: which runtimes may write as the target, and how each is asked.

Decides what each engine's settings mean, which addresses and log-probs are refused before any work, and which of the keys the text
does not depend on. Imports no runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from fastdraft.data.prompts import PromptConfig
from fastdraft.data.sources import SourceConfig
from fastdraft.data.transcript_lines import TranscriptPrompts
from fastdraft.errors import RecipeError
from fastdraft.recipe.base import Config, Count, distinct, names_a_device
from fastdraft.run_folder import FINGERPRINT, MANIFEST


class AutoEngineConfig(Config):
    """OpenVINO on a CPU where it is installed, else transformers; `fastdraft check` and the manifest say which."""

    kind: Literal["auto"] = "auto"
    """OpenVINO then runs the target in int8 (starter: total variation of 0.01 a token from float32), or in what `target.dtype` names."""


class HuggingFaceEngineConfig(Config):
    """transformers, in this process."""

    kind: Literal["huggingface"] = "huggingface"
    """Runs wherever torch runs; reproducible bit for bit for equal threads."""


class OpenVINOEngineConfig(Config):
    """OpenVINO's continuous batching, in this process; needs the extra `openvino`."""

    kind: Literal["openvino"] = "openvino"
    """Runs on CPUs and Intel's GPUs; reproducible for equal threads."""
    weights: Literal["fp32", "fp16", "int8", "int4"] = "int8"
    """Precision of the target that writes: the fewer bits, the faster and the further from the original."""
    precision: Literal["fast", "exact"] = "fast"
    """fast: the device's own, on a CPU with an 8-bit KV cache; exact: float32 throughout."""
    device: str = "CPU"
    """OpenVINO's name: CPU, GPU, GPU.1."""
    logprobs: Literal["engine", "target"] = "engine"
    """engine: of the distribution that each token was drawn from; target: of the target in `target.dtype`, by a scoring pass."""


class OpenAIEngineConfig(Config):
    """Servers with an OpenAI-compatible API (vLLM, SGLang, llama.cpp, OVMS, transformers): of the target's own files only config and
    tokenizer are needed here. Needs the extra `server`.
    """

    kind: Literal["openai"]
    """Asks over HTTP; as reproducible as the server is."""
    servers: list[str] = Field(min_length=1)
    """Base addresses, such as http://127.0.0.1:8000/v1; several of one model share the work."""
    model: str = ""
    """The target's name at the servers; empty: the only one that they serve."""
    api: Literal["auto", "completions", "chat"] = "auto"
    """completions takes every prompt, as token ids where the server can; chat takes user messages and conversations, which the server
    renders itself; auto: completions if there."""
    logprobs: Literal["processed", "raw", "none", "target"] = "none"
    """What the servers' log-probs are of: processed, the sampled distribution (vLLM: --logprobs-mode processed_logprobs); raw, the
    logits, of use at temperature 1 without truncation only; none: kept without; target: of target.model's weights, by a scoring pass."""
    concurrency: int = Field(default=16, ge=1, le=1024)
    """Questions under way at each server."""
    timeout: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Seconds for one whole answer."""
    retries: int = Field(default=6, ge=0, le=100)
    """Times that a question is asked again, each time after a longer pause: 6 bear a server that is away for about a minute."""
    api_key_env: str = Field(default="OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the key, if there is one; its value is never written anywhere."""

    @field_validator("servers")
    @classmethod
    def _addresses(cls, values: list[str]) -> list[str]:
        for value in values:
            try:
                parts = urlsplit(value)
                usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
            except ValueError:
                parts, usable = urlsplit(""), False
            if parts.username or parts.password or parts.query or parts.fragment:
                raise RecipeError(
                    "synthesize.engine.servers",
                    "an address with a key in it",
                    "keys are not for recipes",
                    "use api_key_env",
                )
            if not usable:
                raise ValueError("must be addresses such as http://127.0.0.1:8000/v1")
        return list(dict.fromkeys(value.rstrip("/") for value in values))

    def check_sampling(self, temperatures: Sequence[float], top_k: int, top_p: float) -> None:
        """Raises:
        RecipeError: when raw log-probs would have to stand for those of another distribution.
        """
        wrong = [t for t in temperatures if t > 0 and (t != 1 or top_k or top_p < 1)]
        if self.logprobs == "raw" and wrong:
            found = f"raw at temperature {wrong[0]:g}{', truncated' if top_k or top_p < 1 else ''}"
            rule = "raw log-probs are those of the sampled distribution only at temperature 1 without top_k and top_p"
            remedy = "set it to none, to target (scored by the weights), or to processed where the server gives those"
            raise RecipeError("synthesize.engine.logprobs", found, rule, remedy)


TRANSPORT = frozenset({"servers", "concurrency", "timeout", "retries", "api_key_env"})
"""Keys of an engine on which the text does not depend."""

ChosenEngine = HuggingFaceEngineConfig | OpenVINOEngineConfig | OpenAIEngineConfig
EngineConfig = Annotated[AutoEngineConfig | ChosenEngine, Field(discriminator="kind")]


class PrepareConfig(Config):
    """`prepare:` — the corpora and their form on disk."""

    row_length: int = Field(default=2048, ge=8)
    """Tokens in a training row; the draft's training context."""
    long_rows: dict[int, Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=dict)
    """Share of each corpus's tokens by greater row length, such as `{4096: 0.2}`: documents that fill half of such a row go there, the rest
    into rows of `row_length`. Every step trains on all lengths in these shares, so that the draft sees long contexts at little cost."""
    validation: float = Field(default=0.005, ge=0, le=0.5)
    """Share of the documents kept for validation; small corpora keep a few rows anyway."""
    workers: int = Field(default=0, ge=0)
    """Tokenisation threads; 0 is all cores. The result does not depend on it."""
    shard_tokens: Count = Field(default=64_000_000, ge=1)
    """Tokens in a shard file."""
    document_masking: bool = False
    """Texts that share a training row do not see each other: each is trained as if it stood alone, from position 0."""
    corpora: list[SourceConfig] = Field(min_length=1)
    """What to read; entries of one name make one corpus, in the shares of their `tokens`."""

    @field_validator("corpora")
    @classmethod
    def _names_make_folders(cls, entries: list[Any]) -> list[Any]:
        names = {entry.name for entry in entries}
        taken = (MANIFEST, FINGERPRINT)
        if bad := {
            name for name in names if name.endswith(".") or name.casefold() in taken or names_a_device(name)
        }:
            raise ValueError(f"a corpus cannot be called '{min(bad)}'")
        if len({name.casefold() for name in names}) < len(names):
            raise ValueError("names of corpora must differ by more than capitals: each is a folder")
        return entries

    @model_validator(mode="after")
    def _lengths_fit_together(self) -> PrepareConfig:
        longest = max(self.long_rows, default=self.row_length)
        for length in self.long_rows:
            if length <= self.row_length:
                raise ValueError(f"long_rows.{length} must be longer than row_length ({self.row_length})")
        for length in (self.row_length, *self.long_rows):
            if longest % length:
                raise ValueError(
                    f"rows of {length} must fill the longest rows exactly: {longest} is no multiple of {length}"
                )
        if sum(self.long_rows.values()) >= 1:
            raise ValueError(f"the shares of long_rows must leave some tokens for rows of {self.row_length}")
        return self

    @property
    def names(self) -> list[str]:
        """The corpora, in order of their first entry."""
        return list(dict.fromkeys(entry.name for entry in self.corpora))

    @property
    def entries(self) -> dict[str, list[Any]]:
        """The entries of each corpus."""
        return {name: [entry for entry in self.corpora if entry.name == name] for name in self.names}

    @property
    def budget(self) -> int | None:
        """Tokens of all entries; None when one is open."""
        budgets = [entry.tokens for entry in self.corpora]
        return sum(budget or 0 for budget in budgets) if all(budgets) else None


Looping = Literal["cut", "drop", "keep"]


class NoLogitsConfig(Config):
    """Only the tokens: all that sequence-level distillation needs."""

    kind: Literal["none"] = "none"


class TopKLogitsConfig(Config):
    """At every response token the target's most likely tokens and the mass of all others, at temperature 1, by a scoring pass of the
    target's weights: they must be here, also where a server or a log gives the text.
    """

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=64, ge=1, le=1024)
    """Tokens kept. About 4 bytes each: 258 to 274 bytes a response token for 64."""


LogitsConfig = Annotated[NoLogitsConfig | TopKLogitsConfig, Field(discriminator="kind")]


class SynthesizeConfig(Config):
    """`synthesize:` — what the target is asked, and how it answers."""

    prompts: list[PromptConfig] = Field(min_length=1)
    """Where prompts come from; `share` divides the budget's tokens."""
    tokens: Count = Field(default=250_000, ge=1)
    """Response tokens to write; the unit that reaches it is the last. (FastDraft's own number is not published.)"""
    temperatures: list[float] = Field(default=[0.0, 0.6, 0.8, 1.0], min_length=1)
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
    logits: LogitsConfig = NoLogitsConfig()
    """none, or top_k: the target's distributions beside its tokens, for token-level distillation without the target."""
    keep_truncated: bool = True
    """Keeps chat answers cut by max_new_tokens: every token of them is the target's own. false leaves such rows out."""
    looping: Looping = "cut"
    """An answer that runs into a loop ends there: cut behind the loop's second round, or drop the row; keep lets it go on."""
    engine: EngineConfig = AutoEngineConfig()
    """What runs the target: auto, huggingface, openvino, or openai for a server."""

    @field_validator("temperatures")
    @classmethod
    def _distinct_temperatures(cls, values: list[float]) -> list[float]:
        distinct(values, 0, 10, "temperatures must be between 0 and 10")
        return list(dict.fromkeys(values))

    @model_validator(mode="after")
    def _distinct_names(self) -> SynthesizeConfig:
        names = {
            source.name.casefold() for source in self.prompts
        }  # capitals aside: each may name a task's files
        if len(names) < len(self.prompts):
            raise ValueError("every entry of prompts needs a name of its own, capitals aside")
        return self

    @model_validator(mode="after")
    def _logprobs_fit_the_sampling(self) -> SynthesizeConfig:
        if isinstance(self.engine, OpenAIEngineConfig) and self.asks:
            self.engine.check_sampling(self.temperatures, self.top_k, self.top_p)
        return self

    @property
    def asks(self) -> bool:
        """Whether the target is asked anything: not where all answers stand already."""
        return any(not isinstance(source, TranscriptPrompts) for source in self.prompts)

    @property
    def needs_weights(self) -> bool:
        """Whether the target's weights must be on this machine: they write, or score what others wrote."""
        from fastdraft.runtimes.engines import uses_weights

        return self.logits.kind == "top_k" or (self.asks and uses_weights(self.engine))
