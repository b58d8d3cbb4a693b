"""The process in which llama.cpp's server runs: that of the wheel `xllamacpp`, or the user's llama-server.

python -m fastdraft.runtimes.llama_cpp_process SETTINGS PORT
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any

HOST = "127.0.0.1"


@dataclass(frozen=True)
class ServerSettings:
    """What a server is started with; nothing of it can be changed by a request."""

    target: str  # GGUF files
    draft: str = ""  # "": none
    num_speculative_tokens: int = 0
    lookup: bool = False  # proposes from the text itself, before the draft is asked
    room: int = 4096  # tokens of one text, prompt and answer together
    slots: int = 1  # texts at a time
    threads: int = 0  # 0: llama.cpp's own choice
    program: str = ""  # a llama-server; "": the wheel's

    @property
    def lookup_tokens(self) -> int:
        """Of the text's end, which must have stood before for lookup to propose what came behind."""
        return min(3, self.num_speculative_tokens)  # it refuses to propose fewer than these

    def arguments(self, port: int) -> list[str]:
        """The command line of a llama-server."""
        # Without these two it keeps old prompts in gigabytes of memory, and shrinks the context to what fits.
        line = ["-m", self.target, "--cache-ram", "0", "--fit", "off", "--host", HOST, "--port", str(port)]
        line += ["-c", str(self.room * self.slots), "-np", str(self.slots)]
        line += ["-t", str(self.threads), "-tb", str(self.threads)] if self.threads else []
        # A round has K proposals, whatever the environment says.
        line += ["--spec-draft-n-min", "0", "--spec-draft-p-min", "0"] if self.draft else []
        return line + self.speculation()

    def speculation(self) -> list[str]:
        """The part of the command line by which tokens are proposed."""
        k, line = str(self.num_speculative_tokens), list[str]()
        kinds = ["ngram-simple"] * self.lookup + ["draft-simple"] * bool(self.draft)
        line += ["-md", self.draft, "--spec-draft-n-max", k] if self.draft else []
        line += ["--spec-type", ",".join(kinds)] if kinds else []
        if self.lookup:
            line += ["--spec-ngram-simple-size-n", str(self.lookup_tokens), "--spec-ngram-simple-size-m", k]
        return line


def room_for(tokens: int) -> int:
    """Room that serves somewhat longer texts too, so that few servers are started again."""
    return max(256, 1 << (tokens - 1).bit_length())


def main() -> None:
    """Serves until its stdin is closed, as it is when the parent ends."""
    settings, port = ServerSettings(**json.loads(sys.argv[1])), int(sys.argv[2])
    ended: list[subprocess.Popen[bytes]] = []

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        for program in ended:
            program.kill()
        os._exit(0)

    if settings.program:
        command = [settings.program, *settings.arguments(port)]
        linux = sys.platform == "linux"
        # A server must not outlive this process either, should it be killed.
        die = (lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)) if linux else None  # PR_SET_PDEATHSIG
        ended.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die))  # noqa: PLW1509 (no thread yet)
    threading.Thread(target=end_with_parent, daemon=True).start()
    if ended:
        code = ended[0].wait()
        if code < 0:
            os.kill(os.getpid(), -code)  # ends as it ended, so that the parent can tell
        os._exit(code or 1)
    try:
        server = _serve(settings, port)
    except RuntimeError:  # its log has told why
        os._exit(1)
    threading.Event().wait()
    del server


def _serve(settings: ServerSettings, port: int) -> Any:
    """The server of the wheel, which runs as long as what this gives is held."""
    import xllamacpp

    params, kinds = xllamacpp.CommonParams(), []
    params.model.path, params.hostnames, params.port = settings.target, [HOST], port
    params.n_ctx, params.n_parallel = settings.room * settings.slots, settings.slots
    params.cache_ram_mib, params.fit_params, params.ui = 0, False, False
    if settings.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.threads
    speculative, kind = params.speculative, xllamacpp.common_speculative_type
    if settings.lookup:
        kinds.append(kind.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE)
        speculative.ngram_simple.size_n = settings.lookup_tokens
        speculative.ngram_simple.size_m = settings.num_speculative_tokens
    if settings.draft:
        kinds.append(kind.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE)
        speculative.draft.mparams.path = settings.draft
        speculative.draft.n_max = settings.num_speculative_tokens
        speculative.draft.n_min, speculative.draft.p_min = 0, 0.0
    if kinds:
        speculative.types = kinds
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
