"""The keys of `synthesize.engine`: which runtimes may write as the target, and how each is asked.

Decides what each engine's settings mean, which addresses and log-probs are refused before any work, and which of the keys the text
does not depend on. Imports no runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from fastdraft.config import Config
from fastdraft.data.openai_format import serves_replay
from fastdraft.errors import RecipeError
from fastdraft.interfaces import Sampling


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
        wrong = [t for t in temperatures if t > 0 and not serves_replay("raw", Sampling(t, top_k, top_p))]
        if self.logprobs == "raw" and wrong:
            found = f"raw at temperature {wrong[0]:g}{', truncated' if top_k or top_p < 1 else ''}"
            rule = "raw log-probs are those of the sampled distribution only at temperature 1 without top_k and top_p"
            remedy = "set it to none, to target (scored by the weights), or to processed where the server gives those"
            raise RecipeError("synthesize.engine.logprobs", found, rule, remedy)


TRANSPORT = frozenset({"servers", "concurrency", "timeout", "retries", "api_key_env"})
"""Keys of an engine on which the text does not depend."""

ChosenEngine = HuggingFaceEngineConfig | OpenVINOEngineConfig | OpenAIEngineConfig
EngineConfig = Annotated[AutoEngineConfig | ChosenEngine, Field(discriminator="kind")]
