"""llama.cpp as the `Runtime` of a benchmark."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastdraft.decoding.latency import Latency
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.errors import FastDraftError
from fastdraft.functional.lookup import Lookups
from fastdraft.modeling.gguf_files import GGUFFile, read_gguf, require_gguf
from fastdraft.modeling.gguf_files import check_pair as check_gguf_pair
from fastdraft.modeling.vocabulary import check_same
from fastdraft.runtimes.llama_cpp import LlamaCppPair, LlamaCppSettings, measure_passes
from fastdraft.runtimes.llama_cpp_process import ServerSettings
from fastdraft.runtimes.llama_cpp_server import NEWER, require_llama_cpp
from fastdraft.runtimes.runtime import Proposer
from fastdraft.target import Target


def file_type(file: GGUFFile) -> str:
    """How its weights are kept, in llama.cpp's words: `Q4_K_M`."""
    kind = file.value("general.file_type", 0)
    names = {each.value: each.name for each in require_gguf().LlamaFileType}
    return str(names.get(kind, f"type{kind}")).removeprefix("MOSTLY_").removeprefix("ALL_")


def check_files(target: GGUFFile, draft: GGUFFile) -> None:
    """Refuses a file that the server could not read, and a draft that it would leave out without an error."""
    for file in (target, draft):
        architecture = file.value("general.architecture")
        if architecture not in require_gguf().MODEL_ARCH_NAMES.values():
            found = f"architecture {architecture!r}, which the installed gguf does not know"
            raise file.wrong(found, "update gguf and the server, or take another model")
    check_gguf_pair(target.fields, draft.fields, str(draft.path))


def ngram_simple(prompt: Sequence[int], response: Sequence[int], num_speculative_tokens: int) -> Lookups:
    """What llama.cpp's lookup of that name proposes at every place (common/ngram-map.cpp).

    It takes the latest place of the last min(3, K) tokens that lies at least two tokens back, and proposes
    nothing where fewer tokens than these stand behind it, the last one of the text not counted.
    """
    text, k = [*prompt, *response], num_speculative_tokens
    size, first = min(3, k), len(prompt)
    found = np.zeros((2, len(response)), dtype=np.int64)
    behind: dict[tuple[int, ...], int] = {}
    for end in range(size, len(text)):
        if (place := end - 2) > size:  # not the text's very beginning
            behind[tuple(text[place - size : place])] = place
        at = behind.get(tuple(text[end - size : end]), end)
        width = min(k, end - 1 - at)
        if end >= first and width >= size and end - 1 > size + k + 1:
            pairs = zip(text[at : at + width], text[end : end + width], strict=False)
            right = next((j for j, (a, b) in enumerate(pairs) if a != b), min(width, len(text) - end))
            found[:, end - first] = width, right
    return Lookups(*found)


@dataclass(frozen=True)
class LlamaCppRuntime(LlamaCppSettings):
    """The `Runtime` with these settings; an exported model is a GGUF file."""

    name: ClassVar[str] = "llamacpp"
    exports: ClassVar[str] = "gguf"
    proposers: ClassVar[tuple[ProposerKind, ...]] = ("draft", "lookup", "lookup_draft")
    # What is drawn from the target is compared with the draft's likeliest token, and written either way.
    lossless_sampling: ClassVar[bool] = True
    greedy_proposals: ClassVar[bool] = True
    serves: ClassVar[bool] = False
    device: ClassVar[str] = "CPU"
    draft_device: ClassVar[str] = ""

    def describe(self) -> dict[str, Any]:
        """The server's release, and the processor."""
        check_server(self.server)
        version = _version(self.server) if self.server else f"xllamacpp {metadata.version('xllamacpp')}"
        named = {"name": self.name, "version": version, "device_name": processor(), "device": self.device}
        return named | {"draft_device": self.device, "threads": self.threads, "precision": "fast"}

    def check_pair(self, target: Target, draft: Target) -> None:
        check_same(target.vocabulary, draft.vocabulary, where=draft.name)

    def export(self, source: Target, folder: Path, weights: str, target: Path | None = None) -> None:
        """Files are the target's own and the export stage's: none is made for a benchmark."""
        rule = "llama.cpp runs the target's own file and the exported draft's"
        raise FastDraftError(f"{folder.name}: not there; {rule}", "add gguf to export.formats")

    def weights_bytes(self, exported: Path) -> int:
        return sum(tensor.size for tensor in read_gguf(exported).tensors.values())

    def bytes_per_token(self, model: Target, exported: Path, weights: str) -> float:
        """All, without the input's embeddings where the head has a matrix of its own."""
        tensors = read_gguf(exported).tensors
        unread = tensors["token_embd.weight"].size if "output.weight" in tensors else 0
        return float(self.weights_bytes(exported) - unread)

    def measure_passes(
        self,
        target: Path,
        draft: Path,
        widths: Sequence[int],
        prefix_tokens: int,
        texts: Sequence[int] = (1,),
    ) -> Latency | None:
        return measure_passes(target, draft, self, widths, prefix_tokens)

    def look_up(self, prompt: Sequence[int], response: Sequence[int], num_speculative_tokens: int) -> Lookups:
        return ngram_simple(prompt, response, num_speculative_tokens)

    def open(self, target: Path, draft: Path) -> LlamaCppPair:
        files = read_gguf(target), read_gguf(draft)
        check_files(*files)
        context = min(int(file.value("{arch}.context_length")) for file in files)
        return LlamaCppPair(files[0].path, files[1].path, self, context)

    def launch_line(self, target: str, draft: str, proposer: Proposer) -> str:
        paths = f"path/to/target-{target}.gguf", f"path/to/draft-{draft}.gguf"
        kind, k = proposer.kind, proposer.num_speculative_tokens
        settings = ServerSettings(paths[0], paths[1] if "draft" in kind else "", k, "lookup" in kind)
        return " ".join(["llama-server", "-m", paths[0], *settings.speculation()])


def check_server(program: str = "") -> None:
    """Refuses a server that is not there, or that is too old to propose tokens."""
    require_llama_cpp(program)
    if program and "--spec-type" not in _told(program, "--help"):
        raise FastDraftError(f"server: {program}: --help names no --spec-type; it is too old", NEWER)


def _version(program: str) -> str:
    """As `llama-server --version` tells it."""
    told = [line for line in _told(program, "--version").splitlines() if line.startswith("version")]
    return f"llama-server {told[0].partition(':')[2].strip()}" if told else "llama-server"


def _told(program: str, option: str) -> str:
    try:
        ended = subprocess.run([program, option], check=False, capture_output=True, timeout=60, text=True)
        if not ended.returncode:
            return ended.stderr + ended.stdout
        found = f"exit code {ended.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        found = str(error)
    rule = f"must be llama.cpp's llama-server, which tells its {option}"
    raise FastDraftError(f"server: {program}: {found}; {rule}", "correct the path")


def processor() -> str:
    """Its name as a user knows it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
