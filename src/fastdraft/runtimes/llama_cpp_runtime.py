"""llama.cpp as the `Runtime` of a benchmark."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from fastdraft.decoding.latency import Latency
from fastdraft.errors import FastDraftError
from fastdraft.modeling.gguf_files import check_pair as check_gguf_pair
from fastdraft.modeling.gguf_files import read_gguf
from fastdraft.modeling.vocabulary import check_same
from fastdraft.runtimes.gguf_export import GGUF_FILE
from fastdraft.runtimes.llama_cpp import LlamaCppPair, LlamaCppSettings, measure_passes
from fastdraft.runtimes.llama_cpp_process import ServerSettings
from fastdraft.runtimes.llama_cpp_server import require_llama_cpp
from fastdraft.runtimes.runtime import Proposer, ProposerKind
from fastdraft.target import Target


@dataclass(frozen=True)
class LlamaCppRuntime(LlamaCppSettings):
    """The `Runtime` with these settings; an exported model is a folder with one GGUF file."""

    name: ClassVar[str] = "llamacpp"
    proposers: ClassVar[tuple[ProposerKind, ...]] = ("draft", "lookup", "lookup_draft")
    # What is drawn from the target is compared with the draft's likeliest token, and written either way.
    lossless_sampling: ClassVar[bool] = True
    device: ClassVar[str] = "CPU"
    draft_device: ClassVar[str] = ""

    def describe(self) -> dict[str, Any]:
        """The server's release, and the processor."""
        require_llama_cpp(self.server)
        version = _version(self.server) if self.server else f"xllamacpp {metadata.version('xllamacpp')}"
        named = {"name": self.name, "version": version, "device_name": _processor(), "device": self.device}
        return named | {"draft_device": self.device, "threads": self.threads, "precision": "fast"}

    def check_pair(self, target: Target, draft: Target) -> None:
        check_same(target.vocabulary, draft.vocabulary, where=draft.name)

    def weights_bytes(self, exported: Path) -> int:
        return sum(tensor.size for tensor in read_gguf(exported / GGUF_FILE).tensors.values())

    def measure_passes(
        self, target: Path, draft: Path, widths: Sequence[int], prefix_tokens: int
    ) -> Latency | None:
        return measure_passes(target / GGUF_FILE, draft / GGUF_FILE, self, widths, prefix_tokens)

    def open(self, target: Path, draft: Path) -> LlamaCppPair:
        """Refuses first a draft that the server would leave out without an error."""
        files = read_gguf(target / GGUF_FILE), read_gguf(draft / GGUF_FILE)
        check_gguf_pair(files[0].fields, files[1].fields, str(files[1].path))
        context = min(int(file.value("{arch}.context_length")) for file in files)
        return LlamaCppPair(files[0].path, files[1].path, self, context)

    def launch_line(self, target: str, draft: str, proposer: Proposer) -> str:
        paths = f"path/to/target-{target}.gguf", f"path/to/draft-{draft}.gguf"
        kind, k = proposer.kind, proposer.num_speculative_tokens
        settings = ServerSettings(paths[0], paths[1] if "draft" in kind else "", k, "lookup" in kind)
        return " ".join(["llama-server", "-m", paths[0], *settings.speculation()])


def _version(program: str) -> str:
    """As `llama-server --version` tells it."""
    try:
        ended = subprocess.run(
            [program, "--version"], check=False, capture_output=True, timeout=60, text=True
        )
        if not ended.returncode:
            told = [line for line in (ended.stderr + ended.stdout).splitlines() if line.startswith("version")]
            return f"llama-server {told[0].partition(':')[2].strip()}" if told else "llama-server"
        found = f"exit code {ended.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        found = str(error)
    rule = "must be llama.cpp's llama-server, which tells its --version"
    raise FastDraftError(f"server: {program}: {found}; {rule}", "correct the path")


def _processor() -> str:
    """Its name as a user knows it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
