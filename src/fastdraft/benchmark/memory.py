"""How much memory a target takes, alone and with a draft: each in a process of its own.

Memory is the peak of what is resident while one real prompt is answered, above what the process held before
anything was loaded. Weights that are mapped from their file count where they were touched.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastdraft.functional.generation import Sampling
from fastdraft.runtimes.runtime import Proposer, Runtime

_TIMEOUT_SECONDS = 1800


def measure_memory(
    runtime: Runtime,
    target: Path,
    draft: Path,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    proposer: Proposer | None = None,
) -> int | None:
    """Peak bytes of a fresh process with the same runtime; None when it fails."""
    kind = type(runtime)
    asked = {
        "runtime": [kind.__module__, kind.__name__, asdict(runtime)],  # type: ignore[call-overload]
        "pair": [str(target), str(draft)],
        "answer": [list(prompt_ids), max_new_tokens],
        "proposer": proposer and asdict(proposer),
    }
    command = [sys.executable, "-m", "fastdraft.benchmark.memory"]
    try:
        ended = subprocess.run(
            command,
            input=json.dumps(asked).encode(),
            check=True,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            start_new_session=True,  # Ctrl-C is for the benchmark, which takes up what this one tells
        )
        return int(ended.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def resident() -> tuple[int, int]:
    """Bytes that this process and its servers hold now, and the most that they ever held, where the system
    tells that.
    """
    import psutil

    this, now, most = psutil.Process(), 0, 0
    for process in [this, *this.children(recursive=True)]:
        memory = process.memory_info()
        peak = getattr(memory, "peak_wset", memory.rss)  # Windows
        status = Path(f"/proc/{process.pid}/status")  # Linux
        for line in status.read_text(encoding="utf-8").splitlines() if status.exists() else ():
            if line.startswith("VmHWM"):
                peak = int(line.split()[1]) * 1024
        now, most = now + memory.rss, most + peak
    return now, most


def _end_with(parent: int) -> None:
    """A benchmark that is killed leaves no process behind."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def main() -> None:
    """Reads what `measure_memory` asks from stdin and prints the bytes."""
    asked, parent = json.loads(sys.stdin.read()), os.getppid()
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    module, name, settings = asked["runtime"]
    runtime: Runtime = getattr(importlib.import_module(module), name)(**settings)
    pair = runtime.open(*map(Path, asked["pair"]))
    prompt_ids, max_new_tokens = asked["answer"]
    proposer = asked["proposer"] and Proposer(**asked["proposer"])
    before, highest_before = resident()
    pair.write([prompt_ids], Sampling(0.0), max_new_tokens, 0, proposer)  # models are loaded with the first
    now, highest = resident()
    # The highest is of the whole life: where loading did not raise it, importing did.
    print((highest if highest > highest_before else now) - before)


if __name__ == "__main__":
    main()
