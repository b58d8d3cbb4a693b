"""OpenVINO as the `Runtime` of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastdraft.decoding.latency import Latency
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.functional.lookup import Lookups
from fastdraft.runtimes.openvino import MODEL_FILE, describe_device
from fastdraft.runtimes.openvino_export import check_pair, export_openvino
from fastdraft.runtimes.openvino_latency import measure_passes
from fastdraft.runtimes.openvino_speculative import LOOKUP_NGRAM, OpenVINOPair, OpenVINOSettings
from fastdraft.runtimes.runtime import LoadedPair, Proposer
from fastdraft.target import Target

_DRAFT = """import openvino_genai

draft = openvino_genai.draft_model("path/to/draft-{draft}", "{draft_device}")
pipeline = openvino_genai.LLMPipeline("path/to/target-{target}", "{device}", draft_model=draft)
config = openvino_genai.GenerationConfig(max_new_tokens=256, num_assistant_tokens={k})
print(pipeline.generate("Once upon a time", config))"""
_LOOKUP = """import openvino_genai

pipeline = openvino_genai.LLMPipeline("path/to/target-{target}", "{device}", prompt_lookup=True)
config = openvino_genai.GenerationConfig(max_new_tokens=256, num_assistant_tokens={k}, max_ngram_size={ngram})
print(pipeline.generate("Once upon a time", config))"""


@dataclass(frozen=True)
class OpenVINORuntime(OpenVINOSettings):
    """The `Runtime` with these settings."""

    name: ClassVar[str] = "openvino"
    exports: ClassVar[str] = "openvino"
    proposers: ClassVar[tuple[ProposerKind, ...]] = ("draft", "lookup")
    # With a draft, release 2026.4.1 accepts a proposal by comparing the draft's probability of it with the
    # target's probability of another token: sampled text leans towards the draft, and the counted acceptance
    # is far too high (docs/runtimes.md has the measurement).
    lossless_sampling: ClassVar[bool] = False
    greedy_proposals: ClassVar[bool] = False
    serves: ClassVar[bool] = False
    narrow: ClassVar[bool] = False  # whether of a trimmed head only the rows are computed

    def describe(self) -> dict[str, Any]:
        draft_device = self.draft_device or self.device
        describe_device(draft_device, self.precision)
        named = {"name": self.name, **describe_device(self.device, self.precision), "device": self.device}
        return named | {"draft_device": draft_device, "threads": self.threads, "precision": self.precision}

    def check_pair(self, target: Target, draft: Target) -> None:
        check_pair(target, draft)

    def export(self, source: Target, folder: Path, weights: Any, target: Path | None = None) -> None:
        export_openvino(source, folder, weights, pair=target)

    def weights_bytes(self, exported: Path) -> int:
        return (exported / MODEL_FILE).with_suffix(".bin").stat().st_size

    def bytes_per_token(self, model: Target, exported: Path, weights: str) -> float:
        return model.architecture.exported_bytes_per_token(weights)

    def measure_passes(
        self,
        target: Path,
        draft: Path,
        widths: Sequence[int],
        prefix_tokens: int,
        texts: Sequence[int] = (1,),
    ) -> Latency | None:
        if {self.device, self.draft_device or self.device} != {"CPU"}:
            return None  # tried on CPUs alone: elsewhere the clock stands without a prediction
        how = self.precision, self.threads
        return measure_passes(target, draft, widths, prefix_tokens, *how, narrow=self.narrow)

    def look_up(
        self, prompt: Sequence[int], response: Sequence[int], num_speculative_tokens: int
    ) -> Lookups | None:
        """Its rule is not modelled here."""

    def open(self, target: Path, draft: Path) -> LoadedPair:
        return OpenVINOPair(target, draft, self)

    def launch_line(self, target: str, draft: str, proposer: Proposer) -> str:
        form = _DRAFT if proposer.kind == "draft" else _LOOKUP
        devices = {"device": self.device, "draft_device": self.draft_device or self.device}
        k = proposer.num_speculative_tokens
        return form.format(target=target, draft=draft, k=k, ngram=LOOKUP_NGRAM, **devices)
